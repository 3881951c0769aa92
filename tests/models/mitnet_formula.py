"""MITNet written out from its equations: complex spectra, concatenations, stored filters.

``w`` is a dictionary of weights under the official names, ``name`` the prefix of a part of it.
Nothing of the package is used but its table of names, so a mistake there cannot hide here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mitnet_fast.models.official import MITNET_NAMES, official_name

Weights = dict[str, torch.Tensor]


def weights(module: nn.Module, place: str = "") -> Weights:
    """The parameters of a module under the official names they have at ``place`` in MITNet."""
    prefix = f"{place}." if place else ""
    return {official_name(prefix + name, MITNET_NAMES): value for name, value in module.named_parameters()}


def conv(w: Weights, name: str, x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    weight = w[f"{name}.weight"]
    size = weight.shape[-1]
    stride = 2 if size == 4 else 1
    return F.conv2d(x, weight, w.get(f"{name}.bias"), stride=stride, padding=(size - 1) // 2, groups=groups)


def transposed_conv(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)


def spectrum(x: torch.Tensor) -> torch.Tensor:
    """rfft2 with +0 as the imaginary part of the four (or fewer) self-conjugate bins."""
    height, width = x.shape[-2:]
    transformed = torch.fft.rfft2(x)
    real = torch.zeros(transformed.shape[-2:], dtype=torch.bool)
    for row in {0, height // 2} if height % 2 == 0 else {0}:
        for column in {0, width // 2} if width % 2 == 0 else {0}:
            real[row, column] = True
    return torch.complex(transformed.real, transformed.imag.masked_fill(real, 0.0))


def image_of(amplitude: torch.Tensor, phase: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return torch.fft.irfft2(torch.polar(amplitude, phase), s=size)


def block(
    w: Weights,
    name: str,
    x: torch.Tensor,
    mode: str,
    slope: float,
    spectral: bool = True,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Residual amplitude / phase block, at full size."""
    residual = F.leaky_relu(conv(w, f"{name}.resConv.0", x), slope)
    residual = F.leaky_relu(conv(w, f"{name}.resConv.2", residual), slope)
    s = residual + conv(w, f"{name}.identity", x)
    if not spectral:
        return s + conv(w, f"{name}.identity", x)

    def spectral_map(values: torch.Tensor) -> torch.Tensor:
        return conv(w, f"{name}.fftConv2.2", F.leaky_relu(conv(w, f"{name}.fftConv2.0", values), slope))

    transformed = spectrum(s)
    amplitude, phase = transformed.abs(), transformed.angle()
    amplitude, phase = (spectral_map(amplitude), phase) if mode == "amplitude" else (amplitude, spectral_map(phase))
    # torch.polar refuses no negative amplitude, but its gradient is for positive ones: go by parts
    y = torch.fft.irfft2(torch.complex(amplitude * phase.cos(), amplitude * phase.sin()), s=s.shape[-2:])
    out = conv(w, f"{name}.fusion", torch.cat([s, y], 1))
    if features is not None:
        encoder, decoder = features
        out = out + conv(w, f"{name}.csff_enc", encoder) + conv(w, f"{name}.csff_dec", decoder)
    return out


