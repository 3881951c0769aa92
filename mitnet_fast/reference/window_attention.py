"""Window attention of LEGM: self-attention inside w×w windows of a reflection-padded feature map.

    scores = d^-½·Q·Kᵀ + bias_table[Δ],  Δ = position of the query − position of the key
    y = softmax(scores)·V, window by window, heads apart

The map is padded by reflection to whole windows; a shift s pads s rows and columns at the top left
as well, so the windows are offset without a cyclic roll and without a mask. The result is cropped
to the map's own size. Channels of Q, K and V are head·d + j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def padding(size: int, window_size: int, shift: int) -> tuple[int, int]:
    """Rows or columns reflected before and after an axis of ``size`` pixels."""
    to_whole = -size % window_size
    return (shift, (window_size - shift + to_whole) % window_size) if shift else (0, to_whole)


def table_rows(window_size: int) -> torch.Tensor:
    """Row of the bias table for every (query, key) of a window, int64 [w², w²]."""
    axis = torch.arange(window_size)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    offset = position[:, None] - position[None, :] + window_size - 1
    return offset[..., 0] * (2 * window_size - 1) + offset[..., 1]


def window_attention(
    qk: torch.Tensor, v: torch.Tensor, bias_table: torch.Tensor, *, num_heads: int, window_size: int, shift: int
) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.window_attention`."""
    batch, channels, height, width = v.shape
    top, bottom = padding(height, window_size, shift)
    left, right = padding(width, window_size, shift)
    padded = F.pad(torch.cat([qk, v], 1), (left, right, top, bottom), mode="reflect")
    rows, columns = padded.shape[-2] // window_size, padded.shape[-1] // window_size

    # [B, 3, heads, d, rows, w, columns, w] → three times [B, rows, columns, heads, w², d]
    windows = padded.view(batch, 3, num_heads, channels // num_heads, rows, window_size, columns, window_size)
    windows = windows.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6)
    query, key, value = windows.unbind(0)

    bias = bias_table[table_rows(window_size).to(bias_table.device)].permute(2, 0, 1)  # [heads, w², w²]
    scores = query * (channels // num_heads) ** -0.5 @ key.transpose(-2, -1) + bias
    attended = scores.softmax(-1) @ value

    attended = attended.unflatten(4, (window_size, window_size)).permute(0, 3, 6, 1, 4, 2, 5)
    whole = attended.reshape(batch, channels, rows * window_size, columns * window_size)
    return whole[:, :, top : top + height, left : left + width].contiguous()
