"""Scores against scikit-image and hand calculation, the protocols' rules, and sets with images that fail."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio
from skimage.metrics import structural_similarity as skimage_ssim
from torch import nn

from mitnet_fast import __version__
from mitnet_fast.data import PairedImages
from mitnet_fast.evaluation import (
    PROTOCOLS,
    Evaluation,
    ImageScores,
    Score,
    evaluate,
    psnr,
    score,
    structural_similarity,
)


def random_pair(height: int, width: int, seed: int = 0, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clear = F.avg_pool2d(torch.rand(1, 3, height + 4, width + 4, generator=generator), 5, 1)[0]
    return clear + noise * torch.randn(3, height, width, generator=generator), clear


def levels(image: torch.Tensor) -> np.ndarray:
    return np.rint(np.clip(image.double().numpy(), 0, 1) * 255).transpose(1, 2, 0)


def by_skimage(restored: np.ndarray, clear: np.ndarray) -> float:
    return skimage_ssim(
        restored,
        clear,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )


def pooled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean over rows floor(i·H/h) to ceil((i+1)·H/h), and columns alike."""
    for axis, count in ((0, height), (1, width)):
        side = image.shape[axis]
        bins = [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
        image = np.stack([image.take(part, axis).mean(axis) for part in bins], axis)
    return image


class Darken(nn.Module):
    """A stand-in that looks at the whole image, as the networks do; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(image.shape[-2:]))
        return image * 0.9 + 0.1 * image.mean()


class TestMeasures:
    @pytest.mark.parametrize(("height", "width"), [(11, 11), (40, 57), (128, 96)])
    @pytest.mark.parametrize("noise", [0.01, 0.3])
    def test_agree_with_scikit_image(self, height: int, width: int, noise: float) -> None:
        restored, clear = random_pair(height, width, noise=noise)
        expected = levels(restored), levels(clear)
        assert psnr(restored, clear) == pytest.approx(peak_signal_noise_ratio(*expected, data_range=255), abs=1e-9)
        assert structural_similarity(restored, clear) == pytest.approx(by_skimage(*expected), abs=1e-9)
        assert structural_similarity(restored[None], clear[None]) == structural_similarity(restored, clear)

    def test_values_are_rounded_to_8_bits(self) -> None:
        clear = torch.full((3, 16, 16), 100 / 255)
        assert psnr(clear + 0.49 / 255, clear) == math.inf
        assert psnr(clear + 0.51 / 255, clear) == pytest.approx(20 * math.log10(255))
        assert psnr(torch.full_like(clear, 1.3), torch.ones_like(clear)) == math.inf

    def test_equal_images(self) -> None:
        _, clear = random_pair(20, 20)
        assert score(clear, clear) == Score(math.inf, 1.0)

    @pytest.mark.parametrize("measure", [psnr, structural_similarity, score])
    def test_refusals(self, measure: object) -> None:
        restored, clear = random_pair(20, 20)
        with pytest.raises(ValueError, match=r"restored: expected the shape of clear \[3, 20, 20\], got \[3, 20, 19\]"):
            measure(restored[..., :-1], clear)
        restored[0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="restored: 1 values are not finite"):
            measure(restored, clear)
        with pytest.raises(ValueError, match="clear: 1 values are not finite"):
            measure(clear, restored)

    def test_too_small_for_the_window(self) -> None:
        with pytest.raises(ValueError, match="11×11"):
            structural_similarity(*random_pair(10, 20))


class TestProtocols:
    def test_names(self) -> None:
        assert list(PROTOCOLS) == ["full-rgb", "mitnet-crop16", "dcmp-test", "y-channel"]

    def test_full_rgb(self) -> None:
        restored, clear = random_pair(30, 41)
        assert score(restored, clear) == Score(psnr(restored, clear), structural_similarity(restored, clear))

    def test_crop16_keeps_the_top_left(self) -> None:
        restored, clear = random_pair(47, 61)
        expected = score(restored[:, :32, :48], clear[:, :32, :48])
        assert score(restored, clear, "mitnet-crop16") == expected != score(restored, clear)
        assert PROTOCOLS["mitnet-crop16"].cut(torch.empty(1, 3, 460, 620)).shape == (1, 3, 448, 608)
        with pytest.raises(ValueError, match="mitnet-crop16 needs at least 16×16 pixels, got 15×40"):
            score(*random_pair(15, 40), "mitnet-crop16")

    @pytest.mark.parametrize(("height", "width", "factor"), [(60, 90, 1), (383, 390, 1), (385, 400, 2), (384, 384, 2)])
    def test_dcmp_pools_before_ssim(self, height: int, width: int, factor: int) -> None:
        restored, clear = random_pair(height, width, noise=0.2)
        small = [pooled(levels(image), height // factor, width // factor) for image in (restored, clear)]
        result = score(restored, clear, "dcmp-test")
        assert result.psnr == psnr(restored, clear)
        assert result.ssim == pytest.approx(by_skimage(*small), abs=1e-9)

    def test_luma(self) -> None:
        restored, clear = random_pair(40, 50)
        y = [
            np.rint(16 + (levels(image) / 255 * [65.481, 128.553, 24.966]).sum(axis=2, keepdims=True))
            for image in (restored, clear)
        ]
        result = score(restored, clear, "y-channel")
        assert result.psnr == pytest.approx(peak_signal_noise_ratio(*y, data_range=255), abs=1e-9)
        assert result.ssim == pytest.approx(by_skimage(*y), abs=1e-9)

    def test_studio_range(self) -> None:
        black, white = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
        assert score(white, black, "y-channel").psnr == pytest.approx(20 * math.log10(255 / 219), abs=1e-9)

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"protocol: expected one of full-rgb, .*, got 'ntire'"):
            score(*random_pair(20, 20), "ntire")


class TestEvaluate:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> PairedImages:
        for index, (height, width) in enumerate([(32, 48), (37, 50), (40, 33)]):
            hazy, clear = random_pair(height, width, index)
            for folder, image in (("hazy", hazy), ("GT", clear)):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.fromarray(levels(image).astype(np.uint8)).save(tmp_path / folder / f"{index}.png")
        return PairedImages(tmp_path)

    def test_scores(self, dataset: PairedImages) -> None:
        model, done = Darken(), []
        result = evaluate(model, dataset, progress=lambda *counts: done.append(counts))
        assert done == [(1, 3), (2, 3), (3, 3)]
        assert result.failures == ()
        assert [image.name for image in result.images] == ["hazy/0.png", "hazy/1.png", "hazy/2.png"]
        for index, image in enumerate(result.images):
            hazy, clear = dataset[index]["hazy"], dataset[index]["clear"]
            assert (image.height, image.width) == tuple(hazy.shape[-2:])
            restored = Darken().restore(hazy)
            for name in ("full-rgb", "dcmp-test", "y-channel"):
                assert image.scores[name] == score(restored, clear, name)
            cut = [PROTOCOLS["mitnet-crop16"].cut(each) for each in (hazy, clear)]
            assert image.scores["mitnet-crop16"] == score(Darken().restore(cut[0]), cut[1])
            assert image.seconds > 0
        # the network sees each size once: whole images, and the cut ones where that is another size
        assert model.sizes == [(32, 48), (37, 50), (32, 48), (40, 33), (32, 32)]

    def test_means_and_deviations(self, dataset: PairedImages) -> None:
        result = evaluate(Darken(), dataset)
        for name in PROTOCOLS:
            values = np.array([image.scores[name] for image in result.images])
            assert tuple(result.mean(name)) == pytest.approx(values.mean(0))
            assert tuple(result.deviation(name)) == pytest.approx(values.std(0, ddof=1))

    def test_csv(self, dataset: PairedImages, tmp_path: Path) -> None:
        (tmp_path / "hazy/1.png").write_bytes(b"damaged, after the set was checked")
        result = evaluate(Darken(), dataset, protocols=["full-rgb", "y-channel"], csv_path=tmp_path / "scores.csv")
        with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert list(rows[0]) == [
            "name", "height", "width", "seconds", "full-rgb psnr", "full-rgb ssim", "y-channel psnr", "y-channel ssim",
            "error", "mitnet-fast", "torch", "pillow", "decoder",
        ]  # fmt: skip
        assert [row["name"] for row in rows] == ["hazy/0.png", "hazy/1.png", "hazy/2.png"]
        for row, image in zip(rows, result.images, strict=True):
            assert (row["mitnet-fast"], row["torch"], row["pillow"]) == (
                __version__, torch.__version__, PIL.__version__,
            )  # fmt: skip
            assert "zlib" in row["decoder"]
            if image.scores:
                assert float(row["full-rgb psnr"]) == image.scores["full-rgb"].psnr
                assert float(row["y-channel ssim"]) == image.scores["y-channel"].ssim
                assert (row["height"], row["width"], row["error"]) == (str(image.height), str(image.width), "")
        assert (rows[1]["full-rgb psnr"], rows[1]["height"]) == ("", "")
        assert "not an image" in rows[1]["error"]
        assert list(tmp_path.glob(".*")) == []

    def test_a_failure_does_not_stop_the_others(self, dataset: PairedImages) -> None:
        class Picky(nn.Module):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                if image.shape[-1] == 50:
                    raise RuntimeError("50 is too wide [bold]")
                return image / 0 if image.shape[-1] == 33 else image

        result = evaluate(Picky(), dataset, protocols=["full-rgb"])
        assert [(image.name, image.error) for image in result.failures] == [
            ("hazy/1.png", "50 is too wide [bold]"),
            ("hazy/2.png", "restored: 3960 values are not finite"),
        ]
        item = dataset[0]
        assert result.mean("full-rgb") == score(item["hazy"], item["clear"])
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(result)
        shown = console.export_text()
        assert "failed: hazy/1.png: 50 is too wide [bold]" in shown
        assert "1 of 3 images" in shown

    def test_wrong_result_shape(self, dataset: PairedImages) -> None:
        class Half(nn.Module):
            def restore(self, image: torch.Tensor) -> torch.Tensor:
                return image[..., ::2]

        errors = [image.error for image in evaluate(Half(), dataset).failures]
        assert errors[0] == "the network gave [1, 3, 32, 24] for [1, 3, 32, 48]"
        assert len(errors) == 3

    def test_interrupt_is_passed_on(self, dataset: PairedImages, tmp_path: Path) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(Darken(), dataset, progress=stop, csv_path=tmp_path / "scores.csv")
        assert not (tmp_path / "scores.csv").exists()

    def test_names_that_are_not_unicode(self, tmp_path: Path) -> None:
        name = os.fsdecode(b"hazy/caf\xe9.png")
        Evaluation((ImageScores(name, error="damaged"),), ("full-rgb",), {}).write_csv(tmp_path / "scores.csv")
        assert b"\nhazy/caf\xe9.png," in (tmp_path / "scores.csv").read_bytes()

    def test_a_csv_that_cannot_be_written_is_found_before_the_work(
        self, dataset: PairedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Darken()
        with pytest.raises(FileNotFoundError, match=r"csv_path: there is no folder .*missing"):
            evaluate(model, dataset, csv_path=tmp_path / "missing/scores.csv")
        with pytest.raises(IsADirectoryError, match=r"csv_path: .* is a folder"):
            evaluate(model, dataset, csv_path=tmp_path)
        monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
        with pytest.raises(PermissionError, match=r"csv_path: .* cannot be written to"):
            evaluate(model, dataset, csv_path=tmp_path / "scores.csv")
        assert model.sizes == []

    def test_network_that_restores_nothing(self, dataset: PairedImages) -> None:
        with pytest.raises(ValueError, match="model: Identity restores no images"):
            evaluate(nn.Identity(), dataset)

    @pytest.mark.parametrize(
        ("protocols", "words"), [(["psnr"], "protocol: expected one of"), ([], "protocols: expected at least one")]
    )
    def test_bad_protocols(self, dataset: PairedImages, protocols: list[str], words: str) -> None:
        model = Darken()
        with pytest.raises(ValueError, match=words):
            evaluate(model, dataset, protocols=protocols)
        assert model.sizes == []


class TestTable:
    def show(self, *scores: Score) -> str:
        images = tuple(ImageScores(str(i), 16, 16, 0.1, {"full-rgb": each}) for i, each in enumerate(scores))
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(Evaluation(images, ("full-rgb",), {"torch": "2"}))
        return console.export_text()

    def test_mean_and_deviation(self) -> None:
        assert "│ full-rgb │ 22.00 ± 2.83 │ 0.8000 ± 0.1414 │" in self.show(Score(20, 0.7), Score(24, 0.9))

    def test_equal_images_make_the_mean_infinite(self) -> None:
        assert "│ full-rgb │ inf       │ 0.7500 ± 0.3536 │" in self.show(Score(math.inf, 1), Score(20, 0.5))

    def test_one_or_no_image(self) -> None:
        assert "│ full-rgb │ 20.00     │ 0.5000 │" in self.show(Score(20, 0.5))
        assert "│ full-rgb │ nan       │ nan  │" in self.show()
