"""Dehazing files: photographs of any size in, restored ones out, transparency and 16 bits kept.

Both networks look at the whole image, so tiles are never exact. They overlap and are blended,

    y = Σ wᵢ · yᵢ / Σ wᵢ,    w = s(min(1, distance to the tile's edge / overlap)) on each axis, s(t) = t²·(3 − 2·t),

and the deviation from the full frame can be reported. An image whose restoration would not fit into memory
(:mod:`mitnet_fast.memory`) is restored in tiles by itself, and says so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from . import memory
from .data.images import EXTENSIONS, check_writable, read_image, read_size, write_image

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AUTO = "auto"
OVERLAP = 64  # pixels that neighbouring tiles share, where that is not more than half of one
CPU = torch.device("cpu")

Restoration = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Deviation:
    """How far a tiled result is from that of the full frame, in 8-bit levels.

    Args:
        mean: mean absolute difference.
        largest: largest absolute difference.
    """

    mean: float
    largest: float


@dataclass(frozen=True)
class FileResult:
    """What became of one file.

    Args:
        input: the file read.
        output: the file written, or that would have been.
        error: why there is none, or "".
        seconds: the network's time.
        height: pixels.
        width: pixels.
        deviation: of the tiled result from the full frame, where asked for and possible.
        notes: what else there is to know, such as frames left out.
    """

    input: Path
    output: Path
    error: str = ""
    seconds: float = math.nan
    height: int = 0
    width: int = 0
    deviation: Deviation | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What became of all files, in order; `rich.print` shows it as a table.

    Args:
        results: one for each file.
        seconds: from the first file's start to the last one's end.
    """

    results: tuple[FileResult, ...]
    seconds: float

    @property
    def failures(self) -> tuple[FileResult, ...]:
        """The files that could not be restored."""
        return tuple(result for result in self.results if result.error)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()

    def render(self) -> Table:
        """Table of the files with sizes, times, deviations and errors."""
        done = len(self.results) - len(self.failures)
        file, result = Column("file", overflow="fold"), Column("result", overflow="fold")
        table = Table(file, "size", "network / s", result, title=f"{done} of {len(self.results)} files")
        table.caption = f"{self.seconds:.1f} s in all"
        for result in self.results:
            if result.error:
                table.add_row(Text(str(result.input)), "", "", Text(result.error, "red"))
                continue
            lines = [str(result.output), *result.notes]
            if result.deviation:
                mean, largest = result.deviation.mean, result.deviation.largest
                lines.append(f"tiles differ by {mean:.2f} levels of 255 on average, {largest:.1f} at most")
            size = f"{result.width}×{result.height}"
            table.add_row(Text(str(result.input)), size, f"{result.seconds:.2f}", Text("\n".join(lines)))
        return table


def dehaze_files(
    model: nn.Module,
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    output_dir: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    recursive: bool = False,
    suffix: str = "",
    extension: str | None = None,
    tile: int | Literal["auto"] | None = AUTO,
    overlap: int | None = None,
    compare: bool = False,
    self_ensemble: bool = False,
    progress: Callable[[int, int, FileResult], None] | None = None,
) -> Summary:
    """Restore image files and the images of folders; a file that fails does not stop the others.

    Every result is written under its input's name, in the same bit depth and with the same transparency and colour
    profile, and appears whole or not at all.

    Args:
        model: a network with ``restore(image [1, 3, H, W]) -> [1, 3, H, W]``, images in [0, 1].
        inputs: files, whatever their extension, and folders, of which the images are taken.
        output_dir: where the results go; made if missing.
        device: where the network runs, it is moved there; None: where it is.
        dtype: float32, or the half precision of autocast.
        overwrite: replace files that exist, the inputs themselves included.
        recursive: take images from folders within folders too; results lie in folders of the same names.
        suffix: added to every result's stem.
        extension: of the results, such as ".png"; None keeps each input's, or ".png" where that names no format.
        tile: largest side of the windows to restore one by one, pixels; None restores whole images, "auto" those that
            fit into memory, and others in the largest tiles that do.
        overlap: least overlap of neighbouring tiles, pixels, below ``tile``; None: 64, or half of smaller tiles.
        compare: also restore the full frame, or as much of its middle as fits into memory, and report how far the
            tiles are from it.
        self_ensemble: mean over the eight flips and transpositions of each image: eight times the work.
        progress: called with the number of files done, of all, and the last one's result.

    Returns:
        What became of every file.

    Raises:
        ValueError: an argument outside what is allowed, a network that restores no images, no or missing inputs, a
            folder without images, results that would have the same name or replace an input; nothing has been written
            then.
        OSError: ``output_dir`` cannot be made or written to.
    """
    check_tiling(None if tile == AUTO else tile, _overlap(tile, overlap))
    check_dtype(dtype)
    if compare and tile is None:
        raise ValueError("compare: there is nothing to compare without tile")
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file")
    jobs = _plan(inputs, output_dir, suffix, extension, recursive, overwrite)
    place_of_model = place(model, device)
    check_restores(model)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(output_dir, os.W_OK):
        raise PermissionError(f"output_dir: {output_dir} cannot be written to")
    run = partial(restore, model, device=place_of_model, dtype=dtype, overlap=overlap, self_ensemble=self_ensemble)
    largest_tile = partial(_largest_tile, memory.bytes_per_pixel(model, place_of_model, dtype), place_of_model)
    started = time.perf_counter()
    results = []
    for source, target in jobs:
        try:
            if target.exists() and not overwrite:
                raise FileExistsError(f"{target} exists; overwrite it, or choose another folder or suffix")
            result = _dehaze_file(run, largest_tile, source, target, tile, overlap, compare)
        except Exception as error:  # whatever one file meets, the others are still worth restoring
            advice = "out of memory; smaller tiles need less: " if _is_out_of_memory(error) else ""
            result = FileResult(source, target, advice + (str(error) or type(error).__name__))
        results.append(result)
        if progress:
            progress(len(results), len(jobs), result)
    return Summary(tuple(results), time.perf_counter() - started)


