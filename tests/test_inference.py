"""Files in, files out: what is kept, what is refused, what one bad file does to the others; tiles and ensembles."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn

from mitnet_fast.data import read_image, write_image
from mitnet_fast.inference import Deviation, dehaze_files, place, restore, restore_tiled

CPU = torch.device("cpu")


class Invert(nn.Module):
    """A stand-in that works on every pixel by itself and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(tuple(image.shape))
        return 1 - image


class Global(nn.Module):
    """A stand-in whose every pixel depends on the whole image, as in both networks."""

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        return 0.5 * image + 0.5 * image.mean((-3, -2, -1), keepdim=True)


class Slanted(nn.Module):
    """A stand-in that is different along rows and columns."""

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0, 1, image.shape[-1])
        return image * ramp + torch.linspace(0, 2, image.shape[-2])[:, None]


def picture(height: int = 9, width: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def load(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestFiles:
    def test_result_and_report(self, tmp_path: Path) -> None:
        source = save(tmp_path / "a.png", picture())
        model, done = Invert(), []
        summary = dehaze_files(model, source, tmp_path / "out", progress=lambda *state: done.append(state))
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture())
        (result,) = summary.results
        assert done == [(1, 1, result)]
        assert (result.input, result.output) == (source, tmp_path / "out/a.png")
        assert (result.error, result.height, result.width, result.notes, result.deviation) == ("", 9, 12, (), None)
        assert 0 < result.seconds <= summary.seconds
        assert summary.failures == ()
        assert model.seen == [(1, 3, 9, 12)]
        assert np.array_equal(load(source), picture())

    @pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 2), (100, 7)])
    def test_any_size(self, tmp_path: Path, size: tuple[int, int]) -> None:
        dehaze_files(Invert(), save(tmp_path / "a.png", picture(*size)), tmp_path / "out")
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture(*size))

    def test_alpha_is_kept(self, tmp_path: Path) -> None:
        pixels = picture(channels=4)
        dehaze_files(Invert(), save(tmp_path / "a.png", pixels), tmp_path / "out")
        expected = np.dstack([255 - pixels[..., :3], pixels[..., 3]])
        assert np.array_equal(load(tmp_path / "out/a.png"), expected)

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_16_bits_are_kept(self, tmp_path: Path, suffix: str) -> None:
        values = torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(0))
        write_image(tmp_path / f"a{suffix}", values[:3], values[3:], bits=16)
        dehaze_files(Invert(), tmp_path / f"a{suffix}", tmp_path / "out")
        before, after = read_image(tmp_path / f"a{suffix}"), read_image(tmp_path / f"out/a{suffix}")
        assert after.bits == 16
        assert (after.rgb - (1 - before.rgb)).abs().max() < 1e-6
        assert torch.equal(after.alpha, before.alpha)

    def test_colour_profile_is_kept(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png", torch.rand(3, 4, 4), icc_profile=b"a profile")
        dehaze_files(Invert(), tmp_path / "a.png", tmp_path / "out")
        assert read_image(tmp_path / "out/a.png").icc_profile == b"a profile"

    def test_grey_comes_out_in_colour(self, tmp_path: Path) -> None:
        grey = picture(channels=1)
        dehaze_files(Invert(), save(tmp_path / "a.png", grey[..., 0]), tmp_path / "out")
        assert np.array_equal(load(tmp_path / "out/a.png"), np.repeat(255 - grey, 3, axis=2))

    def test_notes_are_passed_on(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(picture())])
        summary = dehaze_files(Invert(), tmp_path / "a.tif", tmp_path / "out")
        assert summary.results[0].notes == ("holds 2 frames, the first is used",)

    def test_folders_and_files(self, tmp_path: Path) -> None:
        for name in ("in/b.png", "in/a.jpg", "in/deeper/c.png", "d.webp"):
            save(tmp_path / name, picture())
        for name in ("in/notes.txt", "in/.hidden.png"):
            (tmp_path / name).write_bytes(b"none of these")
        summary = dehaze_files(Invert(), [tmp_path / "d.webp", tmp_path / "in"], tmp_path / "out/new")
        assert [result.input.name for result in summary.results] == ["d.webp", "a.jpg", "b.png"]
        assert files(tmp_path / "out") == ["new/a.jpg", "new/b.png", "new/d.webp"]

    def test_recursive_mirrors_folders_and_leaves_out_its_own_results(self, tmp_path: Path) -> None:
        for name in ("x/a.png", "y/a.png", "a.png"):
            save(tmp_path / name, picture())
        for _ in range(2):
            summary = dehaze_files(Invert(), tmp_path, tmp_path / "out", recursive=True, overwrite=True)
            assert summary.failures == ()
            assert files(tmp_path / "out") == ["a.png", "x/a.png", "y/a.png"]

    def test_suffix_and_extension(self, tmp_path: Path) -> None:
        save(tmp_path / "a.b.jpg", picture())
        dehaze_files(Invert(), tmp_path, tmp_path, suffix="_clear", extension="PNG")
        assert files(tmp_path) == ["a.b.jpg", "a.b_clear.png"]

    def test_unknown_extension_of_a_valid_file(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", picture()).rename(tmp_path / "a.photo")
        dehaze_files(Invert(), tmp_path / "a.photo", tmp_path / "out")
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture())

    def test_a_file_given_twice_is_one_job(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path / "a.png", picture())
        monkeypatch.chdir(tmp_path)
        assert len(dehaze_files(Invert(), ["a.png", tmp_path / "a.png", "."], tmp_path / "out").results) == 1

    def test_half_precision_runs_under_autocast(self, tmp_path: Path) -> None:
        class Reports(nn.Module):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                self.inner = F.conv2d(image, torch.eye(3)[..., None, None]).dtype
                return image

        model = Reports()
        save(tmp_path / "a.png", picture())
        assert dehaze_files(model, tmp_path / "a.png", tmp_path / "out", dtype=torch.bfloat16).failures == ()
        assert model.inner == torch.bfloat16
        dehaze_files(model, tmp_path / "a.png", tmp_path / "out", overwrite=True)
        assert model.inner == torch.float32


