"""Public window attention: arguments checked, autocast applied, backend chosen.

The compiled backends run behind ``mitnet_fast::window_attention`` and its backward operator; the
reference is plain PyTorch and needs none.
"""

from __future__ import annotations

import torch

from .. import reference
from .._extension import EXTENSION
from ..reference.window_attention import padding
from ._backends import Kernels, check_backend, choose, matmul_tf32, triton_kernels
from ._checks import (
    cast_like_convolution,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
)
from ._registration import define, differentiate, empty_for, or_empty

HALF = frozenset({torch.float32, torch.bfloat16, torch.float16})
ON_CUDA = {"window_size": 16, "channels per head": 64}
# the keys of a window share one program's memory
IN_TRITON = ON_CUDA | {"channels per head of windows above 8×8": 32, "pixels per image": 2**30}
KERNELS = Kernels(
    "window_attention",
    {
        ("cpp", "cpu"): frozenset({torch.float32, torch.float64, torch.bfloat16}),
        ("cpp", "cuda"): HALF,
        ("triton", "cuda"): HALF,
        ("triton", "cpu"): HALF,
    },
    limits={("cpp", "cuda"): ON_CUDA, ("triton", "cuda"): IN_TRITON, ("triton", "cpu"): IN_TRITON},
)


def window_attention(
    qk: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor,
    *,
    num_heads: int,
    window_size: int = 8,
    shift: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Self-attention inside w×w windows of a feature map that is padded by reflection to whole windows.

    Per window and head ``softmax(d^-½·Q·Kᵀ + bias)·V`` over its w² pixels, then cropped to H×W. A
    shift s offsets the windows by padding s more rows and columns at the top left, by reflection:
    there is no cyclic roll and no mask.

    Args:
        qk: [B, 2C, H, W], queries then keys; channel head·d + j in each, d = C / num_heads.
        v: [B, C, H, W], values, dtype of ``qk``.
        bias_table: [(2w−1)², num_heads]; row (dy + w − 1)·(2w − 1) + dx + w − 1 is added to the score
            of a query and a key with position(query) − position(key) = (dy, dx).
        num_heads: divides C.
        window_size: w ≥ 1.
        shift: 0 ≤ shift < w.
        backend: see :mod:`mitnet_fast.ops`.

    Returns:
        [B, C, H, W] in the dtype of the inputs (under autocast: the dtype that it casts to).

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: shapes, devices, heads, window or shift do not fit, the map is too small to be
            padded by reflection, or the backend does not exist.
        BackendError: the backend asked for cannot run this call.

    Source: DCMPNet (arXiv 2403.01105), local feature-embedded global extraction.
    """
    check_backend(backend)
    check_tensor("qk", qk, "[B, 2C, H, W]")
    check_tensor("v", v, "[B, C, H, W]")
    check_tensor("bias_table", bias_table, "[(2w−1)², heads]")
    check_image_size("v", v)
    batch, channels, height, width = v.shape
    check_shape("qk", qk, (batch, 2 * channels, height, width), "[B, 2C, H, W]")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads: must divide the {channels} channels of v, got {num_heads}")
    if window_size < 1:
        raise ValueError(f"window_size: must be at least 1, got {window_size}")
    if not 0 <= shift < window_size:
        raise ValueError(f"shift: must be at least 0 and below window_size = {window_size}, got {shift}")
    check_shape("bias_table", bias_table, ((2 * window_size - 1) ** 2, num_heads), "[(2w−1)², heads]")
    for axis, size in (("height", height), ("width", width)):
        needed = max(padding(size, window_size, shift)) + 1
        if size < needed:
            raise ValueError(
                f"v: {axis} {size} is too small to be padded by reflection to whole {window_size}×{window_size} "
                f"windows with shift {shift}, needs at least {needed} pixels"
            )
    check_one_device(qk=qk, v=v, bias_table=bias_table)
    qk, v, bias_table = cast_like_convolution(qk, v, bias_table)
    check_one_dtype(qk=qk, v=v, bias_table=bias_table)
    head = channels // num_heads
    sizes = {
        "window_size": window_size,
        "channels per head": head,
        "channels per head of windows above 8×8": head if window_size > 8 else 0,
        "pixels per image": height * width,
    }
    chosen = choose(KERNELS, backend, v.device.type, v.dtype, sizes)
    if chosen == "reference":
        return reference.window_attention(qk, v, bias_table, num_heads=num_heads, window_size=window_size, shift=shift)
    return torch.ops.mitnet_fast.window_attention(qk, v, bias_table, num_heads, window_size, shift, chosen)


def _launchers(backend: str):
    return EXTENSION if backend == "cpp" else triton_kernels("window_attention")


def _forward(qk, v, bias_table, num_heads, window_size, shift, backend):
    launch = _launchers(backend).window_attention_forward
    return launch(qk, v, bias_table, num_heads, window_size, shift, matmul_tf32(v))


def _backward(grad, qk, v, bias_table, num_heads, window_size, shift, needs, backend):
    launch = _launchers(backend).window_attention_backward
    grads = launch(grad, qk, v, bias_table, num_heads, window_size, shift, matmul_tf32(v), *needs)
    return tuple(or_empty(gradient, v) for gradient in grads)


def _setup(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.window_size, ctx.shift, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.mitnet_fast.window_attention_backward(
        grad, *ctx.saved_tensors, ctx.num_heads, ctx.window_size, ctx.shift, needs, ctx.backend
    )
    wanted = (gradient if needed else None for gradient, needed in zip(grads, needs, strict=True))
    return *wanted, None, None, None, None


define(
    "window_attention(Tensor qk, Tensor v, Tensor bias_table, int num_heads, int window_size, int shift, str backend)"
    " -> Tensor",
    _forward,
    lambda qk, v, bias_table, num_heads, window_size, shift, backend: empty_for(v),
)
define(
    "window_attention_backward(Tensor grad, Tensor qk, Tensor v, Tensor bias_table, int num_heads, int window_size,"
    " int shift, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, qk, v, bias_table, num_heads, window_size, shift, needs, backend: tuple(
        empty_for(tensor, needed) for tensor, needed in zip((qk, v, bias_table), needs, strict=True)
    ),
)
differentiate("window_attention", _setup, _gradients)
