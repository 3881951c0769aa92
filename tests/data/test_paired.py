"""Pairs from disk: their values, their geometry, what makes it reproducible, and what is refused before training."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mitnet_fast.data import DataError, PairedImages, to_float, write_card, write_image
from mitnet_fast.data.transforms import turn

HEIGHT, WIDTH = 24, 30


def coded(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """An image whose first two channels are each pixel's row and column, so that a window tells where it came from."""
    rows, columns = np.indices((height, width))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width))
    return np.stack([rows, columns, noise], axis=2).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(5):
        save(tmp_path / f"set/train/hazy/{index}.png", coded(seed=index))
        save(tmp_path / f"set/train/GT/{index}.png", 255 - coded(seed=index))
        save(tmp_path / f"depth/train/{index}.png", coded()[..., 0] * 10)
    save(tmp_path / "set/test/hazy/9.png", coded())
    save(tmp_path / "set/test/GT/9.png", 255 - coded())
    return tmp_path / "set"


def items(dataset: PairedImages) -> list[dict[str, torch.Tensor | str]]:
    return [dataset[index] for index in range(len(dataset))]


def same(first: list[dict], second: list[dict]) -> bool:
    return all(
        a["name"] == b["name"] and torch.equal(a["hazy"], b["hazy"]) and torch.equal(a["clear"], b["clear"])
        for a, b in zip(first, second, strict=True)
    )


class TestWholeImages:
    def test_values(self, root: Path) -> None:
        dataset = PairedImages(root, "train")
        assert (len(dataset), dataset.layout, dataset.split) == (5, "dehazeformer", "train")
        item = dataset[3]
        assert item["name"] == dataset.name(3) == "train/hazy/3.png"
        assert set(item) == {"hazy", "clear", "name"}
        assert (item["hazy"].dtype, item["hazy"].shape) == (torch.float32, (3, HEIGHT, WIDTH))
        assert torch.equal(item["hazy"], torch.from_numpy(coded(seed=3)).permute(2, 0, 1) / 255)
        assert (item["hazy"] + item["clear"] - 1).abs().max() < 1e-6

    def test_splits(self, root: Path) -> None:
        assert [item["name"] for item in items(PairedImages(root, "test"))] == ["test/hazy/9.png"]
        assert len(PairedImages(root)) == 6

    def test_transparency_is_left_out(self, root: Path) -> None:
        save(root / "train/hazy/0.png", np.dstack([coded(), coded()[..., 0]]))
        assert torch.equal(PairedImages(root, "train")[0]["hazy"], torch.from_numpy(coded()).permute(2, 0, 1) / 255)

    def test_sots_truth_is_cut_not_resized(self, tmp_path: Path) -> None:
        truth = np.zeros((480, 640, 3), np.uint8)
        truth[10:-10, 10:-10] = np.random.default_rng(0).integers(0, 256, (460, 620, 3))
        save(tmp_path / "set/gt/1400.png", truth)
        save(tmp_path / "set/hazy/1400_1.png", truth[10:-10, 10:-10])
        np.save(tmp_path / "1400.npy", truth[..., 0].astype(np.float32))
        (item,) = items(PairedImages(tmp_path / "set", depth=tmp_path))
        assert torch.equal(item["clear"], item["hazy"])
        assert item["depth"].shape == (1, 460, 620)
        assert (item["depth"][0] - item["clear"][0]).abs().max() < 1e-6

    @pytest.mark.parametrize("augment", ["mitnet", "dcmpnet"])
    def test_what_is_left_to_the_device(self, root: Path, augment: str) -> None:
        arguments = {"patch": 8, "augment": augment, "depth": root.parent / "depth", "repeat": 4}
        raw, done = (PairedImages(root, "train", on_device=on_device, **arguments) for on_device in (True, False))
        orientations = set()
        for index in range(len(raw)):
            item, expected = raw[index], done[index]
            assert item["hazy"].dtype == item["clear"].dtype == torch.uint8
            assert item["hazy"].is_contiguous()
            orientation = item["orientation"][None]
            orientations.add(tuple(orientation[0].tolist()))
            for name in ("hazy", "clear"):
                assert torch.equal(to_float(turn(item[name][None], orientation))[0], expected[name])
            assert torch.equal(turn(item["depth"][None], orientation)[0], expected["depth"])
        assert len(orientations) > 3

    def test_16_bit_pairs(self, root: Path) -> None:
        values = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
        write_image(root / "train/hazy/0.png", values, bits=16)
        window = PairedImages(root, "train", patch=24, augment="dcmpnet")
        geometry = window.geometry(0, HEIGHT, WIDTH)
        assert (window[0]["hazy"] - geometry.apply(values)).abs().max() < 1e-5
        raw = PairedImages(root, "train", patch=24, augment="dcmpnet", on_device=True)[0]
        assert torch.equal(turn(raw["hazy"][None], raw["orientation"][None])[0], window[0]["hazy"])

    def test_index_outside(self, root: Path) -> None:
        dataset = PairedImages(root, "train")
        for index in (-1, 5):
            with pytest.raises(IndexError, match="expected 0 to 4"):
                dataset[index]


