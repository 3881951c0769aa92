"""Dynamic filter: every pixel of every channel has a K×K filter of its own.

    y[b, c, p] = Σ_k filters[b, c·K² + k, p] · x[b, c, p + offset(k)]   (+ x[b, c, p])

with zeros outside the image and k counting the K×K offsets row by row. The filters are either
given, or predicted at each pixel by a 1×1 convolution of a feature map.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F


def dynamic_filter(x: torch.Tensor, filters: torch.Tensor, *, residual: bool) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.dynamic_filter`."""
    channels, height, width = x.shape[1:]
    taps = filters.shape[1] // channels
    size = isqrt(taps)
    neighbours = F.unfold(x, size, padding=size // 2).unflatten(1, (channels, taps)).unflatten(3, (height, width))
    y = (filters.unflatten(1, (channels, taps)) * neighbours).sum(2)
    return y + x if residual else y


def predicted_dynamic_filter(
    x: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, residual: bool
) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.predicted_dynamic_filter`."""
    filters = F.conv2d(features, weight[:, :, None, None])
    if bias is not None:
        filters = filters + bias[..., None, None]  # [CK², 1, 1] or [B, CK², 1, 1]
    return dynamic_filter(x, filters, residual=residual)
