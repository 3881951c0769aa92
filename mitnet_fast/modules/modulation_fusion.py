"""Modulation fusion (MFM): a sum of maps whose weights, per channel, compete in a softmax.

    s = global average of Σ maps                                   [B, C, 1, 1]
    logits = conv1×1(ReLU(conv1×1(s)))                             [B, n·C, 1, 1], seen as [B, n, C]
    fused = Σ_k maps_k · softmax(logits over n)_k

Maps are [B, C, H, W]. The average of the sum is the sum of the averages: the summed map is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ._checks import check_counts, check_map


class MFM(nn.Module):
    """Fuse maps of one shape by attention over the maps, channel by channel.

    Args:
        channels: C of every map.
        maps: how many maps, n.
        reduction: the hidden layer has max(C // reduction, 4) channels.

    Raises:
        ValueError: a count below 1.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), modulation fusion module, after SKFusion of
    DehazeFormer (arXiv 2204.03883).
    """

    def __init__(self, channels: int, maps: int = 2, reduction: int = 8) -> None:
        super().__init__()
        check_counts(channels=channels, maps=maps, reduction=reduction)
        self.channels = channels
        self.maps = maps
        hidden = max(channels // reduction, 4)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, maps * channels, 1, bias=False),
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse.

        Args:
            maps: n maps [B, channels, H, W].

        Returns:
            [B, channels, H, W].

        Raises:
            ValueError: the number of maps or a shape does not fit.
        """
        if len(maps) != self.maps:
            raise ValueError(f"maps: expected {self.maps} maps, got {len(maps)}")
        for index, value in enumerate(maps):
            check_map(f"maps[{index}]", value, self.channels, maps[0].shape[2:])
        averages = [value.mean((2, 3), keepdim=True) for value in maps]
        weights = self.mlp(sum(averages[1:], averages[0])).unflatten(1, (self.maps, self.channels)).softmax(1).unbind(1)
        fused = maps[0] * weights[0]
        for value, weight in zip(maps[1:], weights[1:], strict=True):
            fused = torch.addcmul(fused, value, weight)
        return fused
