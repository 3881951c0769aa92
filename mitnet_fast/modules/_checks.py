"""Argument checks shared by the modules, in the manner of the operators' own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops._checks import check_shape, check_tensor


def check_map(
    name: str, value: torch.Tensor, channels: int, size: Sequence[int] | None = None, batch: int | None = None
) -> None:
    """Raise unless ``value`` is a floating-point map [batch, channels, *size]; None allows any."""
    check_tensor(name, value, "[B, C, H, W]")
    height_and_width = value.shape[2:] if size is None else size
    expected = (value.shape[0] if batch is None else batch, channels, *height_and_width)
    check_shape(name, value, expected, "[B, C, H, W]")


def check_counts(**counts: int) -> None:
    """Raise unless every argument is an integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}")


def check_slope(negative_slope: float) -> None:
    """Raise unless the slope of a LeakyReLU is in [0, 1)."""
    if not 0 <= negative_slope < 1:
        raise ValueError(f"negative_slope: expected a number in [0, 1), got {negative_slope!r}")
