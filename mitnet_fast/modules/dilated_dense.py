"""Dilated residual dense block (DRDB): the unit of the depth network.

    f_0 = x,  f_k = [f_{k−1}, ReLU(conv3×3, dilation 2 (f_{k−1}))],  k = 1 … 5
    y = ReLU(conv1×1(f_5)) + x

Maps are [B, C, H, W]; every convolution adds ``growth`` channels and sees all before it. The block is one
fused operator, whose kernels write all channels into one buffer instead of concatenating.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import dense_block
from ..reference.feature_mixing import DENSE_LAYERS
from ._checks import check_counts, check_map


class DRDB(nn.Module):
    """Dilated residual dense block.

    Args:
        channels: C.
        growth: channels that each dense convolution adds.

    Raises:
        ValueError: a count below 1.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), depth estimation network; the block is that of
    AHDRNet (arXiv 1904.10293).
    """

    layers = DENSE_LAYERS

    def __init__(self, channels: int, growth: int = 32) -> None:
        super().__init__()
        check_counts(channels=channels, growth=growth)
        self.channels = channels
        self.dense = nn.ModuleList(
            nn.Conv2d(channels + layer * growth, growth, 3, padding=2, dilation=2) for layer in range(self.layers)
        )
        self.fuse = nn.Conv2d(channels + self.layers * growth, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] → the same shape.

        Raises:
            ValueError: the channels do not fit.
        """
        check_map("x", x, self.channels)
        return dense_block(
            x,
            torch.cat([convolution.weight.flatten() for convolution in self.dense]),
            torch.cat([convolution.bias for convolution in self.dense]),
            self.fuse.weight.flatten(1),
            self.fuse.bias,
        )