def dynamic_filter_block(
    w: Weights, name: str, x: torch.Tensor, phase: torch.Tensor, amplitude: torch.Tensor
) -> torch.Tensor:
    """Adaptive dynamic filter block with its filters stored, tap by tap."""
    channels, height, width = x.shape[1:]
    z = conv(w, f"{name}.fusion", torch.cat([x, phase, amplitude], 1))
    spatial = conv(w, f"{name}.sekg.conv_sa", z, groups=channels)
    average = z.mean((2, 3))
    channel_weight, channel_bias = w[f"{name}.sekg.conv_ca.weight"].flatten(), w[f"{name}.sekg.conv_ca.bias"]
    neighbours = F.pad(average, (1, 1)).unfold(1, 3, 1)  # [B, C, 3]
    attention = spatial + ((neighbours * channel_weight).sum(-1) + channel_bias)[:, :, None, None]
    filters = conv(w, f"{name}.kernel", attention)
    size = round((filters.shape[1] / channels) ** 0.5)
    padded = F.pad(x, [size // 2] * 4)
    out = x
    for tap in range(size**2):
        dy, dx = divmod(tap, size)
        out = out + filters[:, tap :: size**2] * padded[:, :, dy : dy + height, dx : dx + width]
    return out


def level_interaction(w: Weights, name: str, domain: str, features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Fusion of all levels in one domain ("pha" or "amp"), in place and in rising order."""
    f = [conv(w, f"{name}.conv_{domain}.{i}", x) for i, x in enumerate(features)]
    for i in range(len(f)):
        maps = [f[i]]
        for j in range(len(f)):
            x = f[j]
            for k in range(abs(i - j)):
                prefix = f"{name}.resize_{domain}.{j}.{i}.body.{k}.bot"
                if j < i:
                    x = conv(w, f"{prefix}.1", F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False))
                else:
                    size = f[j - k - 1].shape[-2:]
                    x = F.interpolate(conv(w, f"{prefix}.0", x), size, mode="bilinear", align_corners=True)
            if j != i:
                maps.append(x)
        f[i] = conv(w, f"{name}.fusion_{domain}.{i}", torch.cat(maps, 1))
    return f


def supervised_attention(
    w: Weights, name: str, features: torch.Tensor, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    restored = conv(w, f"{name}.conv2", features) + image
    return conv(w, f"{name}.conv1", features) * conv(w, f"{name}.conv3", restored).sigmoid() + features, restored


def mitnet(
    w: Weights, image: torch.Tensor, depth: int = 4, slope: float = 0.2, decoder_spectral: bool = False
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The whole network: what its forward pass returns, by the names of ``MITNetOutput``."""
    x = conv(w, "conv_01", image)
    encoded: list[torch.Tensor] = []
    for i in range(depth):
        x = block(w, f"down_path_1.{i}", x, "amplitude", slope)
        if i < depth - 1:
            encoded.append(x)
            x = conv(w, f"down_path_1.{i}.downsample", x)
    decoded: list[torch.Tensor] = []
    for j in range(depth - 1):
        skip = conv(w, f"skip_conv_1.{j}", encoded[depth - 2 - j])
        x = torch.cat([transposed_conv(w, f"up_path_1.{j}.up", x), skip], 1)
        x = block(w, f"up_path_1.{j}.conv_block", x, "amplitude", slope, decoder_spectral)
        decoded = [x, *decoded]
    attended, stage1 = supervised_attention(w, "sam12", x, image)

    stage1_spectrum, input_spectrum = spectrum(stage1), spectrum(image)
    recombined = image_of(stage1_spectrum.abs(), input_spectrum.angle(), image.shape[-2:])
    x = conv(w, "cat12", torch.cat([conv(w, "conv_02", recombined), attended], 1))
    phase_features: list[torch.Tensor] = []
    for i in range(depth):
        features = (encoded[i], decoded[i]) if i < depth - 1 else None
        x = block(w, f"down_path_2.{i}", x, "phase", slope, features=features)
        if i < depth - 1:
            phase_features.append(x)
            x = conv(w, f"down_path_2.{i}.downsample", x)
    phase = level_interaction(w, "fci", "pha", phase_features)
    amplitude = level_interaction(w, "fci", "amp", decoded)
    for j in range(depth - 1):
        level = depth - 2 - j
        u = transposed_conv(w, f"up_path_2.{j}.up", x)
        filtered = dynamic_filter_block(w, f"up_path_2.{j}.afg", u, phase[level], amplitude[level])
        x = block(w, f"up_path_2.{j}.conv_block", torch.cat([u, filtered], 1), "phase", slope)
    return {
        "restored": conv(w, "last", x) + image,
        "stage1": stage1,
        "stage1_amplitude": stage1_spectrum.abs(),
        "stage1_phase": stage1_spectrum.angle(),
        "input_phase": input_spectrum.angle(),
        "phase_features": phase_features,
        "amplitude_features": decoded,
    }
