"""What the launchers of every family share: maps and their strides, tile sizes, the launch itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILER_OPTIONS = {"enable_fp_fusion": True}  # a multiplication and an addition round once; the default varies
MAX_PIXELS = 2**30
PIXELS_IN_SEQUENCE = 8192  # at most so many are summed one after another, which bounds the rounding error
TUNED = Path(__file__).with_name("tuned")


@triton.jit
def reflected(i, size):
    """Coordinate of the pixel that lies at coordinate ``i`` of a map continued by reflection."""
    i = tl.abs(i)
    return tl.minimum(i, 2 * (size - 1) - i)


@triton.jit
def load_tile(ptr, pixels, channels, has_pixel, has_channel, STRIDE_P: tl.constexpr):
    """Tile [pixels, channels] of a map, zero where there is none; lanes run along what lies together."""
    if STRIDE_P <= 1:
        mask = has_channel[:, None] & has_pixel[None, :]
        tile = tl.trans(tl.load(ptr + (channels[:, None] + pixels[None, :]), mask=mask, other=0.0))
    else:
        mask = has_pixel[:, None] & has_channel[None, :]
        tile = tl.load(ptr + (pixels[:, None] + channels[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(ptr, pixels, channels, has_pixel, has_channel, tile, STRIDE_P: tl.constexpr):
    """Write a tile [pixels, channels] to a map."""
    tile = tile.to(ptr.dtype.element_ty)
    if STRIDE_P <= 1:
        mask = has_channel[:, None] & has_pixel[None, :]
        tl.store(ptr + (channels[:, None] + pixels[None, :]), tl.trans(tile), mask=mask)
    else:
        tl.store(ptr + (pixels[:, None] + channels[None, :]), tile, mask=has_pixel[:, None] & has_channel[None, :])


@triton.jit
def load_matrix(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a contiguous [ROWS, COLUMNS] matrix, zeros outside."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


class Map(NamedTuple):
    """A [batch, channels, height, width] map whose pixels lie at one distance, strides in elements."""

    data: torch.Tensor
    stride_n: int
    stride_c: int
    stride_p: int


def as_map(tensor: torch.Tensor) -> Map:
    """``tensor`` as a kernel reads it: in place where pixels or channels are neighbours, else a copy.

    In place are contiguous and channels_last tensors, slices of their batch or channels, and
    expanded ones, such as the gradient of a sum.
    """
    channels, height, width = tensor.shape[1:]
    stride_n, stride_c, stride_h, stride_w = tensor.stride()
    stride_p = stride_w if width > 1 else stride_h
    dense = height == 1 or width == 1 or stride_h == width * stride_w
    if dense and (stride_p in (0, 1) or (stride_c == 1 and channels > 1)):
        return Map(tensor, stride_n, stride_c, stride_p)
    copy = tensor.contiguous()
    return Map(copy, copy.stride(0), copy.stride(1), 1)


def empty_map(like: torch.Tensor, channels: int | None = None) -> Map:
    """An uninitialised result of the size, dtype and layout (contiguous or channels_last) of ``like``.

    It has as many ``channels`` as are given, else those of ``like``.
    """
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = like.shape[0], like.shape[1] if channels is None else channels, *like.shape[2:]
    return as_map(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout))


def strides(*maps: Map | None) -> Iterator[int]:
    """Batch and channel stride of every map, in order; zero for what is not there."""
    for map in maps:
        yield from (0, 0) if map is None else (map.stride_n, map.stride_c)


def offset_type(*maps: Map | None) -> tl.dtype:
    """Type of offsets within one sample: 32 bits hold them in most maps and save registers."""
    extents = (
        (map.data.shape[1] - 1) * map.stride_c + map.data.shape[2] * map.data.shape[3] * map.stride_p
        for map in maps
        if map is not None
    )
    return tl.int32 if max(extents) < 2**30 else tl.int64


@triton.jit
def neighbour(h, w, tap, height, width, KERNEL: tl.constexpr, DILATION: tl.constexpr, OFFSET: tl.constexpr):
    """Distance in pixels to the tap's neighbour of pixels (h, w), and whether both lie in the image.

    The taps of a KERNEL×KERNEL convolution are DILATION pixels apart; negative, they are mirrored.
    """
    dy = (tap // KERNEL - KERNEL // 2) * DILATION
    dx = (tap % KERNEL - KERNEL // 2) * DILATION
    row = h + dy
    column = w + dx
    inside = (h < height) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (dy * width + dx).to(OFFSET), inside


def check_pixels(name: str, tensor: torch.Tensor) -> None:
    """Raise for an image whose pixels 32 bits cannot count (offsets into maps have 64).

    Raises:
        ValueError: names the size and the limit.
    """
    height, width = tensor.shape[-2:]
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name}: the Triton kernels take at most {MAX_PIXELS} pixels per image, got {height}×{width}")


def power_of_two(size: int, *, at_most: int) -> int:
    """Side of a matrix product's tile that holds ``size``, 16 (the least that ``tl.dot`` takes) to ``at_most``."""
    return max(16, min(triton.next_power_of_2(size), at_most))


