"""Public dynamic filter operators: arguments checked, autocast applied, backend chosen.

The compiled backends run behind ``mitnet_fast::dynamic_filter`` and
``mitnet_fast::predicted_dynamic_filter`` and their backward operators; the reference is plain
PyTorch and needs none.
"""

from __future__ import annotations

from math import isqrt

import torch

from .. import reference
from .._extension import EXTENSION
from ._backends import Kernels, check_backend, choose, convolution_tf32, triton_kernels
from ._checks import (
    cast_like_convolution,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
)
from ._registration import define, differentiate, empty_for, or_empty

KERNEL_SIZES = (1, 3, 5, 7)
HALF = frozenset({torch.float32, torch.bfloat16, torch.float16})
IN_TRITON = {"pixels per image": 2**30}
KERNELS = Kernels(
    "dynamic_filter",
    {
        ("cpp", "cpu"): frozenset({torch.float32, torch.float64, torch.bfloat16}),
        ("cpp", "cuda"): HALF,
        ("triton", "cuda"): HALF,
        ("triton", "cpu"): HALF,
    },
    limits={("triton", "cuda"): IN_TRITON, ("triton", "cpu"): IN_TRITON},
)


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
        BackendError: the backend asked for cannot run this call.

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
    chosen = choose(KERNELS, backend, x.device.type, x.dtype, {"pixels per image": height * width})
    if chosen == "reference":
        return reference.dynamic_filter(x, filters, residual=residual)
    return torch.ops.mitnet_fast.dynamic_filter(x, filters, residual, chosen)


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
        BackendError: the backend asked for cannot run this call.

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
    chosen = choose(KERNELS, backend, x.device.type, x.dtype, {"pixels per image": height * width})
    if chosen == "reference":
        return reference.predicted_dynamic_filter(x, features, weight, bias, residual=residual)
    return torch.ops.mitnet_fast.predicted_dynamic_filter(x, features, weight, bias, residual, chosen)


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


def _launchers(backend: str):
    return EXTENSION if backend == "cpp" else triton_kernels("dynamic_filter")


def _forward(x, filters, residual, backend):
    return _launchers(backend).dynamic_filter_forward(x, filters, residual)


def _backward(grad, x, filters, residual, needs, backend):
    grads = _launchers(backend).dynamic_filter_backward(grad, x, filters, residual, *needs)
    return tuple(or_empty(gradient, x) for gradient in grads)


def _setup(ctx, inputs, output):
    x, filters, ctx.residual, ctx.backend = inputs
    ctx.save_for_backward(x, filters)


def _gradients(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.mitnet_fast.dynamic_filter_backward(grad, *ctx.saved_tensors, ctx.residual, needs, ctx.backend)
    return *(gradient if needed else None for gradient, needed in zip(grads, needs, strict=True)), None, None


define(
    "dynamic_filter(Tensor x, Tensor filters, bool residual, str backend) -> Tensor",
    _forward,
    lambda x, filters, residual, backend: empty_for(x),
)
define(
    "dynamic_filter_backward(Tensor grad, Tensor x, Tensor filters, bool residual, bool[] needs, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, filters, residual, needs, backend: (empty_for(x, needs[0]), empty_for(filters, needs[1])),
)
differentiate("dynamic_filter", _setup, _gradients)


def _predicted_forward(x, features, weight, bias, residual, backend):
    launch = _launchers(backend).predicted_dynamic_filter_forward
    return launch(x, features, weight, bias, residual, convolution_tf32(x))


def _predicted_backward(grad, x, features, weight, bias, residual, needs, backend):
    launch = _launchers(backend).predicted_dynamic_filter_backward
    grads = launch(grad, x, features, weight, bias, residual, convolution_tf32(x), *needs)
    return tuple(or_empty(gradient, x) for gradient in grads)


def _predicted_setup(ctx, inputs, output):
    x, features, weight, bias, ctx.residual, ctx.backend = inputs
    ctx.save_for_backward(x, features, weight, bias)


def _predicted_gradients(ctx, grad):
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.mitnet_fast.predicted_dynamic_filter_backward(
        grad, *ctx.saved_tensors, ctx.residual, needs, ctx.backend
    )
    return *(gradient if needed else None for gradient, needed in zip(grads, needs, strict=True)), None, None


def _predicted_backward_fake(grad, x, features, weight, bias, residual, needs, backend):
    maps = (x, features, weight, x if bias is None else bias)
    return tuple(empty_for(tensor, needed) for tensor, needed in zip(maps, needs, strict=True))


define(
    "predicted_dynamic_filter(Tensor x, Tensor features, Tensor weight, Tensor? bias, bool residual, str backend)"
    " -> Tensor",
    _predicted_forward,
    lambda x, features, weight, bias, residual, backend: empty_for(x),
)
define(
    "predicted_dynamic_filter_backward(Tensor grad, Tensor x, Tensor features, Tensor weight, Tensor? bias,"
    " bool residual, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _predicted_backward,
    _predicted_backward_fake,
)
differentiate("predicted_dynamic_filter", _predicted_setup, _predicted_gradients)
