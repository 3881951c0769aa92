"""DepthNet: the depth estimation network of DCMPNet, dilated dense blocks at five sizes.

    encoder   DRDB(3), then four times conv3×3 stride 2, DRDB         24, 48, 96, 128 channels
    decoder   ConvTranspose4×4 stride 2, DRDB, three times            96, 48, 24 channels
              ConvTranspose4×4 stride 2 → 3, conv1×1 → 1

No skip connections, no activation outside the blocks. The depth map is disparity-like: 1 is near,
0 is far. Maps are [B, C, H, W], images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike

import torch
from torch import nn

from ..modules._checks import check_counts, check_map
from ..modules.dilated_dense import DRDB
from ._restoration import evaluation_mode
from .official import DEPTHNET_NAMES, load_official, to_official


class DepthNet(nn.Module):
    """Depth from a single image.

    Args:
        widths: channels at 1/2, 1/4, … of the size.
        growth: channels that each dense convolution of a block adds.

    Raises:
        ValueError: no width, or a count below 1.

    Source: "Depth Information Assisted Collaborative Mutual Promotion Network for Single Image
    Dehazing", CVPR 2024, arXiv 2403.01105.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128), growth: int = 32) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths: expected at least one level, got none")
        check_counts(**{f"widths[{level}]": width for level, width in enumerate(widths)}, growth=growth)
        self.widths = tuple(widths)
        self.growth = growth
        self.encoder = nn.Sequential(DRDB(3, growth))
        for before, after in pairwise([3, *widths]):
            self.encoder.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            self.encoder.append(DRDB(after, growth))
        self.decoder = nn.Sequential()
        for before, after in pairwise(reversed(widths)):
            self.decoder.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            self.decoder.append(DRDB(after, growth))
        self.decoder.append(nn.ConvTranspose2d(widths[0], 3, 4, stride=2, padding=1))
        self.to_depth = nn.Conv2d(3, 1, 1)

    @classmethod
    def from_official(cls, source: str | PathLike[str] | Mapping[str, object], **config: object) -> DepthNet:
        """Build the network of a checkpoint in the published format.

        Args:
            source: a ``.pt`` / ``.pth`` path or a state dict, possibly inside a dictionary or with a
                ``module.`` prefix.
            config: constructor's arguments, where they are not the published ones.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: the file holds more than tensors, or names or shapes do not fit: all
                missing, unknown and misshapen entries are listed.
        """
        model = cls(**config)
        load_official(model, source, DEPTHNET_NAMES)
        return model

    def to_official(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the published network: what ``from_official`` accepts."""
        return to_official(self, DEPTHNET_NAMES)

    @property
    def config(self) -> dict[str, int | list[int]]:
        """The constructor's arguments: ``DepthNet(**model.config)`` is the same network."""
        return {"widths": list(self.widths), "growth": self.growth}

    @property
    def size_multiple(self) -> int:
        """The sides of what ``forward`` returns are multiples of this: 2^levels, 16."""
        return 2 ** len(self.widths)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Estimate depth.

        Args:
            image: [B, 3, H, W] in [-1, 1], in the dtype of the weights.

        Returns:
            [B, 1, ⌈H/16⌉·16, ⌈W/16⌉·16]: the depth of the image is its top-left H×W.

        Raises:
            TypeError: no floating-point tensor.
            ValueError: the shape does not fit.
        """
        check_map("image", image, 3)
        return self.to_depth(self.decoder(self.encoder(image)))

    @torch.no_grad()
    def estimate(self, image: torch.Tensor) -> torch.Tensor:
        """Estimate depth without gradients, from an image as files hold it.

        Args:
            image: [B, 3, H, W] in [0, 1], any size from 1×1.

        Returns:
            [B, 1, H, W], not clamped.

        Raises:
            TypeError: no floating-point tensor.
            ValueError: the shape does not fit.
        """
        check_map("image", image, 3)
        with evaluation_mode(self):
            return self(2 * image - 1)[..., : image.shape[2], : image.shape[3]]