class TestFailures:
    def test_one_bad_file_does_not_stop_the_others(self, tmp_path: Path) -> None:
        class Picky(Invert):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                if image.shape[-1] == 13:
                    raise RuntimeError("13 is too [bold]wide[/bold]")
                if image.shape[-1] == 14:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().restore(image) / (image.shape[-1] != 15)

        for index, width in enumerate([12, 13, 14, 15, 16]):
            save(tmp_path / f"in/{index}.png", picture(width=width))
        (tmp_path / "in/5.png").touch()
        (tmp_path / "in/6.png").write_bytes((tmp_path / "in/0.png").read_bytes()[:100])
        save(tmp_path / "in/7.png", picture(channels=4)).rename(tmp_path / "in/7.jpg")
        save(tmp_path / "in/8.png", picture())
        summary = dehaze_files(Picky(), tmp_path / "in", tmp_path / "out")
        errors = {result.input.stem: result.error for result in summary.failures}
        assert set(errors) == {"1", "2", "3", "5", "6", "7"}
        assert errors["1"] == "13 is too [bold]wide[/bold]"
        assert errors["2"] == "out of memory; smaller tiles need less: CUDA out of memory"
        assert errors["3"] == f"rgb: {3 * 9 * 15} values are not finite"
        assert errors["5"] == f"{tmp_path / 'in/5.png'}: the file is empty"
        assert str(tmp_path / "in/6.png") in errors["6"]
        assert "7.jpg: JPEG holds no transparency" in errors["7"]
        assert files(tmp_path / "out") == ["0.png", "4.png", "8.png"]
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(summary)
        shown = console.export_text()
        assert "3 of 9 files" in shown
        assert "13 is too [bold]wide[/bold]" in shown
        assert "│ 12×9 │" in shown

    def test_existing_results_are_not_replaced(self, tmp_path: Path) -> None:
        source = save(tmp_path / "a.png", picture())
        save(tmp_path / "out/a.png", picture(seed=1))
        model = Invert()
        (failure,) = dehaze_files(model, source, tmp_path / "out").failures
        assert failure.error == f"{tmp_path / 'out/a.png'} exists; overwrite it, or choose another folder or suffix"
        assert model.seen == []
        assert np.array_equal(load(tmp_path / "out/a.png"), picture(seed=1))
        assert dehaze_files(model, source, tmp_path / "out", overwrite=True).failures == ()
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture())

    def test_wrong_shape_from_the_network(self, tmp_path: Path) -> None:
        class Half(nn.Module):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                return image[..., ::2]

        (failure,) = dehaze_files(Half(), save(tmp_path / "a.png", picture()), tmp_path / "out").failures
        assert failure.error == "the network gave [1, 3, 9, 6] for [1, 3, 9, 12]"

    @pytest.mark.parametrize("moment", ["network", "writing"])
    def test_interrupt_leaves_no_half_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        for name in ("a.png", "b.png"):
            save(tmp_path / f"in/{name}", picture())

        class Stops(Invert):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                if len(self.seen) == 1 and moment == "network":
                    raise KeyboardInterrupt
                return super().restore(image)

        model = Stops()
        whole = Image.Image.save

        def half(image: Image.Image, stream: io.BufferedWriter, *args: object, **options: object) -> None:
            if len(model.seen) == 2:
                stream.write(b"\x89PNG")
                raise KeyboardInterrupt
            whole(image, stream, *args, **options)

        if moment == "writing":
            monkeypatch.setattr(Image.Image, "save", half)
        with pytest.raises(KeyboardInterrupt):
            dehaze_files(model, tmp_path / "in", tmp_path / "out")
        assert files(tmp_path / "out") == ["a.png"]
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture())

    def test_a_broken_link_is_reported(self, tmp_path: Path) -> None:
        save(tmp_path / "in/a.png", picture())
        (tmp_path / "in/b.png").symlink_to("nowhere.png")
        (tmp_path / "in/c.png").symlink_to("c.png")
        summary = dehaze_files(Invert(), tmp_path / "in", tmp_path / "out")
        assert [result.input.name for result in summary.failures] == ["b.png", "c.png"]
        assert summary.failures[0].error == f"{tmp_path / 'in/b.png'}: no such file"
        assert files(tmp_path / "out") == ["a.png"]

    def test_long_paths_are_shown_whole(self, tmp_path: Path) -> None:
        name = "photograph-" * 12 + ".png"
        summary = dehaze_files(Invert(), save(tmp_path / name, picture()), tmp_path / "out")
        console = Console(width=60, file=io.StringIO())
        console.print(summary)
        rows = [line.split("│") for line in console.file.getvalue().splitlines() if line.count("│") == 5]
        assert "".join(row[1].strip() for row in rows) == str(tmp_path / name)
        assert "".join(row[4].strip() for row in rows) == str(tmp_path / "out" / name)


