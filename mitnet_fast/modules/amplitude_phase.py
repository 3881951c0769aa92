"""Residual amplitude / phase block of MITNet: a convolutional branch plus a spectral one.

    s   = LeakyReLU(conv3×3(LeakyReLU(conv3×3(x)))) + conv1×1(x)
    X   = rfft2(s) = A·exp(iP),   M = conv1×1 → LeakyReLU → conv1×1
    y   = irfft2(M(A)·exp(iP))  (amplitude)   or   irfft2(A·exp(i·M(P)))  (phase)
    out = conv1×1([s, y]) (+ conv3×3(encoder features) + conv3×3(decoder features))

s is one operator, which reads a second map, to be joined to x, where it lies.
The 1×1 convolution over [s, y] commutes with the transform: it is ``irfft2(W·[X, Y]) + b``, where Y is the
spectrum of y, and part of the operator that computes Y: nothing is concatenated, s is not read again.
Maps are [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops import amplitude_phase_conv, residual_conv
from ..ops._checks import check_tensor
from ._checks import check_counts, check_map, check_slope

MODES = ("amplitude", "phase")


class AmplitudePhaseBlock(nn.Module):
    """Residual block that also passes the amplitude or the phase of its spectrum through 1×1 convolutions.

    Args:
        in_channels: channels of the input, of both maps together where a second one is joined.
        out_channels: channels of the output, and of the hidden layer of the spectral map.
        mode: "amplitude" or "phase", the half of the polar spectrum that is mapped.
        negative_slope: of every LeakyReLU.
        spectral: False leaves the spectral branch out and counts the shortcut twice,
            ``out = residual(x) + 2·identity(x)``, which is what the decoder of MITNet's first stage
            does in its published form. The branch's parameters then exist, as in the published
            checkpoints, but take no part and receive no gradient.
        cross_stage: add 3×3 convolutions of two further maps, the encoder's and the decoder's
            features of an earlier stage.
        downsample: also return the output at half the size (4×4 convolution, stride 2, no bias).

    Raises:
        ValueError: a channel count below 1, an unknown mode, a slope outside [0, 1), or
            ``cross_stage`` without ``spectral``.

    Source: MITNet (arXiv 2308.06998), residual amplitude / phase block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mode: str = "amplitude",
        *,
        negative_slope: float = 0.2,
        spectral: bool = True,
        cross_stage: bool = False,
        downsample: bool = False,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, out_channels=out_channels)
        check_slope(negative_slope)
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, allowed are 'amplitude' and 'phase'")
        if cross_stage and not spectral:
            raise ValueError("cross_stage: needs spectral=True, the plain block takes no further features")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.mode = mode
        self.negative_slope = negative_slope
        self.spectral = spectral
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(negative_slope, inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(negative_slope, inplace=True),
        )
        self.identity = nn.Conv2d(in_channels, out_channels, 1)
        self.spectral_in = nn.Conv2d(out_channels, out_channels, 1)
        self.spectral_out = nn.Conv2d(out_channels, out_channels, 1)
        self.fusion = nn.Conv2d(2 * out_channels, out_channels, 1)
        self.from_encoder = nn.Conv2d(out_channels, out_channels, 3, padding=1) if cross_stage else None
        self.from_decoder = nn.Conv2d(out_channels, out_channels, 3, padding=1) if cross_stage else None
        self.downsample = (
            nn.Conv2d(out_channels, out_channels, 4, stride=2, padding=1, bias=False) if downsample else None
        )

    def forward(
        self,
        x: torch.Tensor,
        encoder_features: torch.Tensor | None = None,
        decoder_features: torch.Tensor | None = None,
        *,
        joined: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Apply the block.

        Args:
            x: [B, in_channels, H, W], any size (at least 2×2 with ``downsample``); fewer channels where ``joined``
                has the others.
            encoder_features: [B, out_channels, H, W], with ``cross_stage`` only.
            decoder_features: likewise.
            joined: [B, C2, H, W] whose channels follow those of ``x``: the block of their concatenation, which
                is not made.

        Returns:
            [B, out_channels, H, W]; with ``downsample`` a pair of it and
            [B, out_channels, H//2, W//2].

        Raises:
            ValueError: shapes do not fit, or features are missing or given without ``cross_stage``.
        """
        if joined is None:
            check_map("x", x, self.in_channels)
        else:
            check_tensor("x", x, "[B, C, H, W]")
            if x.shape[1] >= self.in_channels:
                raise ValueError(
                    f"x: expected fewer than {self.in_channels} channels beside a joined map, got {x.shape[1]}"
                )
            check_map("joined", joined, self.in_channels - x.shape[1], x.shape[2:], x.shape[0])
        self._check_features(x, encoder_features=encoder_features, decoder_features=decoder_features)
        first, second = self.residual[0], self.residual[2]
        s = residual_conv(
            x,
            joined,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            self.identity.weight.flatten(1),
            self.identity.bias,
            identity_scale=1 if self.spectral else 2,
            negative_slope=self.negative_slope,
        )
        out = self._fuse(s) if self.spectral else s
        if self.from_encoder is not None:
            out = out + self.from_encoder(encoder_features) + self.from_decoder(decoder_features)
        return out if self.downsample is None else (out, self.downsample(out))

    def _fuse(self, s: torch.Tensor) -> torch.Tensor:
        """conv1×1 of [s, spectral branch of s]."""
        return amplitude_phase_conv(
            s,
            self.spectral_in.weight.flatten(1),
            self.spectral_in.bias,
            self.spectral_out.weight.flatten(1),
            self.spectral_out.bias,
            mode=self.mode,
            negative_slope=self.negative_slope,
            output_weight=self.fusion.weight.flatten(1),
            output_bias=self.fusion.bias,
        )

    def _check_features(self, x: torch.Tensor, **features: torch.Tensor | None) -> None:
        for name, value in features.items():
            if (value is None) == (self.from_encoder is not None):
                rule = "required with" if value is None else "taken only with"
                raise ValueError(f"{name}: {rule} cross_stage=True")
            if value is not None:
                check_map(name, value, self.out_channels, x.shape[2:], x.shape[0])
