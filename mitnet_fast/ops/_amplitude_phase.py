"""Public amplitude / phase convolution: real in, real out, no complex tensor crosses its border.

The compiled backends of the convolution run behind ``mitnet_fast::amplitude_phase_conv`` and its
backward operator, which computes the spectrum again: nothing but the inputs is kept.
"""

from __future__ import annotations

from types import ModuleType

import torch

from .. import reference
from .._extension import EXTENSION
from ._backends import Kernels, check_backend, choose, convolution_tf32, triton_kernels
from ._checks import (
    autocast_dtype,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
    without_autocast,
)
from ._registration import define, differentiate, empty_for, layout_of, or_empty

MODES = ("amplitude", "phase")
# all channels of a tile of bins share one block's memory
ON_CUDA = {"channels": 256, "hidden channels": 256, "output channels": 256}
IN_TRITON = {"channels": 256, "pixels per image": 2**30}
KERNELS = Kernels(
    "amplitude_phase",
    {
        ("cpp", "cpu"): frozenset({torch.float32, torch.float64}),
        ("cpp", "cuda"): frozenset({torch.float32}),
        ("triton", "cuda"): frozenset({torch.float32}),
        ("triton", "cpu"): frozenset({torch.float32}),
    },
    limits={("cpp", "cuda"): ON_CUDA, ("triton", "cuda"): IN_TRITON, ("triton", "cpu"): IN_TRITON},
)


