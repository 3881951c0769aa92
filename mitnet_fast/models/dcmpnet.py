"""DCMPNet: dehazing by local and global features, assisted by a U-Net prior and by depth.

    prior       d1, d2, d3 = conv1×1 of the U-Net's features at 1/4, 1/2 and full size
    depth       d = DRDB(DepthNet(x)), one channel
    encoder     e1 = LEGM(conv1×1[embed(x), d3, d])                     embed = conv3×3
                e2 = LEGM(conv1×1[m1, d2]),   m1 = conv2×2 stride 2 (e1)
                e3 = LEGM(conv1×1[m2, d1]),   m2 = conv2×2 stride 2 (e2)
    fusion      f2, f3 = MSAAM(e1, e2, e3)
    decoder     y = up(conv1×1[f3, m2])                                 up = conv1×1, pixel shuffle 2
                y = LEGM(conv1×1[MFM(y, skip(e2)) + y, d2])
                y = up(conv1×1[f2, y])
                y = LEGM(conv1×1[MFM(y, skip(e1)) + y, d3])
    restored    conv3×3(y) + x

e3 enters the decoder through MSAAM alone, as in the published network. The input is continued by
reflection to multiples of 4, the result cropped. Maps are [B, C, H, W], images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..modules._checks import check_counts, check_map
from ..modules.dilated_dense import DRDB
from ..modules.legm import LEGM, relative_offsets
from ..modules.modulation_fusion import MFM
from ..modules.msaam import MSAAM
from ..modules.unet_prior import UNetPrior
from ..reference.window_attention import table_rows
from ._restoration import evaluation_mode, reflect_to
from .depthnet import DepthNet
from .official import DCMPNET_NAMES, load_official, to_official


class DCMPNetOutput(NamedTuple):
    """What DCMPNet returns.

    Attributes:
        restored: [B, 3, H, W] in the range of the input.
        prior_features: the projected d1, d2, d3 of the input continued to multiples of 4, H' × W':
            [B, widths[2], H'/4, W'/4], [B, widths[1], H'/2, W'/2], [B, widths[0], H', W'].
    """

    restored: torch.Tensor
    prior_features: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Upsample(nn.Sequential):
    """conv1×1 to four times the channels, then pixel shuffle to twice the size."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, 4 * channels, 1), nn.PixelShuffle(2))


