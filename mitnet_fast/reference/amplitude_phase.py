"""Amplitude / phase convolution: two 1×1 convolutions on one polar half of the spectrum.

    X = rfft2(x) = A·exp(iP),   M = conv1×1 → LeakyReLU → conv1×1
    amplitude mode: Y = M(A)·exp(iP)        phase mode: Y = A·exp(i·M(P))
    y = irfft2(output_weight · Y) + output_bias        or irfft2(output_weight · [X, Y]) + output_bias

Spectra are unnormalised ("backward") half spectra [B, C, H, W//2 + 1]. Three conventions make the
result the same on every library:

- The bins (0 or H/2, 0 or W/2) of a real image are real: their imaginary part is set to +0, so
  their phase is 0 or +π and never flips between the two.
- Columns 0 and W/2 (even W) of Y are made Hermitian before the inverse transform, whose result
  would otherwise depend on which half of them a library reads.
- |X| below 1e-30 (float64: 1e-290) counts as X = 0 in A and P: the phase is 0, exp(iP) is 1, and no
  gradient reaches X through them. output_weight, which is linear, takes X as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

SMALLEST_AMPLITUDE = {torch.float32: 1e-30, torch.float64: 1e-290}


def half_spectrum(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.half_spectrum`."""
    return torch.stack(spectrum_parts(x), -1)


def amplitude_and_phase(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`mitnet_fast.ops.amplitude_and_phase`."""
    amplitude, cosine, sine = polar(*spectrum_parts(x))
    return amplitude, torch.atan2(sine, cosine)


def recombine(amplitude_of: torch.Tensor, phase_of: torch.Tensor) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.recombine`."""
    amplitude, _, _ = polar(*spectrum_parts(amplitude_of))
    _, cosine, sine = polar(*spectrum_parts(phase_of))
    return _inverse(amplitude * cosine, amplitude * sine, phase_of.shape[-2:])


def amplitude_phase_conv(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    mode: str,
    negative_slope: float,
    output_weight: torch.Tensor | None,
    output_bias: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`mitnet_fast.ops.amplitude_phase_conv`."""
    return amplitude_phase_conv_of_spectrum(
        *spectrum_parts(x),
        weight1,
        bias1,
        weight2,
        bias2,
        size=x.shape[-2:],
        mode=mode,
        negative_slope=negative_slope,
        output_weight=output_weight,
        output_bias=output_bias,
    )


def amplitude_phase_conv_of_spectrum(
    real: torch.Tensor,
    imaginary: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    size: torch.Size,
    mode: str,
    negative_slope: float,
    output_weight: torch.Tensor | None,
    output_bias: torch.Tensor | None,
    map_of_values: Callable[..., torch.Tensor] | None = None,
    smallest: float | None = None,
) -> torch.Tensor:
    """The same from the parts of the half spectrum [B, C, H, W//2 + 1] of an image of ``size`` (H, W).

    ``map_of_values`` replaces :func:`spectral_map`, ``smallest`` the amplitude from which on one does not count
    as zero.
    """
    parts = real, imaginary
    weights = weight1[:, :, None, None], bias1, weight2[:, :, None, None], bias2
    map_of_values = map_of_values or spectral_map
    amplitude, cosine, sine = polar(*parts, smallest)
    if mode == "amplitude":
        amplitude = map_of_values(amplitude, *weights, negative_slope)
        real, imaginary = amplitude * cosine, amplitude * sine
    else:
        phase = map_of_values(torch.atan2(sine, cosine), *weights, negative_slope)
        real, imaginary = amplitude * torch.cos(phase), amplitude * torch.sin(phase)
    if output_weight is not None:
        if output_weight.shape[1] != real.shape[1]:
            real, imaginary = (torch.cat(pair, 1) for pair in zip(parts, (real, imaginary), strict=True))
        kernel = output_weight[:, :, None, None]
        real, imaginary = F.conv2d(real, kernel), F.conv2d(imaginary, kernel)
    y = _inverse(real, imaginary, size)
    return y if output_bias is None else y + output_bias[:, None, None]


def spectral_map(
    values: torch.Tensor,
    kernel1: torch.Tensor,
    bias1: torch.Tensor,
    kernel2: torch.Tensor,
    bias2: torch.Tensor,
    negative_slope: float,
) -> torch.Tensor:
    """M: conv1×1 → LeakyReLU → conv1×1."""
    return F.conv2d(F.leaky_relu(F.conv2d(values, kernel1, bias1), negative_slope), kernel2, bias2)


def spectrum_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of rfft2, with +0 for the latter where a real image has none."""
    height, width = x.shape[-2:]
    if x.numel() == 0:  # an empty batch: FFT libraries refuse it, its gradients are empty or zero
        return x[..., : width // 2 + 1], x[..., : width // 2 + 1]
    spectrum = torch.fft.rfft2(x)
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width // 2 + 1, device=x.device)
    real_bin = ((2 * rows) % height == 0)[:, None] & ((2 * columns) % width == 0)
    return spectrum.real, torch.where(real_bin, 0.0, spectrum.imag)


def polar(
    real: torch.Tensor, imaginary: torch.Tensor, smallest: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|X| and the real and imaginary part of X/|X|, neither overflowing nor underflowing in between."""
    is_zero = torch.hypot(real, imaginary) < (smallest or SMALLEST_AMPLITUDE[real.dtype])
    real, imaginary = torch.where(is_zero, 1.0, real), torch.where(is_zero, 0.0, imaginary)
    amplitude = torch.hypot(real, imaginary)
    return torch.where(is_zero, 0.0, amplitude), real / amplitude, imaginary / amplitude


def _inverse(real: torch.Tensor, imaginary: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """irfft2 to ``size`` of a half spectrum whose columns 0 and W/2 are made Hermitian first."""
    if real.numel() == 0:
        return F.pad(real + imaginary, (0, size[-1] - real.shape[-1]))
    return torch.fft.irfft2(torch.complex(mirror(real, size, 1), mirror(imaginary, size, -1)), s=size)


def mirror(part: torch.Tensor, size: torch.Size, sign: int) -> torch.Tensor:
    """½(Y(ky) ± Y(−ky)) in the self-conjugate columns, the rest as it is."""
    width = size[-1]
    if isinstance(width, torch.SymInt):  # a graph of any width: a slice may be of one column there, or of none
        self_conjugate = 2 * torch.arange(part.shape[-1], device=part.device) % width == 0
        return torch.where(self_conjugate, 0.5 * (part + sign * part.flip(-2).roll(1, -2)), part)
    even = width % 2 == 0
    edges = part[..., :: width // 2] if even else part[..., :1]
    edges = 0.5 * (edges + sign * edges.flip(-2).roll(1, -2))
    interior = part[..., 1 : part.shape[-1] - 1 if even else None]
    return torch.cat([edges[..., :1], interior, edges[..., 1:]], -1)