class TestRefusals:
    def refused(self, words: str, *arguments: object, **options: object) -> None:
        model = Invert()
        with pytest.raises(ValueError, match=words):
            dehaze_files(model, *arguments, **options)
        assert model.seen == []

    def test_missing_input(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", picture())
        self.refused("no file or folder .*none.png", [tmp_path / "a.png", tmp_path / "none.png"], tmp_path / "out")
        assert files(tmp_path) == ["a.png"]

    def test_no_input(self, tmp_path: Path) -> None:
        self.refused("inputs: no file or folder given", [], tmp_path / "out")

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "in/deeper").mkdir(parents=True)
        save(tmp_path / "in/deeper/a.png", picture())
        self.refused(r"the folder .*in has no file with any of \.png", tmp_path / "in", tmp_path / "out")

    def test_output_is_a_file(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", picture())
        self.refused(r"output_dir: .*a\.png is a file", path, path)

    def test_output_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, model = save(tmp_path / "a.png", picture()), Invert()
        with pytest.raises(NotADirectoryError):
            dehaze_files(model, source, source / "out")
        monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
        with pytest.raises(PermissionError, match=r"output_dir: .*out cannot be written to"):
            dehaze_files(model, source, tmp_path / "out")
        assert model.seen == []

    def test_network_that_restores_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="model: Identity restores no images"):
            dehaze_files(nn.Identity(), save(tmp_path / "a.png", picture()), tmp_path / "out")
        assert files(tmp_path) == ["a.png"]

    def test_two_results_of_one_name(self, tmp_path: Path) -> None:
        for name in ("x/a.png", "y/a.png", "z/a.jpg"):
            save(tmp_path / name, picture())
        both = r"x/a\.png and .*y/a\.png would both be written to .*out/a\.png"
        self.refused(both, [tmp_path / "x", tmp_path / "y"], tmp_path / "out")
        both = r"x/a\.png and .*z/a\.jpg would both be written to .*out/a\.webp"
        self.refused(both, [tmp_path / "x", tmp_path / "z"], tmp_path / "out", extension=".webp")
        assert len(dehaze_files(Invert(), [tmp_path / "x", tmp_path / "z"], tmp_path / "out").results) == 2

    def test_result_over_its_input(self, tmp_path: Path) -> None:
        source = save(tmp_path / "in/a.png", picture())
        self.refused(r"a\.png is an input; choose another folder or a suffix, or overwrite", source, tmp_path / "in")
        (tmp_path / "link").symlink_to(tmp_path / "in")
        self.refused(r"a\.png is an input", source, tmp_path / "link")
        assert dehaze_files(Invert(), source, tmp_path / "in", overwrite=True).failures == ()
        assert np.array_equal(load(source), 255 - picture())

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_result_over_another_input(self, tmp_path: Path, overwrite: bool) -> None:
        save(tmp_path / "a.png", picture())
        save(tmp_path / "a_b.png", picture())
        words = r"the result of .*a\.png would replace the input .*a_b\.png"
        self.refused(words, tmp_path, tmp_path, suffix="_b", overwrite=overwrite)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"extension": ".gif"}, r"extension: expected one of \.png, .*, got '\.gif'"),
            ({"suffix": "/../x"}, "suffix: expected part of a file name"),
            ({"suffix": "a\\b"}, "suffix: expected part of a file name"),
            ({"tile": 0}, "expected tile ≥ 1 and 0 ≤ overlap < tile, got 0 and 64"),
            ({"tile": 64, "overlap": 64}, "got 64 and 64"),
            ({"tile": 64, "overlap": -1}, "got 64 and -1"),
            ({"overlap": -1}, "got None and -1"),
            ({"tile": "large"}, "got large and 64"),
            ({"compare": True, "tile": None}, "compare: there is nothing to compare without tile"),
            ({"dtype": torch.int8}, "dtype: expected one of torch.float32, torch.bfloat16, torch.float16"),
            ({"device": "cuda:77"}, "device: cuda:77 cannot be used"),
        ],
    )
    def test_arguments(self, tmp_path: Path, options: dict[str, object], words: str) -> None:
        path = save(tmp_path / "a.png", picture())
        if options.get("device"):
            model = nn.Conv2d(1, 1, 1)
            with pytest.raises(ValueError, match=words):
                dehaze_files(model, path, tmp_path / "out", **options)
        else:
            self.refused(words, path, tmp_path / "out", **options)
        assert files(tmp_path) == ["a.png"]


