"""Supervised attention of MITNet: features are gated by the image that they restore.

    restored = conv3×3(features) + image
    attended = conv3×3(features) · sigmoid(conv3×3(restored)) + features

The restored image gets a loss of its own, which supervises the attention. Maps are [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import nn

from ._checks import check_counts, check_map


class SupervisedAttention(nn.Module):
    """Restore an image from features and gate the features by it.

    Args:
        channels: channels of the features.
        image_channels: channels of the image.

    Raises:
        ValueError: a channel count below 1.

    Source: MITNet (arXiv 2308.06998), supervised attention between the stages, after MPRNet
    (arXiv 2102.02808).
    """

    def __init__(self, channels: int, image_channels: int = 3) -> None:
        super().__init__()
        check_counts(channels=channels, image_channels=image_channels)
        self.channels = channels
        self.image_channels = image_channels
        self.to_features = nn.Conv2d(channels, channels, 3, padding=1)
        self.to_image = nn.Conv2d(channels, image_channels, 3, padding=1)
        self.to_gate = nn.Conv2d(image_channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Restore and attend.

        Args:
            features: [B, channels, H, W].
            image: [B, image_channels, H, W], the degraded image.

        Returns:
            The attended features [B, channels, H, W] and the restored image
            [B, image_channels, H, W].

        Raises:
            ValueError: shapes do not fit.
        """
        check_map("features", features, self.channels)
        check_map("image", image, self.image_channels, features.shape[2:], features.shape[0])
        restored = self.to_image(features) + image
        gate = torch.sigmoid(self.to_gate(restored))
        return self.to_features(features) * gate + features, restored