class DCMPNet(nn.Module):
    """The dehazing network of the depth-assisted collaborative mutual promotion framework.

    The defaults are the published network: 17.36M parameters. Ten of its tensors (37,067 values) take
    no part in the computation; they are kept so that checkpoints fit, and do not require gradients.

    Args:
        widths: channels at full, half and quarter size.
        depths: blocks of the five LEGM stages: three of the encoder, two of the decoder.
        heads: attention heads of the stages, divisors of their channels.
        mlp_ratios: hidden channels of the stages' pointwise networks, as multiples of the channels.
        attention_ratios: share of each stage's blocks, counted from the last, with attention.
        window_size: of the attention, in pixels.
        prior_widths: channels of the U-Net prior's five levels.
        depth_widths: channels of the depth branch, see :class:`DepthNet`.
        growth: channels that each dense convolution of the depth branch adds.
        share_depth: take the depth map from the depth estimation network, as the paper describes,
            instead of from a branch of its own, as the published weights do: ``forward`` and
            ``restore`` then need ``depth_prior``.

    Raises:
        ValueError: an argument outside its range.

    Source: "Depth Information Assisted Collaborative Mutual Promotion Network for Single Image
    Dehazing", CVPR 2024, arXiv 2403.01105; blocks after DehazeFormer, arXiv 2204.03883.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (24, 48, 96),
        depths: Sequence[int] = (8, 8, 8, 4, 4),
        heads: Sequence[int] = (2, 4, 6, 1, 1),
        mlp_ratios: Sequence[float] = (2, 4, 4, 2, 2),
        attention_ratios: Sequence[float] = (1 / 4, 1 / 2, 3 / 4, 0, 0),
        window_size: int = 8,
        prior_widths: Sequence[int] = (64, 128, 256, 512, 512),
        depth_widths: Sequence[int] = (24, 48, 96, 128),
        growth: int = 32,
        share_depth: bool = False,
    ) -> None:
        super().__init__()
        stages = {"depths": depths, "heads": heads, "mlp_ratios": mlp_ratios, "attention_ratios": attention_ratios}
        for name, values in stages.items():
            if len(values) != 5:
                raise ValueError(f"{name}: expected five stages, got {list(values)}")
        check_counts(**{f"depths[{stage}]": depth for stage, depth in enumerate(depths)})
        self._config = {
            "widths": list(widths),
            **{name: list(values) for name, values in stages.items()},
            "window_size": window_size,
            "prior_widths": list(prior_widths),
            "depth_widths": list(depth_widths),
            "growth": growth,
            "share_depth": share_depth,
        }
        self.share_depth = share_depth
        self.msaam = MSAAM(widths)
        width1, width2, width3 = widths

        def legm(stage: int, channels: int) -> LEGM:
            return LEGM(
                channels,
                depths[stage],
                heads[stage],
                mlp_ratio=mlp_ratios[stage],
                attention_ratio=attention_ratios[stage],
                window_size=window_size,
                network_depth=sum(depths),
            )

        self.prior = UNetPrior(3, prior_widths)
        self.prior_projections = nn.ModuleList(
            nn.Conv2d(before, after, 1)
            for before, after in zip(self.prior.out_channels, (width3, width2, width1), strict=True)
        )
        self.depth_branch = None if share_depth else DepthNet(depth_widths, growth)
        self.depth_block = DRDB(1, growth)

        self.embed = nn.Conv2d(3, width1, 3, padding=1, padding_mode="reflect")
        self.join1 = nn.Conv2d(2 * width1 + 1, width1, 1)
        self.legm1 = legm(0, width1)
        self.merge1 = nn.Conv2d(width1, width2, 2, stride=2)
        self.join2 = nn.Conv2d(2 * width2, width2, 1)
        self.legm2 = legm(1, width2)
        self.merge2 = nn.Conv2d(width2, width3, 2, stride=2)
        self.join3 = nn.Conv2d(2 * width3, width3, 1)
        self.legm3 = legm(2, width3)

        self.decode1 = nn.Conv2d(2 * width3, width3, 1)
        self.up1 = Upsample(width3, width2)
        self.skip2 = nn.Conv2d(width2, width2, 1)
        self.mfm1 = MFM(width2)
        self.join4 = nn.Conv2d(2 * width2, width2, 1)
        self.legm4 = legm(3, width2)
        self.decode2 = nn.Conv2d(2 * width2, width2, 1)
        self.up2 = Upsample(width2, width1)
        self.skip1 = nn.Conv2d(width1, width1, 1)
        self.mfm2 = MFM(width1)
        self.join5 = nn.Conv2d(2 * width1, width1, 1)
        self.legm5 = legm(4, width1)
        self.to_image = nn.Conv2d(width1, 3, 3, padding=1, padding_mode="reflect")

        self.unused = nn.ModuleDict(
            {
                "conv_fu": nn.Conv2d(width1 + 1, width1, 1),
                "ccc": nn.Conv2d(4, 3, 3, padding=1),
                "conv11": nn.Conv2d(1, 1, 3, padding=1),
                "conv22": nn.Conv2d(1, 1, 3, padding=1),
            }
        ).requires_grad_(False)

    @classmethod
    def from_official(cls, source: str | PathLike[str] | Mapping[str, object], **config: object) -> DCMPNet:
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
        load_official(model, source, DCMPNET_NAMES, model._relative_positions())
        return model

    def to_official(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the published network: what ``from_official`` accepts."""
        return to_official(self, DCMPNET_NAMES, self._relative_positions())

    def _relative_positions(self) -> dict[str, torch.Tensor]:
        """The constants of the published checkpoints: log-spaced offsets of every pair in a window."""
        window_size = self._config["window_size"]
        positions = relative_offsets(window_size)[table_rows(window_size)]  # [w², w², 2]
        return {
            f"legm{stage}.blocks.{index}.attn.attn.relative_positions": positions
            for stage, legm in enumerate((self.legm1, self.legm2, self.legm3, self.legm4, self.legm5), 1)
            for index, block in enumerate(legm.blocks)
            if block.mix.heads
        }

    @property
    def config(self) -> dict[str, int | bool | list[int] | list[float]]:
        """The constructor's arguments: ``DCMPNet(**model.config)`` is the same network."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self._config.items()}

    @property
    def smallest_side(self) -> int:
        """Height and width, continued to multiples of 4, from which every stage can pad by reflection."""
        stages = ((self.legm1, 1), (self.legm2, 2), (self.legm3, 4), (self.legm4, 2), (self.legm5, 1))
        needed = max(self.prior.smallest_side, *(legm.smallest_side * scale for legm, scale in stages))
        return -(-needed // 4) * 4

    def forward(self, image: torch.Tensor, depth_prior: torch.Tensor | None = None) -> DCMPNetOutput:
        """Restore an image.

        Args:
            image: [B, 3, H, W] hazy image in [-1, 1], in the dtype of the weights; H and W must
                reach ``smallest_side`` (28) when continued to multiples of 4.
            depth_prior: with ``share_depth``, the depth estimation network's map of the hazy image,
                [B, 1, H, W]; gradients do not flow into it. Without ``share_depth``, None.

        Returns:
            See :class:`DCMPNetOutput`.

        Raises:
            TypeError: no floating-point tensor.
            ValueError: shapes do not fit, the image is too small (``restore`` takes any size), or
                ``depth_prior`` is missing or not asked for.
        """
        self._check(image, depth_prior)
        height, width = image.shape[2:]
        padded_height, padded_width = (-(-side // 4) * 4 for side in (height, width))
        if min(padded_height, padded_width) < self.smallest_side:
            raise ValueError(
                f"image: height and width must be at least {self.smallest_side - 3}, got {height}×{width}; "
                "restore() takes any size"
            )
        pad = (0, padded_width - width, 0, padded_height - height)
        x = F.pad(image, pad, mode="reflect") if any(pad) else image

        d1, d2, d3 = prior = tuple(
            projection(features) for projection, features in zip(self.prior_projections, self.prior(x), strict=True)
        )
        if self.depth_branch is not None:
            depth = self.depth_branch(x)[..., :padded_height, :padded_width]
        else:
            depth = depth_prior.detach()
            depth = F.pad(depth, pad, mode="reflect") if any(pad) else depth

        e1 = self.legm1(self.join1(torch.cat([self.embed(x), d3, self.depth_block(depth)], 1)))
        e2 = self.legm2(self.join2(torch.cat([self.merge1(e1), d2], 1)))
        merged = self.merge2(e2)
        e3 = self.legm3(self.join3(torch.cat([merged, d1], 1)))
        fused2, fused3 = self.msaam(e1, e2, e3)

        y = self.up1(self.decode1(torch.cat([fused3, merged], 1)))
        y = self.mfm1([y, self.skip2(e2)]) + y
        y = self.legm4(self.join4(torch.cat([y, d2], 1)))
        y = self.up2(self.decode2(torch.cat([fused2, y], 1)))
        y = self.mfm2([y, self.skip1(e1)]) + y
        y = self.legm5(self.join5(torch.cat([y, d3], 1)))
        restored = self.to_image(y) + x
        return DCMPNetOutput(restored[..., :height, :width], prior)

    @torch.no_grad()
    def restore(self, image: torch.Tensor, depth_prior: torch.Tensor | None = None) -> torch.Tensor:
        """Restore an image of any size, without gradients and in evaluation mode.

        A side below ``smallest_side`` is continued by reflection at the right and bottom (repeatedly
        where it is too small for one reflection) and cropped afterwards.

        Args:
            image: [B, 3, H, W] hazy image in [0, 1], any size from 1×1.
            depth_prior: as in ``forward``.

        Returns:
            [B, 3, H, W], not clamped.

        Raises:
            TypeError: no floating-point tensor.
            ValueError: shapes do not fit, or ``depth_prior`` is missing or not asked for.
        """
        self._check(image, depth_prior)
        height, width = image.shape[2:]
        target = (max(height, self.smallest_side), max(width, self.smallest_side))
        image = reflect_to(image, *target)
        if depth_prior is not None:
            depth_prior = reflect_to(depth_prior, *target)
        with evaluation_mode(self):
            restored = self(2 * image - 1, depth_prior).restored
        return (restored[..., :height, :width] + 1) / 2

    def _check(self, image: torch.Tensor, depth_prior: torch.Tensor | None) -> None:
        check_map("image", image, 3)
        if 0 in image.shape[2:]:
            raise ValueError(f"image: needs at least one pixel, got shape {list(image.shape)}")
        if not self.share_depth and depth_prior is not None:
            raise ValueError("depth_prior: only a network built with share_depth=True takes one")
        if self.share_depth and depth_prior is None:
            raise ValueError("depth_prior: a network built with share_depth=True needs the depth of the hazy image")
        if depth_prior is not None:
            check_map("depth_prior", depth_prior, 1, image.shape[2:])
            if depth_prior.shape[0] != image.shape[0]:
                raise ValueError(
                    f"depth_prior: expected a batch of {image.shape[0]} like image, got {depth_prior.shape[0]}"
                )


class DepthSharingDCMPNet(nn.Module):
    """DCMPNet with ``share_depth`` together with the depth network whose map it takes.

    Args:
        dehazing: a DCMPNet built with ``share_depth=True``.
        depth: the depth network that it was trained with.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105); see :class:`DCMPNet`.
    """

    def __init__(self, dehazing: DCMPNet, depth: DepthNet) -> None:
        super().__init__()
        self.dehazing = dehazing
        self.depth = depth

    @classmethod
    def from_config(cls, dehazing: Mapping[str, Any], depth: Mapping[str, Any]) -> DepthSharingDCMPNet:
        """Build both networks from what :attr:`config` holds."""
        return cls(DCMPNet(**dehazing), DepthNet(**depth))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of :meth:`from_config`."""
        return {"dehazing": self.dehazing.config, "depth": self.depth.config}

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        """Restore hazy images [B, 3, H, W] in [0, 1] of any size; see :meth:`DCMPNet.restore`."""
        return self.dehazing.restore(image, self.depth.estimate(image))
