"""Scores of restored images under the protocols by which dehazing networks are published, side by side.

    PSNR = 10 · log10(255² / mean (x − y)²)    on 8-bit values
    SSIM: mean over all windows that lie inside, 11×11 Gaussian, σ = 1.5, per channel

| protocol       | what is compared                                                                              |
|----------------|-----------------------------------------------------------------------------------------------|
| full-rgb       | the whole images                                                                              |
| mitnet-crop16  | hazy image and truth cut to multiples of 16 from the top left, the network run on what is left|
| dcmp-test      | the whole images; SSIM after adaptive average pooling by r = max(1, round(min(H, W) / 256))   |
| y-channel      | BT.601 luma, studio range: Y = 16 + 65.481·R + 128.553·G + 24.966·B                           |

Under every protocol the images are first clipped and rounded to 8 bits, as a saved file would be; so is the luma.
Layout: images [3, H, W] or [1, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from . import __version__, memory
from .data.files import atomic_write
from .data.images import decoder_versions
from .inference import check_restores, place, restore
from .losses.ssim import ssim

LUMA = (65.481, 128.553, 24.966)  # of [0, 1] channels, in 8-bit levels above 16


class Score(NamedTuple):
    """PSNR in dB (infinite for equal images) and SSIM."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Protocol:
    """A named way to compare a restored image with its truth.

    Args:
        name: what `PROTOCOLS` calls it.
        multiple: both the hazy image and the truth are cut to multiples of this from the top left.
        pooled_ssim: whether SSIM is taken after average pooling.
        luma: whether the luma alone is compared.
    """

    name: str
    multiple: int = 1
    pooled_ssim: bool = False
    luma: bool = False

    def cut(self, image: torch.Tensor) -> torch.Tensor:
        """The part of ``image`` [..., H, W] that this protocol looks at.

        Raises:
            ValueError: nothing is left.
        """
        height, width = (side - side % self.multiple for side in image.shape[-2:])
        if min(height, width) == 0:
            found = "×".join(map(str, image.shape[-2:]))
            raise ValueError(f"image: {self.name} needs at least {self.multiple}×{self.multiple} pixels, got {found}")
        return image[..., :height, :width]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("full-rgb"),
        Protocol("mitnet-crop16", multiple=16),
        Protocol("dcmp-test", pooled_ssim=True),
        Protocol("y-channel", luma=True),
    )
}


