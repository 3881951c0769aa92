"""Public window attention: arguments checked, autocast applied, backend chosen."""

from __future__ import annotations

import torch

from .. import reference
from ..reference.window_attention import padding
from ._backends import Kernels, check_backend, choose
from ._checks import (
    cast_like_convolution,
    check_image_size,
    check_one_device,
    check_one_dtype,
    check_shape,
    check_tensor,
)

KERNELS = Kernels("window_attention")


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
    choose(KERNELS, backend, qk.device.type, qk.dtype)
    return reference.window_attention(qk, v, bias_table, num_heads=num_heads, window_size=window_size, shift=shift)
