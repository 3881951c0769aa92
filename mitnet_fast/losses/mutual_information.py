"""Mutual information regulariser of MITNet, on phase and amplitude features of one level.

Each map is reduced to a Gaussian latent of 4 values,

    features → conv4×4 s2 → LeakyReLU(0.01) → conv4×4 s2 → flatten → mean, log σ = tanh(linear), each
    z = mean + ε·exp(log σ / 2),   ε ~ N(0, 1)

and with z1, z2 of the two maps and N1, N2 = N(mean, exp(log σ)) (the scale is exp(log σ), although
the noise is scaled by its root: so the published network has it)

    loss = BCE(sigmoid(z1), sigmoid(z2)) + BCE(sigmoid(z2), sigmoid(z1)) − KL(N1‖N2) − KL(N2‖N1)

where the second argument of each cross-entropy is a constant. The two divergences together are

    Σ over the latent of 2·sinh²(l1 − l2) + ½·(m1 − m2)²·(exp(−2·l1) + exp(−2·l2)),   l = log σ
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
import torch.nn.functional as F
from torch import nn

from ..models.official import MUTUAL_INFORMATION_NAMES, load_official, read_official, to_official
from ..modules._checks import check_counts, check_map
from ..ops._checks import without_autocast

LATENT = 4
OFFICIAL_SIZES = (64, 32, 16)  # sides of the reduced maps of levels 0, 1, 2 for patches of 256 pixels
POOLED_SIZE = 16


class LatentEncoder(nn.Module):
    """Mean and log σ of the latent of a feature map, one pair of linear layers per size of the reduced map."""

    def __init__(self, channels: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
        )
        self.mean = nn.ModuleDict({str(size): nn.Linear(channels * size**2, LATENT) for size in sizes})
        self.log_scale = nn.ModuleDict({str(size): nn.Linear(channels * size**2, LATENT) for size in sizes})

    def forward(self, features: torch.Tensor, pooled_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, C, H, W] → two [B, 4] in [-1, 1]."""
        reduced = self.convolutions(features)
        if pooled_size is not None:
            reduced = F.adaptive_avg_pool2d(reduced, pooled_size)
        size = str(reduced.shape[-1])
        flat = reduced.flatten(1)
        return torch.tanh(self.mean[size](flat)), torch.tanh(self.log_scale[size](flat))


class MutualInformation(nn.Module):
    """Mutual information regulariser between the phase and the amplitude features of one level.

    There are two modes because the published regulariser cannot be used as it is. Its linear layers
    fit only 256-pixel patches, its cross-entropy is a sum and so grows with the batch, and its
    parameters are in no optimizer: it compares random projections that stay as they were drawn.
    ``mode="official"`` is exactly that, frozen, for comparison with the published training.
    ``mode="scalable"`` pools the reduced maps to 16×16, which takes patches of any size with one
    set of linear layers, averages the cross-entropy over batch and latent, and is meant to be
    trained with the network.

    Args:
        channels: channels of the features.
        mode: "scalable" or "official".

    Raises:
        ValueError: a channel count below 1 or an unknown mode.

    Source: MITNet (arXiv 2308.06998), mutual information-driven regularisation.
    """

    def __init__(self, channels: int, mode: str = "scalable") -> None:
        super().__init__()
        check_counts(channels=channels)
        if mode not in ("scalable", "official"):
            raise ValueError(f"mode: got {mode!r}, allowed are 'scalable' and 'official'")
        self.channels = channels
        self.mode = mode
        sizes = OFFICIAL_SIZES if mode == "official" else (POOLED_SIZE,)
        self.phase = LatentEncoder(channels, sizes)
        self.amplitude = LatentEncoder(channels, sizes)
        if mode == "official":
            self.requires_grad_(False)

    @classmethod
    def from_official(cls, source: str | PathLike[str] | Mapping[str, object]) -> MutualInformation:
        """Build the regulariser (``mode="official"``) of a checkpoint in the published format.

        Args:
            source: a path or a state dict; the channels are read off it.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: lists every missing, unknown and misshapen entry.
        """
        state = read_official(source)
        module = cls(next(iter(state.get("layer1.bias", torch.empty(80)).shape), 0) or 80, "official")
        load_official(module, state, MUTUAL_INFORMATION_NAMES)
        return module

    def to_official(self) -> dict[str, torch.Tensor]:
        """The weights under the published names.

        Raises:
            ValueError: in scalable mode, which the published format cannot hold.
        """
        if self.mode != "official":
            raise ValueError(f"mode: the published format holds the 'official' regulariser only, this is {self.mode!r}")
        return to_official(self, MUTUAL_INFORMATION_NAMES)

    def forward(
        self,
        phase_features: torch.Tensor,
        amplitude_features: torch.Tensor,
        noise: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The regulariser of a batch.

        Args:
            phase_features: [B, channels, H, W], at least 4×4; with ``mode="official"`` 256×256,
                128×128 or 64×64.
            amplitude_features: the same shape.
            noise: ε of the phase and of the amplitude latent, [B, 4] each; drawn if None.
            generator: for the draw, on the device of the features.

        Returns:
            Scalar; may be negative.

        Raises:
            ValueError: shapes do not fit.
        """
        check_map("phase_features", phase_features, self.channels)
        batch, _, height, width = phase_features.shape
        check_map("amplitude_features", amplitude_features, self.channels, phase_features.shape[2:], batch)
        sizes = [4 * size for size in OFFICIAL_SIZES]
        if self.mode == "official" and (height != width or height not in sizes):
            raise ValueError(
                f"phase_features: mode='official' takes {' or '.join(f'{s}×{s}' for s in sizes)} pixels (levels of a "
                f"256-pixel patch), got {height}×{width}; mode='scalable' takes any size"
            )
        if min(height, width) < 4:
            raise ValueError(f"phase_features: needs at least 4×4 pixels, got {height}×{width}")
        pooled_size = None if self.mode == "official" else POOLED_SIZE
        encoded = self.phase(phase_features, pooled_size) + self.amplitude(amplitude_features, pooled_size)
        with without_autocast(phase_features):
            dtype = torch.promote_types(encoded[0].dtype, torch.float32)
            mean1, log_scale1, mean2, log_scale2 = (value.to(dtype) for value in encoded)
            if noise is None:
                noise1, noise2 = torch.randn((2, batch, LATENT), generator=generator, dtype=dtype, device=mean1.device)
            else:
                noise1, noise2 = noise
                check_noise(batch, noise1, noise2)
            z1 = mean1 + noise1 * torch.exp(log_scale1 / 2)
            z2 = mean2 + noise2 * torch.exp(log_scale2 / 2)
            reduction = "sum" if self.mode == "official" else "mean"
            cross_entropy = F.binary_cross_entropy_with_logits(
                z1, torch.sigmoid(z2).detach(), reduction=reduction
            ) + F.binary_cross_entropy_with_logits(z2, torch.sigmoid(z1).detach(), reduction=reduction)
            precision = torch.exp(-2 * log_scale1) + torch.exp(-2 * log_scale2)
            divergence = 2 * torch.sinh(log_scale1 - log_scale2) ** 2 + (mean1 - mean2) ** 2 * precision / 2
            return cross_entropy - divergence.sum(1).mean()


def check_noise(batch: int, *noise: torch.Tensor) -> None:
    """Raise unless every tensor is [batch, 4]."""
    for index, value in enumerate(noise):
        if tuple(value.shape) != (batch, LATENT):
            raise ValueError(
                f"noise[{index}]: expected shape [B, {LATENT}] = [{batch}, {LATENT}], got {list(value.shape)}"
            )