def precision(tensor: torch.Tensor, tf32: bool) -> str:
    """``input_precision`` of ``tl.dot``; it matters for float32 alone."""
    return "tf32" if tf32 and tensor.dtype == torch.float32 else "ieee"


def product_kind(tensor: torch.Tensor, tf32: bool) -> str:
    """Which units multiply matrices, and so which tiles suit: "half", "tf32" (tensor cores) or "ieee"."""
    return precision(tensor, tf32) if tensor.dtype == torch.float32 else "half"


def operand_type(tensor: torch.Tensor) -> tl.dtype:
    """Type in which ``tl.dot`` takes its operands: the tensor's, but float32 (the same values) in the interpreter.

    The interpreter multiplies the bit patterns of bfloat16.
    """
    return tl.float32 if INTERPRETED else DTYPES[tensor.dtype]


class Parts(NamedTuple):
    """Division of a batch of tiled images into ``count`` parts, each summed by one program.

    Attributes:
        count: parts.
        samples: samples per part; 1 where a sample is divided.
        splits: parts per sample; 1 where a part has several samples.
        tiles: tiles of a sample per part.
    """

    count: int
    samples: int
    splits: int
    tiles: int


def divide(batch: int, tiles: int, wanted: float, max_tiles: int) -> Parts:
    """Divide ``batch`` images of ``tiles`` tiles into about ``wanted`` parts of ``max_tiles`` tiles at most.

    Sizes alone decide, not the number of multiprocessors: a sum has one order.
    """
    samples = min(ceil(batch / wanted), max(1, max_tiles // tiles)) if batch > wanted else 1
    splits = 1 if samples > 1 else max(ceil(tiles / max_tiles), min(tiles, round(wanted / max(batch, 1))), 1)
    tiles_per_part = ceil(tiles / splits)
    splits = ceil(tiles / tiles_per_part)
    return Parts(ceil(batch / samples) * splits, samples, splits, tiles_per_part)


@dataclass(frozen=True)
class Launch:
    """One launch: positional arguments, then ``tl.constexpr`` ones and compiler options by name."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class _Recording:
    launches: list[Launch]
    tuned: tuple[str, ...]


_recording: _Recording | None = None


@contextmanager
def record_launches(*tuned: str) -> Iterator[list[Launch]]:
    """Collect launches instead of launching; the tensors may then be on device "meta".

    Args:
        *tuned: names of files in ``tuned/`` that are asked before ``default``, such as "sm_90".
    """
    global _recording
    before, _recording = _recording, _Recording([], tuned)
    try:
        yield _recording.launches
    finally:
        _recording = before


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its tensors, in the current stream."""
    if programs == 0:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, constants))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **constants, **COMPILER_OPTIONS)


def configuration(device: torch.device, family: str, kernel: str, variant: str, size: int) -> dict[str, int]:
    """Tile sizes and compiler options of one kernel, from the files in ``tuned/``.

    The file of the GPU by name (``nvidia_h200``) comes before that of its architecture (``sm_90``),
    and both before ``default``. A file maps family → kernel → variant to a list of entries in
    ascending ``up_to``; the first whose ``up_to`` is at least ``size`` (or that has none) is taken.

    Args:
        device: where the kernel will run.
        family: such as "dynamic_filter".
        kernel: the kernel's key.
        variant: such as the kind of matrix product.
        size: what ``up_to`` refers to, such as a number of channels.
    """
    for name in (*_tuned_names(device), "default"):
        entries = _tuned_file(name).get(family, {}).get(kernel, {}).get(variant)
        if entries is not None:
            break
    entry = next(entry for entry in entries if size <= entry.get("up_to", size))
    return {key: value for key, value in entry.items() if key != "up_to"}


def _tuned_names(device: torch.device) -> tuple[str, ...]:
    if _recording is not None:
        return _recording.tuned
    if INTERPRETED:
        return ("interpreter",)
    return _names_of_gpu(device) if device.type == "cuda" else ()


@cache
def _names_of_gpu(device: torch.device) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device).lower().replace(" ", "_").replace("/", "_"), f"sm_{major}{minor}"


@cache
def _tuned_file(name: str) -> dict[str, Any]:
    path = TUNED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
