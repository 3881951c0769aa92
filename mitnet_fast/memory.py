"""How much memory restoring an image takes, how much there is, and how large tiles may be.

Peak bytes per pixel are measured for the published networks (``memory.json``, written by
``python -m benchmarks.memory``) and grow with the widths of others. What is free is the least that the machine, the
control groups of this process and its limit of address space leave.
"""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from .models import DCMPNet, DepthSharingDCMPNet, MITNet
from .ops import _amplitude_phase, _dynamic_filter, _window_attention
from .ops._backends import choose

MEASURED: dict[str, object] = json.loads(Path(__file__).with_name("memory.json").read_text())
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SHARE = 0.8
"""Of the free memory that is planned with: other processes and fragments take some."""

SMALLEST_TILE = 128
KERNELS = tuple(family.KERNELS for family in (_amplitude_phase, _dynamic_filter, _window_attention))


def bytes_per_pixel(model: nn.Module, device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak memory of ``model.restore`` per pixel of the image, or None for a network that was not measured.

    Args:
        model: a MITNet, DCMPNet or DepthSharingDCMPNet.
        device: where it runs; devices that were not measured take the CPU's figures.
        dtype: float32, or the half precision of autocast (float16 as bfloat16).
    """
    if isinstance(model, DepthSharingDCMPNet):
        network = model.dehazing
    elif isinstance(model, MITNet | DCMPNet):
        network = model
    else:
        return None
    plain = any(choose(kernels, None, device.type, torch.float32) == "reference" for kernels in KERNELS)
    measured = MEASURED["restore"].get(device.type, MEASURED["restore"]["cpu"])
    figures = measured["dcmpnet" if isinstance(network, DCMPNet) else "mitnet"]["reference" if plain else "fused"]
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    return figures[precision] * _widening(network)


def largest_tile(per_pixel: float, free: int) -> int:
    """Side of the largest square, a multiple of 64, whose restoration fits into the planned share of ``free`` bytes.

    Args:
        per_pixel: see :func:`bytes_per_pixel`.
        free: bytes.

    Raises:
        MemoryError: not even the smallest.
    """
    side = math.isqrt(int(SHARE * free / per_pixel)) // 64 * 64
    if side < SMALLEST_TILE:
        least = math.ceil(SMALLEST_TILE**2 * per_pixel / SHARE)
        raise MemoryError(
            f"{in_words(free)} of memory are free, tiles of {SMALLEST_TILE} pixels need {in_words(least)}"
        )
    return side


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on ``device`` now, or None where the system does not tell."""
    if device.type == "cuda":
        reserved_and_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved_and_unused
    found = [value for value in (_available(), *_cgroups(), _address_space()) if value is not None]
    return max(0, min(found)) if device.type == "cpu" and found else None


def in_words(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _widening(network: MITNet | DCMPNet) -> float:
    """How much wider than the published network this one is, in whatever of it is widest."""
    if isinstance(network, MITNet):
        return network.width / 20
    own = network.config
    published = {"widths": (24, 48, 96), "prior_widths": (64, 128, 256, 512, 512), "depth_widths": (24, 48, 96, 128)}
    return max(own["growth"] / 32, *(max(own[name]) / max(widths) for name, widths in published.items()))


def _available() -> int | None:
    """What the kernel says that new processes can have without swapping."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _cgroups() -> list[int]:
    """What the limits of this process's control groups leave, version 2 and 1, from its own group up to the root."""
    try:
        entries = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, group in (entry for entry in entries if len(entry) == 3):
        if controllers not in ("", "memory"):
            continue
        version_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
        names = version_1 if controllers else ("memory.max", "memory.current")
        own = PurePosixPath(group.lstrip("/"))
        for part in (own, *own.parents):  # inside a container its own group may be what it sees as the root
            folder = CGROUPS / controllers / part
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group here, or "max": no limit
                continue
            left.append(limit - used + int(statistics.get("inactive_file", 0)))  # the page cache gives way
    return left


def _address_space() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int((PROC / "self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