def amplitude_phase_conv(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    mode: str = "amplitude",
    negative_slope: float = 0.2,
    output_weight: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Pass the amplitude or the phase of a feature map's spectrum through two 1×1 convolutions.

    With X = rfft2(x) = A·exp(iP) and M = conv1×1 → LeakyReLU → conv1×1 over channels, the result is
    ``irfft2(output_weight · Y) + output_bias``, Y = M(A)·exp(iP) in amplitude and A·exp(i·M(P)) in
    phase mode. With 2C columns ``output_weight`` is that of a convolution over [x, irfft2(Y)]: it is
    applied to [X, Y], which costs no pass over a map. Bins that are real for every real image keep an
    imaginary part of +0, and an amplitude below 1e-30 (float64: 1e-290) counts as zero: phase 0, no
    gradient to x through A and P.

    Args:
        x: [B, C, H, W], any size from 1×1. Half precision is computed in float32.
        weight1: [Ch, C], first convolution, dtype of ``x``.
        bias1: [Ch].
        weight2: [C, Ch], second convolution.
        bias2: [C].
        mode: "amplitude" or "phase".
        negative_slope: of the LeakyReLU.
        output_weight: [Co, C], applied to Y before the inverse transform (it commutes with it),
            [Co, 2C], applied to [X, Y], or None for Y itself.
        output_bias: [Co], added to the result, or None; only with ``output_weight``.
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, Co, H, W] (C channels without ``output_weight``) in the dtype of ``x``.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes, devices or the mode do not fit, ``output_bias`` comes without
            ``output_weight``, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: MITNet (arXiv 2308.06998), residual amplitude / phase block.
    """
    check_backend(backend)
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, allowed are 'amplitude' and 'phase'")
    check_tensor("x", x, "[B, C, H, W]")
    check_image_size("x", x)
    channels = x.shape[1]
    check_tensor("weight1", weight1, "[Ch, C]")
    hidden = weight1.shape[0]
    check_shape("weight1", weight1, (hidden, channels), "[Ch, C]")
    for name, tensor, shape, meaning in (
        ("bias1", bias1, (hidden,), "[Ch]"),
        ("weight2", weight2, (channels, hidden), "[C, Ch]"),
        ("bias2", bias2, (channels,), "[C]"),
    ):
        check_tensor(name, tensor, meaning)
        check_shape(name, tensor, shape, meaning)
    if output_weight is not None:
        check_tensor("output_weight", output_weight, "[Co, C]", "[Co, 2C]")
        if output_weight.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"output_weight: expected shape [Co, C] or [Co, 2C] with C = {channels}, "
                f"got {list(output_weight.shape)}"
            )
    if output_bias is not None:
        if output_weight is None:
            raise ValueError("output_bias: taken only with output_weight")
        check_tensor("output_bias", output_bias, "[Co]")
        check_shape("output_bias", output_bias, (output_weight.shape[0],), "[Co]")
    tensors = {
        "x": x,
        "weight1": weight1,
        "bias1": bias1,
        "weight2": weight2,
        "bias2": bias2,
        "output_weight": output_weight,
        "output_bias": output_bias,
    }
    check_one_device(**tensors)
    if autocast_dtype(x) is None:
        check_one_dtype(**tensors)
    wide = [None if t is None else widened(t, x.dtype) for t in tensors.values()]
    chosen = choose(KERNELS, backend, x.device.type, wide[0].dtype, sizes_of(x, weight1, output_weight))
    if chosen != "reference":
        return torch.ops.mitnet_fast.amplitude_phase_conv(*wide, mode, negative_slope, chosen).to(x.dtype)
    with without_autocast(x):
        y = reference.amplitude_phase_conv(
            *wide[:5], mode=mode, negative_slope=negative_slope, output_weight=wide[5], output_bias=wide[6]
        )
    return y.to(x.dtype)


def sizes_of(x: torch.Tensor, weight1: torch.Tensor, output_weight: torch.Tensor | None) -> dict[str, int]:
    """What of a call the limits of ``KERNELS`` refer to."""
    return {
        "channels": x.shape[1],
        "hidden channels": weight1.shape[0],
        "output channels": x.shape[1] if output_weight is None else output_weight.shape[0],
        "pixels per image": x.shape[2] * x.shape[3],
    }


def widened(tensor: torch.Tensor, like: torch.dtype) -> torch.Tensor:
    """``tensor`` in float32, or float64 where ``like`` is."""
    return tensor.to(torch.float64 if like == torch.float64 else torch.float32)


def launchers(backend: str) -> ModuleType:
    """The module that has the launchers of a compiled backend."""
    return EXTENSION if backend == "cpp" else triton_kernels("amplitude_phase")


def _forward(x, weight1, bias1, weight2, bias2, output_weight, output_bias, mode, negative_slope, backend):
    weights = (weight1, bias1, weight2, bias2, output_weight, output_bias)
    launch = launchers(backend).amplitude_phase_conv_forward
    return launch(x, *weights, mode == "phase", negative_slope, convolution_tf32(x))


def _forward_fake(x, weight1, bias1, weight2, bias2, output_weight, output_bias, mode, negative_slope, backend):
    channels = x.shape[1] if output_weight is None else output_weight.shape[0]
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _backward(
    grad, x, weight1, bias1, weight2, bias2, output_weight, output_bias, mode, negative_slope, needs, backend
):
    weights = (weight1, bias1, weight2, bias2, output_weight, output_bias)
    launch = launchers(backend).amplitude_phase_conv_backward
    grads = launch(grad, x, *weights, mode == "phase", negative_slope, convolution_tf32(x), *needs)
    return tuple(or_empty(gradient, x) for gradient in grads)


def _backward_fake(
    grad, x, weight1, bias1, weight2, bias2, output_weight, output_bias, mode, negative_slope, needs, backend
):
    tensors = (x, weight1, bias1, weight2, bias2, output_weight, output_bias)
    return tuple(
        empty_for(x if tensor is None else tensor, needed) for tensor, needed in zip(tensors, needs, strict=True)
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.mode, ctx.negative_slope, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    needs = ctx.needs_input_grad[:7]
    grads = torch.ops.mitnet_fast.amplitude_phase_conv_backward(
        grad, *ctx.saved_tensors, ctx.mode, ctx.negative_slope, needs, ctx.backend
    )
    return *(gradient if needed else None for gradient, needed in zip(grads, needs, strict=True)), None, None, None


define(
    "amplitude_phase_conv(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
    " Tensor? output_weight, Tensor? output_bias, str mode, float negative_slope, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "amplitude_phase_conv_backward(Tensor grad, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
    " Tensor? output_weight, Tensor? output_bias, str mode, float negative_slope, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiate("amplitude_phase_conv", _setup, _gradients)