class TestTiles:
    @pytest.mark.parametrize("size", [(50, 70), (20, 90), (90, 20), (33, 32), (65, 128)])
    @pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (32, 8), (32, 31), (33, 16)])
    def test_blending_keeps_what_pixels_decide_alone(self, size: tuple[int, int], tile: int, overlap: int) -> None:
        image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        windows = []

        def restoration(part: torch.Tensor) -> torch.Tensor:
            windows.append(tuple(part.shape[-2:]))
            return 1 - part

        result = restore_tiled(restoration, image, tile, overlap)
        # every window that covers a pixel adds one rounding to its two sums
        assert (result - (1 - image)).abs().max() <= torch.finfo(torch.float32).eps * (len(windows) + 1)
        assert set(windows) == {tuple(min(side, tile) for side in size)}
        counts = [1 if side <= tile else -(-(side - overlap) // (tile - overlap)) for side in size]
        assert len(windows) == counts[0] * counts[1]

    @pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (33, 16), (128, 64), (160, 64)])
    def test_tiles_share_64_pixels_or_half_of_one(self, tile: int, overlap: int) -> None:
        image = torch.rand(1, 3, 5, 2 * tile, generator=torch.Generator().manual_seed(0))
        default, told, other = (
            restore(Global(), image, device=CPU, tile=tile, **options)[0]
            for options in ({}, {"overlap": overlap}, {"overlap": overlap - 1 if overlap else None})
        )
        assert torch.equal(default, told)
        assert torch.equal(default, other) == (overlap == 0)

    def test_one_tile_is_the_full_frame(self) -> None:
        image = torch.rand(1, 3, 32, 20)
        assert torch.equal(restore_tiled(Global().restore, image, 32, 8), Global().restore(image))

    def test_weights_run_smoothly_from_tile_to_tile(self) -> None:
        # Each tile's result is its number, so the blend shows the weights.
        numbers = iter([0.0, 1.0])
        result = restore_tiled(lambda part: torch.full_like(part, next(numbers)), torch.zeros(1, 3, 4, 48), 32, 16)
        row = result[0, 0, 0].double()
        assert torch.equal(row[:16], torch.zeros(16).double())
        assert torch.equal(row[32:], torch.ones(16).double())
        t = (torch.arange(16).double() + 0.5) / 16
        smooth = t * t * (3 - 2 * t)
        assert row[16:32] == pytest.approx((smooth / (smooth + smooth.flip(0))).numpy(), abs=1e-6)
        assert (row.diff() >= 0).all()
        assert row.diff().max() < 0.1

    def test_report_of_the_deviation(self, tmp_path: Path) -> None:
        values = torch.linspace(0, 1, 64).expand(3, 8, 64)
        write_image(tmp_path / "a.png", values)
        options = {"tile": 32, "overlap": 0, "compare": True}
        (result,) = dehaze_files(Global(), tmp_path / "a.png", tmp_path / "out", **options).results
        image = read_image(tmp_path / "a.png").rgb
        halves = [image[..., :32].mean(), image[..., 32:].mean()]
        # half of the difference between each half's mean and the whole's, the same in every pixel of a half
        difference = [float((half - image.mean()).abs()) * 0.5 * 255 for half in halves]
        assert result.deviation.mean == pytest.approx(sum(difference) / 2, abs=1e-3)
        assert result.deviation.largest == pytest.approx(max(difference), abs=1e-3)
        (exact,) = dehaze_files(
            Invert(), tmp_path / "a.png", tmp_path / "same", tile=32, overlap=8, compare=True
        ).results
        assert exact.deviation == Deviation(pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-3))

    def test_full_frame_that_does_not_fit(self, tmp_path: Path) -> None:
        class Small(Invert):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                if image.shape[-1] > 32:
                    raise torch.OutOfMemoryError("only 32 columns fit")
                return super().restore(image)

        save(tmp_path / "a.png", picture(width=50))
        (result,) = dehaze_files(
            Small(), tmp_path / "a.png", tmp_path / "out", tile=32, overlap=8, compare=True
        ).results
        assert (result.error, result.deviation) == ("", None)
        assert result.notes == ("the full frame could not be computed: only 32 columns fit",)
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture(width=50))


