"""Public dynamic filter operators: arguments checked, autocast applied, backend chosen."""

from __future__ import annotations

from math import isqrt

import torch

from .. import reference
from ._backends import check_backend
from ._checks import (
    cast_like_convolution,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
)

KERNEL_SIZES = (1, 3, 5, 7)


def dynamic_filter(
    x: torch.Tensor, filters: torch.Tensor, *, residual: bool = False, backend: str | None = None
) -> torch.Tensor:
    """Filter every pixel of every channel with a K×K filter of its own, zeros outside the image.

    ``y[b, c, p] = Σ_k filters[b, c·K² + k, p] · x[b, c, p + offset(k)]``, k counting the K×K offsets
    row by row from the top left.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16.
        filters: [B, C·K², H, W] with K = 1, 3, 5 or 7, dtype of ``x``.
        residual: add ``x`` to the result.
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.

    Source: MITNet (arXiv 2308.06998), adaptive dynamic filter block.
    """
    check_backend(backend)
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("filters", filters, "[B, C·K², H, W]")
    check_image_size("x", x)
    batch, channels, height, width = x.shape
    taps = kernel_taps("filters", filters.shape[1], channels)
    check_shape("filters", filters, (batch, channels * taps, height, width), "[B, C·K², H, W]")
    check_one_device(x=x, filters=filters)
    x, filters = cast_like_convolution(x, filters)
    check_one_dtype(x=x, filters=filters)
    return reference.dynamic_filter(x, filters, residual=residual)


def predicted_dynamic_filter(
    x: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Filter ``x`` with the filters that a 1×1 convolution of ``features`` predicts at each pixel.

    Equals ``dynamic_filter(x, conv1×1(features; weight, bias), residual=residual)``.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16.
        features: [B, Cf, H, W], dtype of ``x``.
        weight: [C·K², Cf] with K = 1, 3, 5 or 7; row c·K² + k predicts tap k of channel c.
        bias: [C·K²], or [B, C·K²] for one per sample, or None. A term of the features that is
            constant over the image can be folded into it: W·(s + g) = W·s + W·g.
        residual: add ``x`` to the result.
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or the backend does not exist.

    Source: MITNet (arXiv 2308.06998), adaptive dynamic filter block.
    """
    check_backend(backend)
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("features", features, "[B, Cf, H, W]")
    check_tensor("weight", weight, "[C·K², Cf]")
    check_image_size("x", x)
    check_image_size("features", features)
    batch, channels, height, width = x.shape
    check_shape("features", features, (batch, features.shape[1], height, width), "[B, Cf, H, W]")
    taps = kernel_taps("weight", weight.shape[0], channels)
    check_shape("weight", weight, (channels * taps, features.shape[1]), "[C·K², Cf]")
    if bias is not None:
        check_tensor("bias", bias, "[C·K²]", "[B, C·K²]")
        expected = (channels * taps,) if bias.dim() == 1 else (batch, channels * taps)
        check_shape("bias", bias, expected, "[C·K²]" if bias.dim() == 1 else "[B, C·K²]")
    check_one_device(x=x, features=features, weight=weight, bias=bias)
    x, features, weight, bias = cast_like_convolution(x, features, weight, bias)
    check_one_dtype(x=x, features=features, weight=weight, bias=bias)
    return reference.predicted_dynamic_filter(x, features, weight, bias, residual=residual)


def kernel_taps(name: str, filter_channels: int, channels: int) -> int:
    """K² of filters with ``filter_channels`` channels for ``channels`` channels of x, or ValueError."""
    taps = filter_channels // channels
    if filter_channels % channels or isqrt(taps) ** 2 != taps or isqrt(taps) not in KERNEL_SIZES:
        allowed = ", ".join(str(channels * size**2) for size in KERNEL_SIZES)
        raise ValueError(
            f"{name}: expected C·K² = {allowed} filter channels (K = 1, 3, 5, 7) for C = {channels} channels of x, "
            f"got {filter_channels}"
        )
    return taps