class TestWindows:
    @pytest.mark.parametrize("augment", ["mitnet", "dcmpnet"])
    def test_hazy_clear_and_depth_share_one_geometry(self, root: Path, augment: str) -> None:
        dataset = PairedImages(root, "train", patch=16, augment=augment, depth=root.parent / "depth", repeat=8, seed=3)
        assert len(dataset) == 40
        turned = 0
        for index, item in enumerate(items(dataset)):
            assert item["hazy"].shape == item["clear"].shape == (3, 16, 16)
            assert (item["hazy"] + item["clear"] - 1).abs().max() < 1e-6
            rows, columns = (item["hazy"][:2] * 255).round().int()
            assert (item["depth"][0] - rows / (HEIGHT - 1)).abs().max() < 1e-6
            geometry = dataset.geometry(index, HEIGHT, WIDTH)
            assert (int(rows.min()), int(columns.min())) == (geometry.top, geometry.left)
            assert (int(rows.max()), int(columns.max())) == (geometry.top + 15, geometry.left + 15)
            turned += int(rows[0, 0] != rows.min() or columns[0, 0] != columns.min())
            assert all(item[key].is_contiguous() for key in ("hazy", "clear", "depth"))
        assert 20 < turned < 40

    def test_middle_without_augmentation(self, root: Path) -> None:
        item = PairedImages(root, "train", patch=10)[0]
        rows, columns = (item["hazy"][:2] * 255).round().int()
        assert (rows[0, 0], rows[-1, 0], columns[0, 0], columns[0, -1]) == (7, 16, 10, 19)

    def test_repeats_have_windows_of_their_own(self, root: Path) -> None:
        dataset = PairedImages(root, "train", patch=8, augment="mitnet", repeat=6)
        starts = {dataset.geometry(index, HEIGHT, WIDTH) for index in range(0, 30, 5)}
        assert {dataset.name(index) for index in range(0, 30, 5)} == {"train/hazy/0.png"}
        assert len(starts) == 6


class TestReproducible:
    @pytest.fixture
    def dataset(self, root: Path) -> PairedImages:
        return PairedImages(root, "train", patch=8, augment="mitnet", seed=11)

    def test_seed_epoch_and_index_decide(self, root: Path, dataset: PairedImages) -> None:
        again = PairedImages(root, "train", patch=8, augment="mitnet", seed=11)
        other = PairedImages(root, "train", patch=8, augment="mitnet", seed=12)
        first = items(dataset)
        torch.manual_seed(5)
        np.random.seed(5)
        assert same(first, items(again))
        assert same(first[::-1], [again[index] for index in reversed(range(5))])
        assert not same(first, items(other))
        dataset.set_epoch(1)
        assert dataset.epoch == 1
        assert not same(first, items(dataset))
        dataset.set_epoch(0)
        assert same(first, items(dataset))

    @pytest.mark.parametrize("persistent", [False, True])
    def test_workers_change_nothing(self, dataset: PairedImages, persistent: bool) -> None:
        loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=persistent)
        seen = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            alone = items(dataset)
            batches = list(loader)
            assert [len(batch["name"]) for batch in batches] == [2, 2, 1]
            hazy, clear = (torch.cat([batch[key] for batch in batches]) for key in ("hazy", "clear"))
            assert torch.equal(hazy, torch.stack([item["hazy"] for item in alone]))
            assert torch.equal(clear, torch.stack([item["clear"] for item in alone]))
            seen.append(hazy)
        assert not torch.equal(*seen)

    def test_pickles_small_and_whole(self, dataset: PairedImages) -> None:
        dataset.set_epoch(4)
        content = pickle.dumps(dataset)
        assert len(content) < 3000
        assert same(items(pickle.loads(content)), items(dataset))

    def test_nothing_is_decoded_before_it_is_asked_for(self, root: Path) -> None:
        dataset = PairedImages(root, "train")
        (root / "train/hazy/2.png").write_bytes(b"")
        assert dataset[1]["name"] == "train/hazy/1.png"
        with pytest.raises(ValueError, match=r"train/hazy/2\.png: the file is empty"):
            dataset[2]