class TestEnsemble:
    def test_mean_over_the_eight_symmetries(self) -> None:
        image = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
        model = Slanted()
        result, seconds = restore(model, image, device=CPU, self_ensemble=True)
        symmetries = [(flip, turns) for flip in (False, True) for turns in range(4)]
        results = []
        for flip, turns in symmetries:
            turned = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
            back = torch.rot90(model.restore(turned), -turns, (-2, -1))
            results.append(back.flip(-1) if flip else back)
        expected = torch.stack(results).mean(0)
        assert (result - expected).abs().max() < 1e-6
        assert (result - model.restore(image)).abs().max() > 0.1
        assert seconds > 0

    def test_equivariant_stand_in_is_unchanged(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", picture(40, 70))
        model = Invert()
        dehaze_files(model, tmp_path / "a.png", tmp_path / "out", self_ensemble=True, tile=32, overlap=8)
        assert np.array_equal(load(tmp_path / "out/a.png"), 255 - picture(40, 70))
        assert len(model.seen) == 8 * 2 * 3


class TestPlace:
    def test_where_the_network_is(self) -> None:
        assert place(nn.Linear(1, 1), None) == CPU
        assert place(nn.Linear(1, 1, device="meta"), None) == torch.device("meta")
        assert place(nn.ReLU(), None) == CPU

    def test_moves(self) -> None:
        model = nn.Linear(1, 1)
        assert place(model, "meta") == torch.device("meta")
        assert model.weight.device.type == "meta"
