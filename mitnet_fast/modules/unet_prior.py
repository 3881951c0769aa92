"""U-Net prior of DCMPNet: image features from a plain U-Net at full, half and quarter size.

    e_0 = double(x), e_k = double(maxpool(e_{k−1})), k = 1 … 4       double = twice conv3×3, BN, ReLU
    u_4 = e_4, u_k = double([e_k, up(u_{k+1})]), k = 3 … 0           up = bilinear ×2, aligned corners
    d1 = u_2, d2 = u_1, d3 = conv1×1(u_0)

Maps are [B, C, H, W]. Max-pooling drops odd last rows and columns; the enlarged map is then padded
with zeros to the size of e_k, half of the difference (rounded down) at the left and top.

In evaluation mode without gradients convolution, normalisation and ReLU are one fused operator, which reads
e_k and the enlarged map where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import conv_relu
from ._checks import check_counts, check_map


class DoubleConv(nn.Sequential):
    """Twice conv3×3, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor, joined: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C1, H, W] and, if given, [B, C2, H, W] with C1 + C2 = in_channels → [B, channels, H, W]."""
        if self.training or torch.is_grad_enabled():
            return super().forward(x if joined is None else torch.cat([x, joined], 1))
        for convolution, norm in ((self[0], self[1]), (self[3], self[4])):
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = torch.addcmul(norm.bias, convolution.bias - norm.running_mean, scale)
            x, joined = conv_relu(x, joined, convolution.weight, scale, shift), None
        return x


class UNetPrior(nn.Module):
    """Features of an image at three sizes from a U-Net of five levels.

    Args:
        in_channels: channels of the image.
        widths: channels of the encoder's levels, five of them.

    Raises:
        ValueError: not five widths, or a count below 1.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105); the network is U-Net (arXiv 1505.04597).
    """

    smallest_side = 16  # four times halved

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"widths: expected five levels, got {list(widths)}")
        check_counts(**{f"widths[{level}]": width for level, width in enumerate(widths)}, in_channels=in_channels)
        self.in_channels = in_channels
        # channels of d1, d2, d3: a decoder level returns the width of the level above it
        self.out_channels = (widths[1], widths[0], in_channels)
        self.encoder = nn.ModuleList(DoubleConv(before, after) for before, after in pairwise([in_channels, *widths]))
        # level k joins e_k with the enlarged u_{k+1}, which has the channels of e_k (e_4 at the bottom)
        below = [*widths[:3], widths[4]]
        self.decoder = nn.ModuleList(
            DoubleConv(widths[level] + below[level], widths[max(level - 1, 0)]) for level in (3, 2, 1, 0)
        )
        self.out = nn.Conv2d(widths[0], in_channels, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Extract the features.

        Args:
            image: [B, in_channels, H, W], at least 16×16, H and W multiples of 4.

        Returns:
            d1 [B, widths[1], H/4, W/4], d2 [B, widths[0], H/2, W/2] and d3 [B, in_channels, H, W].

        Raises:
            ValueError: channels or sizes do not fit.
        """
        check_map("image", image, self.in_channels)
        height, width = image.shape[2:]
        if min(height, width) < self.smallest_side or height % 4 or width % 4:
            raise ValueError(
                f"image: height and width must be multiples of 4 and at least {self.smallest_side}, "
                f"got {height}×{width}"
            )
        skips = []
        x = self.encoder[0](image)
        for level in self.encoder[1:]:
            skips.append(x)
            x = level(F.max_pool2d(x, 2))
        decoded = []
        for level in self.decoder:
            skip = skips.pop()
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            if rows or columns:
                x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            x = level(skip, x)
            decoded.append(x)
        return decoded[1], decoded[2], self.out(decoded[3])