class TestDepth:
    def test_distances_are_turned_round(self, root: Path) -> None:
        write_card(root.parent / "depth/train", "depth")
        save(root.parent / "depth/train/0.png", np.arange(1, HEIGHT + 1, dtype=np.uint8)[:, None].repeat(WIDTH, 1))
        depth = PairedImages(root, "train", depth=root.parent / "depth")[0]["depth"]
        assert (depth[0, 0, 0], depth[0, -1, 0]) == (1, 0)
        assert depth[0, 1, 0] == pytest.approx((1 / 2 - 1 / HEIGHT) / (1 - 1 / HEIGHT), abs=1e-6)

    def test_repeat_keeps_maps_with_their_images(self, root: Path) -> None:
        for index in range(5):
            np.save(root.parent / f"depth/train/{index}.npy", np.eye(HEIGHT, WIDTH, index))
            (root.parent / f"depth/train/{index}.png").unlink()
        dataset = PairedImages(root, "train", depth=root.parent / "depth", repeat=2)
        for index, item in enumerate(items(dataset)):
            assert torch.equal(item["depth"][0], torch.from_numpy(np.eye(HEIGHT, WIDTH, index % 5)).float())

    def test_faults(self, root: Path) -> None:
        folder = root.parent / "depth/train"
        (folder / "0.png").unlink()
        save(folder / "1.png", np.zeros((HEIGHT, WIDTH + 1), np.uint8))
        save(folder / "2.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        (folder / "3.json").write_text('{"kind": "fog"}')
        with pytest.raises(DataError) as caught:
            PairedImages(root, "train", depth=root.parent / "depth")
        message = str(caught.value)
        assert message.startswith(f"{root}: 4 problems\n")
        assert f"without depth: train/GT/0.png: no map of that name in {root.parent / 'depth'}" in message
        assert f"sizes differ: {folder / '1.png'} is 31×24, train/GT/1.png is 30×24" in message
        assert f"unreadable: {folder / '2.png'}: expected a grey depth map" in message
        assert f"unreadable: {folder / '3.json'}: " in message

    def test_missing_folder(self, root: Path) -> None:
        with pytest.raises(DataError, match=r"depth: no folder .*data depth"):
            PairedImages(root, "train", depth=root / "none")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"augment": "flip", "patch": 8}, "augment: expected one of mitnet, dcmpnet or None, got 'flip'"),
            ({"augment": "mitnet"}, "patch: augment='mitnet' takes windows"),
            ({"patch": 0}, "patch=0"),
            ({"repeat": 0}, "repeat=0"),
            ({"seed": -1}, "seed=-1"),
            ({"split": "valid"}, "split: expected one of"),
            ({"layout": "coco"}, "layout: expected one of"),
        ],
    )
    def test_arguments(self, root: Path, options: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            PairedImages(root, **options)

    def test_negative_epoch(self, root: Path) -> None:
        with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
            PairedImages(root).set_epoch(-1)

    def test_smaller_than_the_patch(self, root: Path) -> None:
        save(root / "train/hazy/1.png", coded(20, 40))
        save(root / "train/GT/1.png", coded(20, 40))
        assert len(PairedImages(root, "train", patch=20)) == 5
        with pytest.raises(DataError, match=r"smaller than the patch: train/hazy/1\.png is 40×20, the patch 21×21"):
            PairedImages(root, "train", patch=21)

    def test_mismatch_names_both_files(self, root: Path) -> None:
        save(root / "train/GT/1.png", coded(24, 31))
        with pytest.raises(DataError, match=r"train/hazy/1\.png is 30×24, its truth train/GT/1\.png is 31×24"):
            PairedImages(root, "train")
        assert len(PairedImages(root, "test")) == 1

    def test_truth_missing(self, root: Path) -> None:
        (root / "train/GT/1.png").unlink()
        with pytest.raises(DataError, match=r"hazy without clear: train/hazy/1\.png"):
            PairedImages(root, "train")

    def test_many_problems_are_counted(self, root: Path) -> None:
        for index in range(20, 40):
            save(root / f"train/hazy/{index}.png", coded())
        with pytest.raises(DataError) as caught:
            PairedImages(root, "train")
        assert str(caught.value).startswith(f"{root}: 20 problems\n")
        assert str(caught.value).endswith("… and 10 more")

    def test_split_without_pairs(self, tmp_path: Path) -> None:
        save(tmp_path / "train/hazy/1.png", coded())
        save(tmp_path / "train/GT/1.png", coded())
        save(tmp_path / "test/GT/1.png", coded())
        (tmp_path / "test/hazy").mkdir()
        with pytest.raises(DataError, match="no pairs in split 'test'"):
            PairedImages(tmp_path, "test")