def restore(
    model: nn.Module,
    image: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    overlap: int | None = None,
    self_ensemble: bool = False,
) -> tuple[torch.Tensor, float]:
    """Restore one image with a network that is where `place` put it.

    Args:
        model: a network with ``restore(image)``.
        image: float32 [B, 3, H, W] in [0, 1], on any device.
        device: where the network is.
        dtype: float32, or the half precision of autocast.
        tile: largest side of the windows, pixels; None restores the whole image at once.
        overlap: least overlap of neighbouring tiles, pixels, below ``tile``; None: 64, or half of smaller tiles.
        self_ensemble: mean over the eight flips and transpositions.

    Returns:
        The result, float32 like ``image`` but on the CPU, not clipped, and the seconds it took.

    Raises:
        ValueError: an argument outside what is allowed, or a network whose result has another shape.
    """
    overlap = _overlap(tile, overlap)
    check_tiling(tile, overlap)
    check_dtype(dtype)

    def whole(part: torch.Tensor) -> torch.Tensor:
        result = model.restore(part)
        if result.shape != part.shape:
            raise ValueError(f"the network gave {list(result.shape)} for {list(part.shape)}")
        return result.float()

    def tiled(part: torch.Tensor) -> torch.Tensor:
        return whole(part) if tile is None else restore_tiled(whole, part, tile, overlap)

    started = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        moved = image.to(device)
        result = (_ensemble(tiled, moved) if self_ensemble else tiled(moved)).cpu()
    return result, time.perf_counter() - started


def restore_tiled(restoration: Restoration, image: torch.Tensor, tile: int, overlap: int) -> torch.Tensor:
    """Restore an image window by window and blend the results.

    Args:
        restoration: maps [B, 3, h, w] to the same shape.
        image: [B, 3, H, W].
        tile: largest side of the windows, pixels.
        overlap: least overlap of neighbouring windows, pixels, below ``tile``.

    Returns:
        [B, 3, H, W]; exactly the restoration of the full frame where that fits into one tile.

    Raises:
        ValueError: ``tile`` or ``overlap`` outside what is allowed.
    """
    check_tiling(tile, overlap)
    rows, columns = (window_starts(side, tile, overlap) for side in image.shape[-2:])
    if len(rows) == len(columns) == 1:
        return restoration(image)
    height, width = (min(side, tile) for side in image.shape[-2:])
    weight = _ramp(height, overlap)[:, None] * _ramp(width, overlap)
    weight = weight.to(device=image.device, dtype=image.dtype)
    total, result = torch.zeros_like(image[:1, :1]), torch.zeros_like(image)
    for top in rows:
        for left in columns:
            window = (..., slice(top, top + height), slice(left, left + width))
            result[window] += restoration(image[window].contiguous()) * weight
            total[window] += weight
    return result / total


