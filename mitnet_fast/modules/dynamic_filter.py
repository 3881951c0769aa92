"""Adaptive dynamic filter block of MITNet: each pixel of each channel is filtered by its own K×K filter.

    z       = conv1×1([x, phase, amplitude])
    filters = conv1×1(depthwise conv3×3(z) + g),   g[b, c] = conv1d over channels of mean(z[b, c])
    out[c]  = Σ_k filters[c·K² + k] · x[c, shifted by k] + x[c]

g is constant over the image, so its product with the last convolution is a bias per sample:
``W·(z' + g) + b = W·z' + (W·g + b)``. The filters themselves, K² maps per channel, are never stored.
Maps are [B, C, H, W].

The depthwise convolution is an operator of its own. Computed inside the filter's kernels it would save two
maps forward and three backward, in MITNet 0.37 GB of the 34 that a training step at batch 8 and 256×256
moves, about 1 %. The kernels, which the product with ``W`` keeps busy (``benchmarks.ops``), would pay with
one more ring of pixels around every tile, in the backward pass in addition to the one that they recompute
filters on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import predicted_dynamic_filter
from ._checks import check_counts, check_map


class DynamicFilterBlock(nn.Module):
    """Filter a map with per-pixel filters predicted from it and from two guiding maps.

    Args:
        channels: channels of the three maps.
        kernel_size: K of the filters: 1, 3, 5 or 7.

    Raises:
        ValueError: a channel count below 1 or a kernel size that does not exist.

    Source: MITNet (arXiv 2308.06998), adaptive dynamic filter block.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        check_counts(channels=channels)
        if kernel_size not in (1, 3, 5, 7):
            raise ValueError(f"kernel_size: got {kernel_size!r}, allowed are 1, 3, 5 and 7")
        self.channels = channels
        self.fusion = nn.Conv2d(3 * channels, channels, 1)
        self.spatial_attention = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.channel_attention = nn.Conv1d(1, 1, 3, padding=1)
        self.predictor = nn.Conv2d(channels, channels * kernel_size**2, 1)

    def forward(self, x: torch.Tensor, phase: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
        """Filter ``x``.

        Args:
            x: [B, channels, H, W], what is filtered.
            phase: the same shape, features of the phase domain.
            amplitude: the same shape, features of the amplitude domain.

        Returns:
            [B, channels, H, W].

        Raises:
            ValueError: shapes do not fit.
        """
        check_map("x", x, self.channels)
        check_map("phase", phase, self.channels, x.shape[2:], x.shape[0])
        check_map("amplitude", amplitude, self.channels, x.shape[2:], x.shape[0])
        z = self.fusion(torch.cat([x, phase, amplitude], 1))
        channel_term = self.channel_attention(z.mean((2, 3))[:, None])[:, 0]  # [B, C]
        weight = self.predictor.weight.flatten(1)
        bias = F.linear(channel_term, weight, self.predictor.bias)  # [B, C·K²]
        return predicted_dynamic_filter(x, self.spatial_attention(z), weight, bias)
