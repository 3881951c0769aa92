"""Every published layout, made by script, with and without faults."""

from __future__ import annotations

import io
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mitnet_fast.data.layouts import DataError, Report, check, examine, recognise, truth_margin

SIZE = (8, 6)


def put(root: Path, *names: str, size: tuple[int, int] = SIZE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = zlib.crc32(name.encode())  # no two files are the same
        Image.new("RGB", size, (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(path)
    return root


def pairs(root: Path, split: str | None = None, layout: str | None = None) -> list[tuple[str, str]]:
    return [(pair.hazy, pair.clear) for pair in recognise(root, layout).split(split).pairs]


def kinds(report: Report) -> list[tuple[str, bool]]:
    return sorted((problem.kind, problem.fatal) for problem in report.problems)


def printed(value: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(value)
    return console.export_text()


PUBLISHED = [
    ("its", ["hazy/1_1_0.90179.png", "hazy/1_2_0.8.png", "clear/1.png"], {
        "all": [("hazy/1_1_0.90179.png", "clear/1.png"), ("hazy/1_2_0.8.png", "clear/1.png")]}),
    ("its", ["haze/12_3_1.png", "clear_images/12.png"], {"all": [("haze/12_3_1.png", "clear_images/12.png")]}),
    ("its", ["input/1_1_0.9.png", "gt/1.png"], {"all": [("input/1_1_0.9.png", "gt/1.png")]}),
    ("mitnet", ["train_indoor/hazy/1_1.png", "train_indoor/gt/1.png", "val_indoor/hazy/2_1.png",
                "val_indoor/gt/2.png"], {
        "train": [("train_indoor/hazy/1_1.png", "train_indoor/gt/1.png")],
        "val": [("val_indoor/hazy/2_1.png", "val_indoor/gt/2.png")]}),
    ("ots", ["hazy/0001_0.8_0.2.jpg", "hazy/0002_1_0.04.jpg", "clear/0001.jpg", "clear/0002.png"], {
        "all": [("hazy/0001_0.8_0.2.jpg", "clear/0001.jpg"), ("hazy/0002_1_0.04.jpg", "clear/0002.png")]}),
    ("sots-indoor", ["hazy/1400_1.png", "hazy/1400_2.png", "gt/1400.png"], {
        "all": [("hazy/1400_1.png", "gt/1400.png"), ("hazy/1400_2.png", "gt/1400.png")]}),
    ("dehazeformer", ["train/GT/1_1.png", "train/hazy/1_1.png", "test/GT/2_1.png", "test/hazy/2_1.png"], {
        "train": [("train/hazy/1_1.png", "train/GT/1_1.png")], "test": [("test/hazy/2_1.png", "test/GT/2_1.png")]}),
    ("dehazeformer", ["GT/a.png", "hazy/a.png"], {"all": [("hazy/a.png", "GT/a.png")]}),
    ("dehazeformer", ["GT/a.png", "GT/a.jpg", "hazy/a.png", "hazy/a.jpg"], {
        "all": [("hazy/a.jpg", "GT/a.jpg"), ("hazy/a.png", "GT/a.png")]}),
    ("gunet", ["GT/1.png", "IN/1.png"], {"all": [("IN/1.png", "GT/1.png")]}),
    ("gunet", ["train/GT/1.png", "train/IN/1.png", "test/GT/2.png", "test/IN/2.png"], {
        "train": [("train/IN/1.png", "train/GT/1.png")], "test": [("test/IN/2.png", "test/GT/2.png")]}),
    ("haze4k", ["train/hazy/1_0.8_1.6.png", "train/gt/1.png", "test/hazy/7_x.png", "test/gt/7.png"], {
        "train": [("train/hazy/1_0.8_1.6.png", "train/gt/1.png")], "test": [("test/hazy/7_x.png", "test/gt/7.png")]}),
    ("dense-nh-haze", ["01_hazy.png", "01_GT.png", "50_hazy.png", "50_GT.png", "51_hazy.png", "51_GT.png"], {
        "train": [("01_hazy.png", "01_GT.png"), ("50_hazy.png", "50_GT.png")],
        "test": [("51_hazy.png", "51_GT.png")]}),
    ("dense-nh-haze", ["hazy/02_hazy.png", "GT/02_GT.png", "hazy/55_hazy.png", "GT/55_GT.png"], {
        "train": [("hazy/02_hazy.png", "GT/02_GT.png")], "test": [("hazy/55_hazy.png", "GT/55_GT.png")]}),
    ("o-haze", ["hazy/01_outdoor_hazy.jpg", "GT/01_outdoor_GT.jpg"], {
        "all": [("hazy/01_outdoor_hazy.jpg", "GT/01_outdoor_GT.jpg")]}),
    ("o-haze", ["01_outdoor_hazy.jpg", "01_outdoor_GT.jpg"], {"all": [("01_outdoor_hazy.jpg", "01_outdoor_GT.jpg")]}),
    ("i-haze", ["hazy/01_indoor_hazy.jpg", "GT/01_indoor_GT.jpg"], {
        "all": [("hazy/01_indoor_hazy.jpg", "GT/01_indoor_GT.jpg")]}),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "files", "expected"), PUBLISHED)
def test_published_layouts(
    tmp_path: Path, layout: str, files: list[str], expected: dict[str, list[tuple[str, str]]]
) -> None:
    put(tmp_path, *files)
    found = recognise(tmp_path)
    assert found.layout.name == layout
    assert {name: [(p.hazy, p.clear) for p in split.pairs] for name, split in found.splits.items()} == expected
    assert pairs(tmp_path) == [pair for split in expected.values() for pair in split]
    report = check(tmp_path)
    assert (report.problems, report.usable, report.layout) == ((), True, layout)
    assert report.pairs == sum(map(len, expected.values()))


class TestSplits:
    def test_val_and_test_stand_in_for_each_other(self, tmp_path: Path) -> None:
        put(tmp_path, "train/hazy/1.png", "train/GT/1.png", "test/hazy/2.png", "test/GT/2.png")
        assert pairs(tmp_path, "val") == pairs(tmp_path, "test") == [("test/hazy/2.png", "test/GT/2.png")]

    def test_each_has_its_own_where_both_are_there(self, tmp_path: Path) -> None:
        put(tmp_path, *(f"{split}/{folder}/{split}.png" for split in ("val", "test") for folder in ("hazy", "GT")))
        assert pairs(tmp_path, "val") == [("val/hazy/val.png", "val/GT/val.png")]
        with pytest.raises(DataError, match="has no split 'train' here, only val, test"):
            recognise(tmp_path).split("train")

    def test_without_splits_all_are_used(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png")
        assert pairs(tmp_path, "train") == pairs(tmp_path, "test") == pairs(tmp_path) != []

    def test_unknown_name(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/a.png", "GT/a.png")
        with pytest.raises(ValueError, match="split: expected one of train, val, test or None, got 'valid'"):
            recognise(tmp_path).split("valid")

    def test_numbers_outside_both(self, tmp_path: Path) -> None:
        put(tmp_path, "51_hazy.png", "51_GT.png", "56_hazy.png", "56_GT.png")
        assert pairs(tmp_path) == [("51_hazy.png", "51_GT.png")]
        assert [(p.kind, p.message) for p in check(tmp_path).problems] == [
            ("in no split", "56_hazy.png: numbers are 1 to 50 for train, 51 to 55 for test")
        ]


class TestValidationList:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        names = ("1_1", "1_2", "2_1")
        put(tmp_path, *(f"val_indoor/hazy/{name}.png" for name in names))
        return put(tmp_path, "val_indoor/gt/1.png", "val_indoor/gt/2.png")

    @pytest.mark.parametrize("place", ["vallist.txt", "val_indoor/vallist.txt"])
    @pytest.mark.parametrize("prefix", ["", "hazy/", "./hazy/", "val_indoor/hazy/"])
    def test_chooses_the_images(self, root: Path, place: str, prefix: str) -> None:
        (root / place).write_bytes(f"\ufeff{prefix}2_1.png\r\n\r\n{prefix}1_2.png\n".encode())
        assert pairs(root, "val") == [
            ("val_indoor/hazy/1_2.png", "val_indoor/gt/1.png"),
            ("val_indoor/hazy/2_1.png", "val_indoor/gt/2.png"),
        ]
        report = check(root)
        assert (kinds(report), report.usable) == ([("not listed", False)], True)
        assert report.splits["val"].hazy == 2

    @pytest.mark.parametrize(
        "name",
        ["../../x.png", "hazy/../../1_1.png", "/etc/passwd", "..\\x.png", "C:\\x.png", "gt/1_1.png", "other/1_1.png"],
    )
    def test_refuses_names_that_lead_elsewhere(self, root: Path, name: str) -> None:
        (root / "vallist.txt").write_text(f"1_1.png\n{name}\n")
        report = check(root)
        assert ("unsafe name", True) in kinds(report)
        assert not report.usable
        (problem,) = (problem for problem in report.problems if problem.fatal)
        assert problem.message.startswith(f"vallist.txt, line 2: {name!r}")
        assert pairs(root) == [("val_indoor/hazy/1_1.png", "val_indoor/gt/1.png")]

    def test_refuses_links_out_of_the_set(self, root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        outside = put(tmp_path_factory.mktemp("outside"), "hazy/1_1.png")
        for name, target in (("1_3", outside / "hazy/1_1.png"), ("1_4", root / "val_indoor/hazy/1_1.png")):
            (root / f"val_indoor/hazy/{name}.png").symlink_to(target)
        (root / "vallist.txt").write_text("1_3.png\n1_4.png\n")
        (problem,) = (problem for problem in check(root).problems if problem.fatal)
        assert (problem.kind, problem.message) == (
            "unsafe name",
            f"vallist.txt, line 1: '1_3.png' is a link out of {root}",
        )
        assert pairs(root) == [("val_indoor/hazy/1_4.png", "val_indoor/gt/1.png")]

    def test_a_folder_may_be_a_link(self, root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        place = tmp_path_factory.mktemp("other disk") / "hazy"
        (root / "val_indoor/hazy").rename(place)
        (place / "1_3.png").symlink_to(place / "1_1.png")
        (root / "val_indoor/hazy").symlink_to(place)
        (root / "vallist.txt").write_text("1_3.png\n2_1.png\n")
        assert len(pairs(root)) == 2
        assert check(root).usable

    def test_missing_and_doubled(self, root: Path) -> None:
        (root / "vallist.txt").write_text("1_1.png\n9_9.png\n1_1.png\n2_1.png\n1_2.png\n")
        report = check(root)
        assert [(problem.kind, problem.message, problem.fatal) for problem in report.problems] == [
            ("listed but missing", "vallist.txt, line 2: val_indoor/hazy/9_9.png", True),
            ("listed twice", "vallist.txt, line 3: 1_1.png stands on line 1 already", False),
        ]
        assert report.pairs == 3

    def test_not_text(self, root: Path) -> None:
        put(root, "train_indoor/hazy/1_1.png", "train_indoor/gt/1.png")
        (root / "vallist.txt").write_bytes(b"\xff\xfe\x00")
        assert ("unreadable", True) in kinds(check(root))


class TestFaults:
    def test_hazy_without_clear_and_clear_without_hazy(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "hazy/2_1_0.9.png", "clear/1.png", "clear/3.png")
        report = check(tmp_path)
        assert [(problem.kind, problem.message, problem.fatal) for problem in report.problems] == [
            ("hazy without clear", "hazy/2_1_0.9.png: no clear/2 with any extension", True),
            ("clear without hazy", "clear/3.png", False),
        ]
        assert (report.pairs, report.splits["all"].hazy, report.splits["all"].clear) == (1, 2, 2)
        assert not report.usable

    def test_clear_without_hazy_keeps_the_set_usable(self, tmp_path: Path) -> None:
        assert check(put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png", "clear/3.png")).usable

    def test_two_truths(self, tmp_path: Path) -> None:
        put(
            tmp_path,
            "hazy/0001_0.8_0.2.jpg",
            "hazy/0002_0.8_0.2.jpg",
            "clear/0001.jpg",
            "clear/0001.png",
            "clear/0002.jpg",
        )
        (problem,) = check(tmp_path).problems
        assert (problem.kind, problem.fatal) == ("duplicates", True)
        assert problem.message == "hazy/0001_0.8_0.2.jpg: its truth may be clear/0001.jpg and clear/0001.png"

    def test_two_hazy_images_of_one_name(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "hazy/1_1_0.9.jpg", "hazy/2_1_0.9.png", "clear/1.png", "clear/2.png")
        (problem,) = check(tmp_path).problems
        assert problem.message == "hazy/1_1_0.9.jpg and hazy/1_1_0.9.png: two hazy images of one name"
        assert (problem.kind, problem.fatal) == ("duplicates", True)

    def test_other_names(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "hazy/preview.png", "clear/1.png")
        (problem,) = check(tmp_path).problems
        assert (problem.kind, problem.fatal) == ("unknown name", True)
        assert problem.message == "hazy/preview.png: RESIDE ITS has names like 1_1_0.90179.png → 1.png"

    def test_files_that_are_no_images(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png")
        (tmp_path / "hazy" / "Thumbs.db").touch()
        (tmp_path / "hazy" / "._1_1_0.9.png").write_bytes(b"as macOS leaves it")
        report = check(tmp_path)
        assert [(problem.kind, problem.message) for problem in report.problems] == [("no image", "hazy/Thumbs.db")]
        assert report.usable

    def test_sizes_differ(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "hazy/2_1_0.9.png", "clear/2.png")
        put(tmp_path, "clear/1.png", size=(6, 8))
        (problem,) = check(tmp_path).problems
        assert (problem.kind, problem.fatal) == ("sizes differ", True)
        assert problem.message == "hazy/1_1_0.9.png is 8×6, its truth clear/1.png is 6×8"

    def test_unreadable(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "hazy/2_1_0.9.png", "clear/1.png", "clear/2.png")
        (tmp_path / "hazy/1_1_0.9.png").write_bytes(b"")
        (tmp_path / "clear/2.png").write_bytes(b"no image at all")
        problems = check(tmp_path).problems
        assert [problem.kind for problem in problems] == ["unreadable", "unreadable"]
        assert f"{tmp_path / 'hazy/1_1_0.9.png'}: the file is empty" == problems[0].message
        assert "clear/2.png: not an image" in problems[1].message

    def test_truncated_is_found_by_decoding(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        put(tmp_path, "clear/1.png", size=(64, 64))
        (tmp_path / "hazy").mkdir()
        path = tmp_path / "hazy/1_1_0.9.png"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:5000])
        assert check(tmp_path).usable
        (problem,) = check(tmp_path, decode=True).problems
        assert (problem.kind, problem.fatal) == ("unreadable", True)
        assert str(path) in problem.message

    def test_broken_link(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png")
        (tmp_path / "clear").mkdir()
        (tmp_path / "clear/1.png").symlink_to(tmp_path / "nowhere.png")
        (problem,) = check(tmp_path).problems
        assert problem.message == f"{tmp_path / 'clear/1.png'}: no such file"

    def test_unreadable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png")
        scandir = os.scandir

        def guarded(path: Path):
            if Path(path).name == "clear":
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", guarded)
        with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path / 'clear'))}: cannot be listed: .*denied"):
            check(tmp_path)


class TestTrainAndTest:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        generator = np.random.default_rng(0)
        for path in ("train/GT/1", "train/GT/2", "train/hazy/1", "train/hazy/2", "test/GT/7", "test/hazy/7"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (6, 8, 3)).astype(np.uint8)).save(tmp_path / f"{path}.png")
        return tmp_path

    def test_apart(self, root: Path) -> None:
        sizes = {path.stat().st_size for path in root.rglob("*.png")}
        assert len(sizes) == 1  # all bytes are compared
        assert check(root).problems == ()

    @pytest.mark.parametrize("name", ["GT", "hazy"])
    def test_the_same_file_in_both(self, root: Path, name: str) -> None:
        shutil.copy(root / "train" / name / "2.png", root / "test" / name / "7.png")
        report = check(root)
        assert [(problem.kind, problem.message, problem.fatal) for problem in report.problems] == [
            ("in train too", f"test/{name}/7.png is the same file as train/{name}/2.png", False)
        ]
        assert report.usable

    def test_without_a_training_split_nothing_is_compared(self, root: Path) -> None:
        shutil.copy(root / "train/GT/2.png", root / "test/GT/7.png")
        shutil.rmtree(root / "train")
        assert check(root).problems == ()


class TestSotsIndoor:
    def test_truth_is_cut_by_ten_pixels(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1400_1.png", size=(620, 460))
        put(tmp_path, "gt/1400.png", size=(640, 480))
        report = check(tmp_path)
        assert (report.layout, report.problems) == ("sots-indoor", ())
        (pair,) = report.splits["all"].pairs
        assert examine(tmp_path, [pair])[0] == {"hazy/1400_1.png": (620, 460), "gt/1400.png": (640, 480)}
        assert truth_margin(pair, (620, 460), (640, 480)) == 10
        assert truth_margin(pair, (620, 460), (620, 460)) == 0
        for hazy, clear in (((460, 620), (480, 640)), ((640, 480), (620, 460)), ((620, 460), (640, 481))):
            with pytest.raises(DataError, match=r"hazy/1400_1\.png is .*, its truth gt/1400\.png is"):
                truth_margin(pair, hazy, clear)


class TestUnknown:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="none: no such folder"):
            recognise(tmp_path / "none")

    def test_file(self, tmp_path: Path) -> None:
        put(tmp_path, "a.png")
        with pytest.raises(DataError, match=r"a\.png: a file, not a folder"):
            recognise(tmp_path / "a.png")

    def test_says_what_was_looked_for_and_found(self, tmp_path: Path) -> None:
        put(tmp_path, "foggy/1.png", "sunny/1.png", "top.png")
        with pytest.raises(DataError) as caught:
            recognise(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}: no layout fits. Looked for\n  mitnet: in train_indoor/, val_indoor/: ")
        assert "\n  gunet: in train/, val/, test/ or in ./: IN with GT, same names\n" in message
        assert message.count("\n") == 11
        assert message.endswith(
            "Found folders foggy, sunny; 1 images; "
            "foggy/ with 1 images such as 1.png; sunny/ with 1 images such as 1.png."
        )

    def test_points_at_the_folder_below(self, tmp_path: Path) -> None:
        put(tmp_path, "indoor/hazy/1_1.png", "indoor/gt/1.png", "outdoor/hazy/0001_0.8_0.2.jpg", "outdoor/gt/0001.png")
        put(tmp_path, "outdoor/hazy/0001_1_0.2.jpg")  # ITS has such names too, but fewer of these
        with pytest.raises(DataError) as caught:
            recognise(tmp_path)
        assert f"{tmp_path / 'indoor'} looks like sots-indoor\n{tmp_path / 'outdoor'} looks like ots" in str(
            caught.value
        )

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "hazy").mkdir()
        (tmp_path / "clear").mkdir()
        with pytest.raises(DataError, match=r"Found folders clear, hazy; 0 images\.$"):
            recognise(tmp_path)

    def test_ambiguous_by_folders(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png", "gt/1.png")
        with pytest.raises(
            DataError, match=r"ambiguous, its \(hazy/1_1_0.9.png → clear/1.png\) and its \(.*gt/1.png\)"
        ):
            recognise(tmp_path)

    def test_ambiguous_by_names(self, tmp_path: Path) -> None:
        put(tmp_path, "train/hazy/1_1.png", "train/gt/1_1.png", "train/gt/1.png")
        with pytest.raises(DataError, match=r"ambiguous, dehazeformer .* and haze4k"):
            recognise(tmp_path)
        assert pairs(tmp_path, layout="dehazeformer") == [("train/hazy/1_1.png", "train/gt/1_1.png")]
        assert pairs(tmp_path, layout="haze4k") == [("train/hazy/1_1.png", "train/gt/1.png")]

    def test_the_layout_that_pairs_most_is_taken(self, tmp_path: Path) -> None:
        put(
            tmp_path, "train/hazy/1_1.png", "train/hazy/2_1.png", "train/gt/1_1.png", "train/gt/1.png", "train/gt/2.png"
        )
        assert recognise(tmp_path).layout.name == "haze4k"

    def test_named_layout_that_does_not_fit(self, tmp_path: Path) -> None:
        put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png")
        with pytest.raises(DataError) as caught:
            recognise(tmp_path, "gunet")
        assert "Looked for\n  gunet: " in str(caught.value)
        assert "mitnet:" not in str(caught.value)

    def test_unknown_layout(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"layout: expected one of mitnet, its, .*, got 'coco'"):
            recognise(tmp_path, "coco")

    def test_markup_in_names_is_shown_as_it_is(self, tmp_path: Path) -> None:
        root = put(tmp_path / "[red]set", "hazy/1_1_0.9.png", "hazy/[b]x.png", "clear/1.png")
        shown = printed(check(root))
        assert "[red]set: RESIDE ITS (its)" in shown
        assert "hazy/[b]x.png" in shown
        assert "│ unknown name │ 1 " in shown


def test_report_shows_counts_and_no_more_than_asked(tmp_path: Path) -> None:
    put(tmp_path, "hazy/1_1_0.9.png", "clear/1.png", *(f"clear/{number}.png" for number in range(2, 9)))
    report = check(tmp_path)
    assert report.counts() == {("clear without hazy", False): 7}
    shown = printed(report.render(limit=3))
    assert [cell for cell in ("clear/2.png", "clear/4.png", "clear/5.png", "… and 4 more") if cell in shown] == [
        "clear/2.png", "clear/4.png", "… and 4 more",
    ]  # fmt: skip
    assert "│ all   │     1 │    1 │     8 │" in shown
