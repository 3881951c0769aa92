"""MITNet: dehazing in two stages, first the amplitude of the spectrum, then its phase.

Stage 1 restores an image out_1 with a U-Net of amplitude blocks. Its phase is then exchanged for the
input's, I' = irfft2(|rfft2(out_1)|·exp(i·angle(rfft2(I)))), and stage 2, a U-Net of phase blocks
whose decoder filters adaptively, restores out_2 from I' and the features of stage 1.

Level i has 2^i·width channels at 1/2^i of the size. Maps are [B, C, H, W], images in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from os import PathLike
from typing import NamedTuple

import torch
from torch import nn

from ..modules._checks import check_counts, check_slope
from ..modules.amplitude_phase import AmplitudePhaseBlock
from ..modules.dynamic_filter import DynamicFilterBlock
from ..modules.supervised_attention import SupervisedAttention
from ..modules.triple_interaction import TripleInteraction
from ..ops import amplitude_and_phase, recombine
from ..ops._checks import autocast_dtype
from ._restoration import reflect_to
from .official import MITNET_NAMES, load_official, read_official, to_official


class MITNetOutput(NamedTuple):
    """What the losses of MITNet need: both restored images, spectra and features.

    Attributes:
        restored: out_2, the restored image, [B, C, H, W].
        stage1: out_1, the image that stage 1 restores, [B, C, H, W].
        stage1_amplitude: |rfft2(out_1)|, [B, C, H, W//2 + 1].
        stage1_phase: angle(rfft2(out_1)) in radians, same shape.
        input_phase: angle(rfft2(I)) of the hazy input in radians, same shape.
        phase_features: p_i of the encoder of stage 2, [B, 2^i·width, H/2^i, W/2^i], i = 0, 1, ….
        amplitude_features: d_i of the decoder of stage 1, same shapes.
    """

    restored: torch.Tensor
    stage1: torch.Tensor
    stage1_amplitude: torch.Tensor
    stage1_phase: torch.Tensor
    input_phase: torch.Tensor
    phase_features: tuple[torch.Tensor, ...]
    amplitude_features: tuple[torch.Tensor, ...]


class AmplitudeDecoderLevel(nn.Module):
    """One level of the decoder of stage 1: upsample, join the encoder's features, one block."""

    def __init__(self, channels: int, negative_slope: float, spectral: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.skip = nn.Conv2d(channels, channels, 3, padding=1)
        self.block = AmplitudePhaseBlock(
            2 * channels, channels, "amplitude", negative_slope=negative_slope, spectral=spectral
        )

    def forward(self, x: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """[B, 2C, H, W] and the encoder's [B, C, 2H, 2W] → [B, C, 2H, 2W]."""
        return self.block(self.up(x), joined=self.skip(encoded))


class PhaseDecoderLevel(nn.Module):
    """One level of the decoder of stage 2: upsample, filter adaptively, one block."""

    def __init__(self, channels: int, negative_slope: float) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.filter = DynamicFilterBlock(channels)
        self.block = AmplitudePhaseBlock(2 * channels, channels, "phase", negative_slope=negative_slope)

    def forward(self, x: torch.Tensor, phase: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
        """[B, 2C, H, W] and two guiding maps [B, C, 2H, 2W] → [B, C, 2H, 2W]."""
        x = self.up(x)
        return self.block(x, joined=self.filter(x, phase, amplitude))


class MITNet(nn.Module):
    """Mutual information-driven triple interaction network for image dehazing.

    Args:
        in_channels: channels of the image.
        width: channels at full size; level i has 2^i·width.
        depth: number of levels of either U-Net, at least 2.
        negative_slope: of every LeakyReLU.
        decoder_spectral: give the decoder of stage 1 its spectral branch, as the paper draws it.
            The published weights belong to a decoder without it (there the branch is built, but
            never run: 18 tensors at depth 4 take no part), hence False.

    Raises:
        ValueError: an argument outside its range.

    Source: "Mutual Information-driven Triple Interaction Network for Efficient Image Dehazing",
    ACM MM 2023, arXiv 2308.06998.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 20,
        depth: int = 4,
        negative_slope: float = 0.2,
        decoder_spectral: bool = False,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, width=width, depth=depth)
        check_slope(negative_slope)
        if depth < 2:
            raise ValueError(f"depth: expected at least 2 levels, got {depth}")
        self.in_channels = in_channels
        self.width = width
        self.depth = depth
        self.negative_slope = negative_slope
        self.decoder_spectral = decoder_spectral
        upwards = [width * 2**level for level in reversed(range(depth - 1))]

        self.amplitude_stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.amplitude_encoder = self._encoder("amplitude")
        self.amplitude_decoder = nn.ModuleList(
            AmplitudeDecoderLevel(channels, negative_slope, decoder_spectral) for channels in upwards
        )
        self.supervised_attention = SupervisedAttention(width, in_channels)

        self.phase_stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.stage_fusion = nn.Conv2d(2 * width, width, 1)
        self.phase_encoder = self._encoder("phase")
        self.triple_interaction = TripleInteraction(width, depth - 1)
        self.phase_decoder = nn.ModuleList(PhaseDecoderLevel(channels, negative_slope) for channels in upwards)
        self.to_image = nn.Conv2d(width, in_channels, 3, padding=1)

    def _encoder(self, mode: str) -> nn.ModuleList:
        """Blocks of all levels; only stage 2 (phase) receives features of an earlier stage."""
        channels = [self.width, *(self.width * 2**level for level in range(self.depth))]
        return nn.ModuleList(
            AmplitudePhaseBlock(
                channels[level],
                channels[level + 1],
                mode,
                negative_slope=self.negative_slope,
                cross_stage=mode == "phase" and level < self.depth - 1,
                downsample=level < self.depth - 1,
            )
            for level in range(self.depth)
        )

    @classmethod
    def from_official(
        cls,
        source: str | PathLike[str] | Mapping[str, object],
        *,
        negative_slope: float = 0.2,
        decoder_spectral: bool = False,
    ) -> MITNet:
        """Build the network of a checkpoint in the published format.

        Channels, width and depth are read off the checkpoint; the other two leave no trace in it.

        Args:
            source: a ``.pt`` / ``.pth`` path or a state dict, possibly inside a dictionary or with a
                ``module.`` prefix.
            negative_slope: see the class.
            decoder_spectral: see the class; True only for weights that were trained that way.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: the file holds more than tensors, or names or shapes do not fit: all
                missing, unknown and misshapen entries are listed.
        """
        state = read_official(source)
        stem = state.get("conv_01.weight", torch.empty(20, 3, 3, 3)).shape
        width, in_channels = stem[:2] if len(stem) == 4 and all(stem) else (20, 3)
        # either encoder tells the depth, so that an entry missing from one is reported as missing
        levels = {int(match[1]) for match in map(re.compile(r"down_path_[12]\.(\d+)\.").match, state) if match}
        depth = next(level for level in count() if level not in levels)
        model = cls(in_channels, width, depth if depth > 1 else 4, negative_slope, decoder_spectral)
        load_official(model, state, MITNET_NAMES)
        return model

    def to_official(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the published network: what ``from_official`` accepts."""
        return to_official(self, MITNET_NAMES)

    @property
    def config(self) -> dict[str, int | float | bool]:
        """The constructor's arguments: ``MITNet(**model.config)`` is the same network."""
        return {
            "in_channels": self.in_channels,
            "width": self.width,
            "depth": self.depth,
            "negative_slope": self.negative_slope,
            "decoder_spectral": self.decoder_spectral,
        }

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of in ``forward``: 2^(depth − 1)."""
        return 2 ** (self.depth - 1)

    def forward(self, image: torch.Tensor) -> MITNetOutput:
        """Restore an image and return everything that the losses need.

        Args:
            image: [B, in_channels, H, W] hazy image in [0, 1], H and W multiples of
                ``size_multiple`` (8 at depth 4), in the dtype of the weights.

        Returns:
            See :class:`MITNetOutput`.

        Raises:
            TypeError: no floating-point tensor, or outside autocast not the dtype of the weights.
            ValueError: channels or sizes do not fit; ``restore`` takes any size.
        """
        self._check_image(image)
        height, width = image.shape[2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"image: height and width must be multiples of {self.size_multiple}, got {height}×{width}; "
                "restore() takes any size"
            )
        stage1, attended, encoded, decoded = self._stage1(image)
        x, phase_features = self._encode_phase(self._enter_stage2(image, stage1, attended), encoded, decoded)
        restored = self._decode_phase(image, x, *self.triple_interaction(phase_features, decoded))
        stage1_amplitude, stage1_phase = amplitude_and_phase(stage1)
        return MITNetOutput(
            restored,
            stage1,
            stage1_amplitude,
            stage1_phase,
            amplitude_and_phase(image)[1],
            tuple(phase_features),
            tuple(decoded),
        )

    @torch.no_grad()
    def restore(self, image: torch.Tensor) -> torch.Tensor:
        """Restore an image of any size, without gradients and without what only training needs.

        The image is continued by reflection at the right and bottom to multiples of
        ``size_multiple`` (repeatedly where it is too small for one reflection), restored and
        cropped.

        Args:
            image: [B, in_channels, H, W] hazy image in [0, 1], any size from 1×1.

        Returns:
            [B, in_channels, H, W], not clamped.

        Raises:
            TypeError: no floating-point tensor, or outside autocast not the dtype of the weights.
            ValueError: the channels do not fit, or the image has no pixel.
        """
        self._check_image(image)
        height, width = image.shape[2:]
        multiple = self.size_multiple
        image = reflect_to(image, *(-(-side // multiple) * multiple for side in (height, width)))
        stage1, x, encoded, decoded = self._stage1(image)
        x = self._enter_stage2(image, stage1, x)
        x, phase_features = self._encode_phase(x, encoded, decoded)
        del encoded  # the full-size maps decide how large an image fits into memory
        phase, amplitude = self.triple_interaction(phase_features, decoded)
        del phase_features, decoded
        return self._decode_phase(image, x, phase, amplitude)[..., :height, :width]

    def _stage1(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """out_1, the attended features, and e_i and d_i of levels 0, 1, …, depth − 2."""
        x = self.amplitude_stem(image)
        encoded = []
        for block in self.amplitude_encoder:
            if block.downsample is None:
                x = block(x)
            else:
                full_size, x = block(x)
                encoded.append(full_size)
        decoded = []
        for decoder, skip in zip(self.amplitude_decoder, reversed(encoded), strict=True):
            x = decoder(x, skip)
            decoded.insert(0, x)
        attended, stage1 = self.supervised_attention(x, image)
        return stage1, attended, encoded, decoded

    def _enter_stage2(self, image: torch.Tensor, stage1: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Features of the image that has the amplitude of out_1 and the phase of the input."""
        return self.stage_fusion(torch.cat([self.phase_stem(recombine(stage1, image)), attended], 1))

    def _encode_phase(
        self, x: torch.Tensor, encoded: list[torch.Tensor], decoded: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The deepest map of stage 2, and p_i of levels 0, 1, …, depth − 2."""
        phase_features = []
        for level, block in enumerate(self.phase_encoder):
            if block.downsample is None:
                x = block(x)
            else:
                full_size, x = block(x, encoded[level], decoded[level])
                phase_features.append(full_size)
        return x, phase_features

    def _decode_phase(
        self, image: torch.Tensor, x: torch.Tensor, phase: list[torch.Tensor], amplitude: list[torch.Tensor]
    ) -> torch.Tensor:
        """out_2; empties the lists of P_i and A_i on its way up."""
        for decoder in self.phase_decoder:
            x = decoder(x, phase.pop(), amplitude.pop())
        return self.to_image(x) + image

    def _check_image(self, image: torch.Tensor) -> None:
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            what = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
            raise TypeError(f"image: expected a floating-point tensor with values in [0, 1], got {what}")
        if image.dim() != 4 or image.shape[1] != self.in_channels or 0 in image.shape[2:]:
            raise ValueError(
                f"image: expected shape [B, {self.in_channels}, H, W] with at least one pixel, got {list(image.shape)}"
            )
        dtype = self.to_image.weight.dtype
        if image.dtype != dtype and autocast_dtype(image) is None:
            raise TypeError(f"image: expected {dtype}, the dtype of the weights, got {image.dtype}")