def psnr(restored: torch.Tensor, clear: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit rounded images.

    Args:
        restored: [..., H, W], any number of channels; clipped to [0, 1].
        clear: the same shape.

    Returns:
        dB; infinite where the rounded images are equal.

    Raises:
        ValueError: shapes differ, or values are not finite.
    """
    return _psnr(*_rounded(restored, clear))


def structural_similarity(restored: torch.Tensor, clear: torch.Tensor) -> float:
    """Mean structural similarity of 8-bit rounded images; computed in float64.

    Args:
        restored: [C, H, W] or [1, C, H, W], at least 11×11 pixels; clipped to [0, 1].
        clear: the same shape.

    Raises:
        ValueError: shapes differ, values are not finite, or the images are smaller than the window.

    Source: Wang et al., "Image quality assessment", TIP 2004.
    """
    return _ssim(*_rounded(restored, clear))


def score(restored: torch.Tensor, clear: torch.Tensor, protocol: str = "full-rgb") -> Score:
    """PSNR and SSIM under one of the named protocols.

    Args:
        restored: [3, H, W] or [1, 3, H, W]; clipped to [0, 1] and rounded to 8 bits.
        clear: the same shape.
        protocol: one of `PROTOCOLS`. What a protocol cuts off is cut off both images here; `evaluate` cuts the hazy
            image before the network sees it.

    Raises:
        ValueError: unknown protocol, shapes that differ, values that are not finite, or images too small.
    """
    rules = _protocol(protocol)
    images = _rounded(rules.cut(restored), rules.cut(clear))
    if rules.luma:
        images = tuple(_luma(image) for image in images)
    ratio = _psnr(*images)
    if rules.pooled_ssim:
        images = tuple(_pooled(image) for image in images)
    return Score(ratio, _ssim(*images))


@dataclass(frozen=True)
class ImageScores:
    """What the evaluation of one image found.

    Args:
        name: of the hazy image.
        height: pixels.
        width: pixels.
        seconds: the network's time for the first protocol's image.
        scores: by protocol; empty when it failed.
        error: why it failed, or "".
    """

    name: str
    height: int = 0
    width: int = 0
    seconds: float = math.nan
    scores: dict[str, Score] | None = None
    error: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set's images; `rich.print` shows them as a table.

    Args:
        images: one entry for each, in the set's order.
        protocols: names, in the order of the columns.
        versions: of the library, torch, Pillow and its decoders.
    """

    images: tuple[ImageScores, ...]
    protocols: tuple[str, ...]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[ImageScores, ...]:
        """The images that could not be scored."""
        return tuple(image for image in self.images if image.error)

    def mean(self, protocol: str) -> Score:
        """Mean PSNR and SSIM of the images that were scored; NaN where none was."""
        return Score(*(statistics.fmean(values) if values else math.nan for values in self._values(protocol)))

    def deviation(self, protocol: str) -> Score:
        """Sample standard deviation of PSNR and SSIM; NaN for fewer than two images or infinite values."""
        finite = [values if all(map(math.isfinite, values)) else [] for values in self._values(protocol)]
        return Score(*(statistics.stdev(values) if len(values) > 1 else math.nan for values in finite))

    def _values(self, protocol: str) -> list[list[float]]:
        scored = [image.scores[protocol] for image in self.images if image.scores]
        return [[each.psnr for each in scored], [each.ssim for each in scored]]

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Write one row per image, with the versions in every row; the file appears whole or not at all."""
        columns = [f"{protocol} {measure}" for protocol in self.protocols for measure in Score._fields]
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["name", "height", "width", "seconds", *columns, "error", *self.versions])
        for image in self.images:
            values = [value for name in self.protocols for value in (image.scores[name] if image.scores else ("", ""))]
            measured = ["", "", ""] if image.error else [image.height, image.width, f"{image.seconds:.6f}"]
            table.writerow([image.name, *measured, *values, image.error, *self.versions.values()])
        with atomic_write(path) as stream:
            stream.write(text.getvalue().encode("utf-8", "surrogateescape"))  # names as they are on disk

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()
        for image in self.failures:
            yield Text(f"failed: {image.name}: {image.error}", "red")

    def render(self) -> Group:
        """Table of the means and standard deviations, and the versions."""
        scored = len(self.images) - len(self.failures)
        table = Table("protocol", "PSNR / dB", "SSIM")
        for name in self.protocols:
            values = zip(self.mean(name), self.deviation(name), (2, 4), strict=True)
            table.add_row(name, *(_with_deviation(*value) for value in values))
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return Group(
            table,
            Text(f"mean ± standard deviation of {scored} of {len(self.images)} images"),
            Text(versions, "dim"),
        )


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    protocols: Sequence[str] = tuple(PROTOCOLS),
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    csv_path: str | PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Restore every hazy image of a set and score it; an image that fails does not stop the others.

    Args:
        model: a network with ``restore(image [1, 3, H, W]) -> [1, 3, H, W]``.
        dataset: whole images, as `PairedImages` without ``patch`` gives: ``len(dataset)``, ``dataset.name(index)``
            and items with "hazy" and "clear" [3, H, W].
        protocols: names of `PROTOCOLS`.
        device: where the network runs, it is moved there; None: where it is.
        dtype: float32, or the half precision of autocast.
        csv_path: where to write the scores of each image, or None.
        progress: called with the number of images done and of all.

    Raises:
        ValueError: unknown protocol, or none; a network that restores no images.
        OSError: the CSV cannot be written; where its folder shows that, before the first image.
    """
    check_restores(model)
    rules = [_protocol(name) for name in protocols]
    if not rules:
        raise ValueError(f"protocols: expected at least one of {', '.join(PROTOCOLS)}")
    if csv_path is not None:
        check_csv_path(Path(csv_path))
    device = place(model, device)
    images = []
    for index in range(len(dataset)):
        name = dataset.name(index)
        try:
            images.append(_evaluate_image(model, dataset[index], name, rules, device, dtype))
        except Exception as error:  # whatever one image meets, the others are still worth scoring
            images.append(ImageScores(name, error=str(error) or type(error).__name__))
        if progress:
            progress(index + 1, len(dataset))
    versions = {
        "mitnet-fast": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "decoder": decoder_versions(),
    }
    evaluation = Evaluation(tuple(images), tuple(protocols), versions)
    if csv_path is not None:
        evaluation.write_csv(csv_path)
    return evaluation


def _evaluate_image(
    model: nn.Module,
    item: dict[str, torch.Tensor],
    name: str,
    rules: Sequence[Protocol],
    device: torch.device,
    dtype: torch.dtype,
) -> ImageScores:
    hazy, clear = item["hazy"][None], item["clear"][None]
    restored: dict[torch.Size, torch.Tensor] = {}
    seconds = []
    scores = {}
    for rule in rules:
        seen = rule.cut(hazy)
        if seen.shape not in restored:
            _check_memory(model, seen, device, dtype)
            result, elapsed = restore(model, seen, device=device, dtype=dtype)
            restored[seen.shape] = result.to(device)
            seconds.append(elapsed)
        scores[rule.name] = score(restored[seen.shape], rule.cut(clear), rule.name)
    return ImageScores(name, *hazy.shape[-2:], seconds[0], scores)


def _with_deviation(mean: float, deviation: float, digits: int) -> str:
    """Both numbers, or the mean alone where there is no deviation."""
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _check_memory(model: nn.Module, image: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Raise MemoryError where the system would end the process instead: on the CPU. Tiles have other scores."""
    if device.type != "cpu":
        return
    per_pixel, free = memory.bytes_per_pixel(model, device, dtype), memory.free_bytes(device)
    height, width = image.shape[-2:]
    if None not in (per_pixel, free) and per_pixel * height * width > memory.SHARE * free:
        raise MemoryError(
            f"restoring {width}×{height} pixels as a whole needs {memory.in_words(per_pixel * height * width)}, "
            f"{memory.in_words(free)} are free"
        )


def check_csv_path(path: Path) -> None:
    """Raise OSError before hours of work where `Evaluation.write_csv` would raise it after them."""
    if path.is_dir():
        raise IsADirectoryError(f"csv_path: {path} is a folder, expected a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"csv_path: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"csv_path: the folder {path.parent} cannot be written to")


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def _rounded(restored: torch.Tensor, clear: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both images in 8-bit levels, float64, on the restored one's device if that has the type."""
    if restored.shape != clear.shape or restored.numel() == 0:
        raise ValueError(f"restored: expected the shape of clear {list(clear.shape)}, got {list(restored.shape)}")
    for name, image in (("restored", restored), ("clear", clear)):
        if not torch.isfinite(image).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(image)).sum())} values are not finite")
    first, second = (
        image.detach().to("cpu", torch.float64).clamp(0, 1).mul(255).round() for image in (restored, clear)
    )
    return first, second


def _luma(levels: torch.Tensor) -> torch.Tensor:
    """Luma [..., 1, H, W] in 8-bit levels of an image [..., 3, H, W]; computed and rounded as MATLAB's rgb2ycbcr."""
    weights = levels.new_tensor(LUMA).view(3, 1, 1) / 255
    return (16 + (levels * weights).sum(-3, keepdim=True)).round()


def _pooled(levels: torch.Tensor) -> torch.Tensor:
    height, width = levels.shape[-2:]
    factor = max(1, round(min(height, width) / 256))
    return F.adaptive_avg_pool2d(levels, (height // factor, width // factor))


def _psnr(restored: torch.Tensor, clear: torch.Tensor) -> float:
    error = float((restored - clear).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _ssim(restored: torch.Tensor, clear: torch.Tensor) -> float:
    first, second = (image if image.ndim == 4 else image[None] for image in (restored, clear))
    return float(ssim(first, second, data_range=255, padding="valid").mean())
