"""Triple interaction of MITNet: features of all levels exchanged, phase and amplitude apart.

Per domain, with f_i = conv3×3(input_i) on level i (2^i·C channels, 1/2^i of the size), for
i = 0, 1, … in this order:

    f_i ← conv1×1([f_i, resize(f_j → level i) for j ≠ i in rising order])

in place: level 1 sees the fused level 0, level 2 the fused 0 and 1. One level down is a 2×2 average
and a 1×1 convolution that doubles the channels, one level up a 1×1 convolution that halves them and
a bilinear resize with aligned corners. Maps are [B, 2^i·C, H/2^i, W/2^i].

The weights of an average and of a resize add up to 1, so that both commute with 1×1 convolutions. What
comes from finer levels is averaged first, once for all levels that want it. What comes from coarser ones
is resized last, after its part of the fusing convolution: all of them share one resize to level i, and
nothing at full size is concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import check_counts, check_map


class OneLevelDown(nn.Module):
    """Channels of one level down for a map that is averaged already (``channels`` counts them before)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.doubling = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, 2C, H, W]."""
        return self.doubling(x)


class OneLevelUp(nn.Module):
    """Channels of one level up for a map that is resized afterwards (``channels`` counts them before)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.halving = nn.Conv2d(channels, channels // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C/2, H, W]."""
        return self.halving(x)


def averaged(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] → [B, C, ⌈H/2⌉, ⌈W/2⌉]."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` at the size of ``like``."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


class LevelInteraction(nn.Module):
    """Fuse every level of one feature pyramid with all others.

    Args:
        width: channels of level 0; level i has 2^i·width.
        levels: number of levels.
    """

    def __init__(self, width: int, levels: int = 3) -> None:
        super().__init__()
        check_counts(width=width, levels=levels)
        self.width = width
        self.levels = levels
        channels = [width * 2**level for level in range(levels)]
        self.entry = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.resize = nn.ModuleDict(
            {
                f"{source}_to_{target}": nn.Sequential(
                    *(OneLevelDown(channels[level]) for level in range(source, target)),
                    *(OneLevelUp(channels[level]) for level in range(source, target, -1)),
                )
                for source in range(levels)
                for target in range(levels)
                if source != target
            }
        )
        self.fusion = nn.ModuleList(nn.Conv2d(levels * c, c, 1) for c in channels)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Fuse ``features``, one map per level, into as many of the same shapes."""
        fused = [entry(feature) for entry, feature in zip(self.entry, features, strict=True)]
        finer: list[torch.Tensor] = []  # the fused levels above, at the size of this one
        for level, fusion in enumerate(self.fusion):
            near = [fused[level], *(self.resize[f"{j}_to_{level}"](x) for j, x in enumerate(finer))]
            sizes = [fusion.out_channels * count for count in (len(near), self.levels - len(near))]
            near_weight, far_weight = fusion.weight.split(sizes, 1)
            fused[level] = F.conv2d(near[0] if level == 0 else torch.cat(near, 1), near_weight, fusion.bias)
            if level + 1 < self.levels:
                far = F.conv2d(self._coarser(fused, level), far_weight)
                fused[level] = fused[level] + resized(far, fused[level])
                finer = [averaged(x) for x in [*finer, fused[level]]]
        return fused

    def _coarser(self, features: list[torch.Tensor], level: int) -> torch.Tensor:
        """Maps of all levels after ``level``, with its channels each, at the size of the first of them."""
        joined = None
        for source in reversed(range(level + 1, self.levels)):
            x = self.resize[f"{source}_to_{level}"](features[source])
            joined = x if joined is None else torch.cat([x, resized(joined, x)], 1)
        return joined


class TripleInteraction(nn.Module):
    """Exchange features between all levels, in the phase and in the amplitude domain.

    Args:
        width: channels of level 0; level i has 2^i·width.
        levels: number of levels.

    Raises:
        ValueError: a count below 1.

    Source: MITNet (arXiv 2308.06998), triple interaction module.
    """

    def __init__(self, width: int, levels: int = 3) -> None:
        super().__init__()
        self.phase = LevelInteraction(width, levels)
        self.amplitude = LevelInteraction(width, levels)

    def forward(
        self, phase: Sequence[torch.Tensor], amplitude: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Fuse both pyramids.

        Args:
            phase: one map per level, [B, 2^i·width, H_i, W_i]; each level has half the size of the
                one before it, rounded up.
            amplitude: the same shapes.

        Returns:
            The fused phase and the fused amplitude features, shapes as they came.

        Raises:
            ValueError: the number of levels or a shape does not fit.
        """
        self._check(phase=phase, amplitude=amplitude)
        return self.phase(phase), self.amplitude(amplitude)

    def _check(self, **pyramids: Sequence[torch.Tensor]) -> None:
        for name, pyramid in pyramids.items():
            if len(pyramid) != self.phase.levels:
                raise ValueError(f"{name}: expected {self.phase.levels} levels, got {len(pyramid)}")
            size = batch = None
            for level, feature in enumerate(pyramid):
                check_map(f"{name}[{level}]", feature, self.phase.width * 2**level, size, batch)
                batch, size = feature.shape[0], tuple(-(-side // 2) for side in feature.shape[2:])