def place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Move a network to a device, or find out where it is.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return next((value.device for value in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch raises either for a backend that it lacks
        raise ValueError(f"device: {device} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def check_restores(model: nn.Module) -> None:
    """Raise ValueError unless a network restores images; a depth network, for one, does not."""
    if not callable(getattr(model, "restore", None)):
        raise ValueError(f"model: {type(model).__name__} restores no images, expected a network with restore(image)")


def check_tiling(tile: int | None, overlap: int) -> None:
    """Raise ValueError unless ``tile`` is None or at least 1, and ``overlap`` below it and not negative."""
    fits = tile is None or (isinstance(tile, int) and tile >= 1 and overlap < tile)
    if not fits or overlap < 0:
        raise ValueError(f"tile and overlap: expected tile ≥ 1 and 0 ≤ overlap < tile, got {tile} and {overlap}")


def _overlap(tile: int | str | None, overlap: int | None) -> int:
    """The overlap that was asked for, or that of the tile."""
    if overlap is not None:
        return overlap
    return min(OVERLAP, tile // 2) if isinstance(tile, int) and tile > 0 else OVERLAP


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless networks can run in ``dtype``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _dehaze_file(
    run: Callable[..., tuple[torch.Tensor, float]],
    largest_tile: Callable[[tuple[int, int]], int | None],
    source: Path,
    target: Path,
    tile: int | str | None,
    overlap: int | None,
    compare: bool,
) -> FileResult:
    size = read_size(source)
    _check_files_fit(size)
    image = read_image(source)
    check_writable(target, alpha=image.alpha is not None, bits=image.bits)
    hazy, deviation = image.rgb[None], None
    notes = [*image.notes]
    fits = largest_tile(size) if tile == AUTO or compare else None
    restored, seconds, used = _restored(run, hazy, fits if tile == AUTO else tile, overlap, tile == AUTO)
    if tile == AUTO and used is not None:
        notes.append(f"does not fit into memory as a whole: restored in tiles of {used} pixels")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(target, restored[0], image.alpha, image.bits, image.icc_profile)
    if compare and used is not None:
        try:
            if fits is not None:
                hazy, used = _sample(hazy, fits, used, overlap)
                size = "×".join(map(str, hazy.shape[-2:]))
                notes.append(f"compared in tiles of {used} pixels on the middle {size}, which fits into memory")
                restored = run(hazy, tile=used)[0]
            difference = (restored - run(hazy, tile=None)[0]).abs() * 255
            deviation = Deviation(float(difference.mean()), float(difference.max()))
        except (RuntimeError, MemoryError) as error:  # most likely the memory that the tiles were to save
            notes.append(f"the full frame could not be computed: {error}")
    return FileResult(source, target, "", seconds, *image.rgb.shape[-2:], deviation, tuple(notes))


def _sample(hazy: torch.Tensor, fits: int, tile: int, overlap: int | None) -> tuple[torch.Tensor, int]:
    """The largest square in the middle that can be restored whole, and tiles that are smaller than it."""
    side = min(fits, *hazy.shape[-2:])
    rows, columns = (slice((length - side) // 2, (length + side) // 2) for length in hazy.shape[-2:])
    return hazy[..., rows, columns], tile if tile < side else max(side // 2, _overlap(side // 2, overlap) + 1)


def _restored(
    run: Callable[..., tuple[torch.Tensor, float]],
    hazy: torch.Tensor,
    tile: int | None,
    overlap: int | None,
    adapt: bool,
) -> tuple[torch.Tensor, float, int | None]:
    """Result, seconds and tile; ``adapt`` takes ever smaller tiles where the device's memory ends after all."""
    while True:
        if adapt and tile is not None and tile <= _overlap(tile, overlap):
            raise MemoryError(f"tiles of {tile} pixels fit, which is not above the overlap of {overlap}")
        try:
            return *run(hazy, tile=tile), tile
        except torch.OutOfMemoryError:
            smaller = (tile or max(hazy.shape[-2:])) // 2 // 64 * 64
            if not adapt or smaller < memory.SMALLEST_TILE:
                raise
        tile = smaller


def _check_files_fit(size: tuple[int, int]) -> None:
    """Raise MemoryError if not even the image (width, height) itself fits into memory; before it is decoded."""
    needed, free = memory.MEASURED["files"] * size[0] * size[1], memory.free_bytes(CPU)
    if free is not None and needed > memory.SHARE * free:
        raise MemoryError(
            f"{size[0]}×{size[1]} pixels need {memory.in_words(needed)} to be read and written, "
            f"{memory.in_words(free)} are free"
        )


def _largest_tile(per_pixel: float | None, device: torch.device, size: tuple[int, int]) -> int | None:
    """None for an image that can be restored whole, else the side of the largest tile that fits into memory.

    Args:
        per_pixel: bytes that the network needs, or None where that is not known.
        device: where it runs.
        size: width and height.

    Raises:
        MemoryError: not even the smallest tile fits.
    """
    pixels, free = size[0] * size[1], memory.free_bytes(device)
    if per_pixel is None or free is None:
        return None
    if device.type == "cpu":
        free = max(0, free - memory.MEASURED["files"] * pixels)
    return None if per_pixel * pixels <= memory.SHARE * free else memory.largest_tile(per_pixel, free)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _ensemble(restoration: Restoration, image: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(image)
    for transpose in (False, True):
        turned = image.transpose(-2, -1) if transpose else image
        for axes in ((), (-1,), (-2,), (-2, -1)):
            result = restoration(turned.flip(axes).contiguous()).flip(axes)
            total += result.transpose(-2, -1) if transpose else result
    return total / 8


def window_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of evenly spread windows that cover ``side`` and overlap by at least ``overlap``."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [i * (side - tile) // (count - 1) for i in range(count)]


def _ramp(length: int, overlap: int) -> torch.Tensor:
    if overlap == 0:
        return torch.ones(length)
    position = torch.arange(length) + 0.5
    edge = (torch.minimum(position, length - position) / overlap).clamp(max=1)
    return edge * edge * (3 - 2 * edge)


def _plan(
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    output_dir: Path,
    suffix: str,
    extension: str | None,
    recursive: bool,
    overwrite: bool,
) -> list[tuple[Path, Path]]:
    """Every input file with its output file."""
    if extension is not None:
        extension = "." + extension.lower().removeprefix(".")
        if extension not in EXTENSIONS:
            raise ValueError(f"extension: expected one of {', '.join(EXTENSIONS)}, got {extension!r}")
    if suffix != "" and (Path(suffix).name != suffix or "\\" in suffix):
        raise ValueError(f"suffix: expected part of a file name, got {suffix!r}")
    given = [inputs] if isinstance(inputs, str | PathLike) else list(inputs)
    if not given:
        raise ValueError("inputs: no file or folder given")
    jobs: dict[Path, tuple[Path, Path]] = {}  # by absolute path: a file given twice is one job
    for path in map(Path, given):
        for source, folder in _files_of(path, output_dir, recursive):
            ending = extension or (source.suffix if source.suffix.lower() in EXTENSIONS else ".png")
            target = output_dir / folder / f"{source.stem}{suffix}{ending}"
            jobs.setdefault(Path(os.path.abspath(source)), (source, target))
    _check_targets(list(jobs.values()), overwrite)
    return list(jobs.values())


def _files_of(path: Path, output_dir: Path, recursive: bool) -> Sequence[tuple[Path, Path]]:
    """The image files that an input stands for, each with its folder below the input."""
    if not path.exists():
        raise ValueError(f"inputs: no file or folder {path}")
    if path.is_file():
        return [(path, Path())]
    if not path.is_dir():  # a pipe would be waited for, for ever
        raise ValueError(f"inputs: {path} is neither a file nor a folder")
    # Results of an earlier run within the folder are no inputs.
    written = output_dir.resolve() if recursive and output_dir.resolve() != path.resolve() else None
    found = [
        (file, file.parent.relative_to(path))
        for file in sorted(path.rglob("*") if recursive else path.iterdir())
        if file.suffix.lower() in EXTENSIONS
        and not file.name.startswith(".")
        and (file.is_file() or (file.is_symlink() and not file.exists()))  # a broken link is a file that fails
        and (written is None or written not in file.resolve().parents)
    ]
    if not found:
        raise ValueError(f"inputs: the folder {path} has no file with any of {', '.join(EXTENSIONS)}")
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat() if path.exists() else path.lstat()
    return status.st_dev, status.st_ino


def _check_targets(jobs: Sequence[tuple[Path, Path]], overwrite: bool) -> None:
    """Raise unless every result has a file of its own that is no other's input."""
    sources = {_identity(source) for source, _ in jobs}
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise ValueError(f"inputs: {taken[target]} and {source} would both be written to {target}")
        taken[target] = source
        if target.exists() and _identity(target) in sources:
            if _identity(target) != _identity(source):
                raise ValueError(f"output_dir: the result of {source} would replace the input {target}")
            if not overwrite:
                raise ValueError(
                    f"output_dir: {target} is an input; choose another folder or a suffix, or overwrite it"
                )
