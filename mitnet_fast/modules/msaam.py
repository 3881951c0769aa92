"""Multi-scale aggregation attention (MSAAM): three encoder levels weighed and fused for the decoder.

    a = conv1×1(ReLU(conv1×1([mean e1, mean e2, mean e3])))         one weight per level and sample
    F = [a1·e1, up2(a2·e2), up4(a3·e3)]                             nearest neighbour, full size
    fused2 = ReLU(IN(conv3×3, stride 2 (F))),  fused3 = ReLU(IN(conv5×5, stride 4 (F)))

e1, e2, e3 are [B, C_k, H/2^(k−1), W/2^(k−1)]; IN is instance normalisation without weights.

F is never built. A convolution over a map that was enlarged f times by repetition, with a stride
that f divides, meets each small pixel through the same kernel taps everywhere: adding those taps up
gives the equal convolution of the small map (`fold_taps`). So every level is convolved at its own
size, or at that of the result, and the full-size map of all channels is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import check_counts, check_map


def fold_taps(weight: torch.Tensor, factor: int) -> torch.Tensor:
    """The kernel that does on a small map what ``weight`` does on it enlarged by repetition.

    Tap 0 falls on the row above the enlarged pixel (padding 1), the following taps ``factor`` at a
    time on one small row.

    Args:
        weight: [Co, C, k, k], (k − 1) a multiple of ``factor``.
        factor: of the enlargement.

    Returns:
        [Co, C, 1 + (k − 1)/factor, 1 + (k − 1)/factor].
    """
    lead = factor - 1
    # pooling adds much faster than sum() over short dimensions; a divisor of its own is what ONNX drops
    return F.avg_pool2d(F.pad(weight, (lead, 0, lead, 0)), factor) * factor**2


class MSAAM(nn.Module):
    """Multi-scale aggregation attention over three levels of an encoder.

    Args:
        widths: channels C1, C2, C3 of the levels.
        hidden: channels of the hidden layer of the attention.

    Raises:
        ValueError: not three widths, or a count below 1.

    The published network also computes a full-size fusion (conv3×3, stride 1, to C1 channels) that
    it never uses. Its tensors are kept in ``unused_full_size``, so that checkpoints fit, and take no
    part.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), multi-scale aggregation attention module.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96), hidden: int = 128) -> None:
        super().__init__()
        if len(widths) != 3:
            raise ValueError(f"widths: expected three levels, got {list(widths)}")
        check_counts(**{f"widths[{level}]": width for level, width in enumerate(widths)}, hidden=hidden)
        self.widths = tuple(widths)
        total = sum(widths)
        self.attention = nn.Sequential(
            nn.Conv2d(total, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, len(widths), 1)
        )
        self.fuse2 = nn.Conv2d(total, widths[1], 3, stride=2, padding=1)
        self.fuse3 = nn.Conv2d(total, widths[2], 5, stride=4, padding=1)
        self.unused_full_size = nn.Conv2d(total, widths[0], 3, padding=1).requires_grad_(False)

    def forward(self, e1: torch.Tensor, e2: torch.Tensor, e3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weigh and fuse.

        Args:
            e1: [B, C1, H, W], H and W multiples of 4, at least 8.
            e2: [B, C2, H/2, W/2].
            e3: [B, C3, H/4, W/4].

        Returns:
            fused2 [B, C2, H/2, W/2] and fused3 [B, C3, H/4, W/4].

        Raises:
            ValueError: channels or sizes do not fit.
        """
        check_map("e1", e1, self.widths[0])
        height, width = e1.shape[2:]
        if height % 4 or width % 4 or min(height, width) < 8:  # one pixel has no instance statistics
            raise ValueError(f"e1: height and width must be multiples of 4 and at least 8, got {height}×{width}")
        check_map("e2", e2, self.widths[1], torch.Size((height // 2, width // 2)))
        check_map("e3", e3, self.widths[2], torch.Size((height // 4, width // 4)))

        average = torch.cat([level.mean((2, 3), keepdim=True) for level in (e1, e2, e3)], 1)
        scale1, scale2, scale3 = self.attention(average).split(1, 1)
        e1, e2, e3 = e1 * scale1, e2 * scale2, e3 * scale3

        full, half, quarter = self.fuse2.weight.split(self.widths, 1)
        halves = torch.cat([e2, F.interpolate(e3, scale_factor=2.0, mode="nearest")], 1)
        fused2 = F.conv2d(e1, full, self.fuse2.bias, stride=2, padding=1) + F.conv2d(
            F.pad(halves, (1, 0, 1, 0)), fold_taps(torch.cat([half, quarter], 1), 2)
        )

        full, half, quarter = self.fuse3.weight.split(self.widths, 1)
        fused3 = (
            F.conv2d(e1, full, self.fuse3.bias, stride=4, padding=1)
            + F.conv2d(e2, fold_taps(half, 2), stride=2, padding=1)
            + F.conv2d(F.pad(e3, (1, 0, 1, 0)), fold_taps(quarter, 4))
        )
        return F.relu(F.instance_norm(fused2)), F.relu(F.instance_norm(fused3))
