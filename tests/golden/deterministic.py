"""Closed-form pseudo-random tensors: the same numbers on every machine and library version.

Every golden file here was computed with weights and inputs from these functions, so a
test rebuilds them instead of storing megabytes of weights.

    fill_module(model, salt, gain)   sets every parameter and buffer of a torch module
    tensor("input", shape, salt)     an input in [0, 1)
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """Values in [-1, 1) that depend on `name`, `salt` and the flat index only, float32."""
    n = int(np.prod(shape, dtype=np.int64)) if shape else 1
    mask = np.uint64(0xFFFFFFFF)
    key = np.uint64((zlib.crc32(name.encode()) + 0x9E3779B9 * salt) & 0xFFFFFFFF)
    h = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + key) & mask
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & mask
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & mask
    h ^= h >> np.uint64(16)
    return (h.astype(np.float64) / 2.0**31 - 1.0).astype(np.float32).reshape(shape)


def tensor(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """An input in [0, 1), float32."""
    return 0.5 * (uniform(name, shape, salt) + 1.0)


def parameter(name: str, shape: tuple[int, ...], salt: int = 0, gain: float = 1.0) -> np.ndarray:
    """One parameter or buffer, scaled by what its name and shape say it is.

    Convolution and linear weights: uniform, variance gain**2 / fan_in. Norm scales
    ([C], or [1, C, 1, 1] directly under norm1/norm2) and running variances: around 1.
    Biases and running means: within 0.1.
    """
    u = uniform(name, shape, salt)
    parent, _, leaf = ("." + name).rpartition(".")
    if leaf == "running_var":
        return 1.0 + 0.5 * u
    if leaf != "weight":
        return 0.1 * u
    if len(shape) == 1 or parent.endswith(("norm1", "norm2")):
        return 1.0 + 0.2 * u
    return u * np.float32(gain * math.sqrt(3.0 / np.prod(shape[1:])))


def fill_module(
    module, salt: int = 0, gain: float = 1.0, skip: tuple[str, ...] = ("num_batches_tracked", "relative_positions")
) -> None:
    """Overwrite every parameter and buffer of a torch module, in place."""
    import torch

    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            if name.rsplit(".", 1)[-1] not in skip:
                value.copy_(torch.from_numpy(parameter(name, tuple(value.shape), salt, gain)))
