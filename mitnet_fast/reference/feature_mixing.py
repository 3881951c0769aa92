"""Feature mixing in plain PyTorch: the parts of a LEGM block, the dilated dense block, conv-ReLU, residual blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

DENSE_LAYERS = 5
NORM_EPS = 1e-5


def pointwise_mlp(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """y = x + W2·ReLU(W1·x + b1) + b2 at every pixel.

    Args and result as in :func:`mitnet_fast.ops.pointwise_mlp`.
    """
    hidden = F.relu(_pointwise(x, weight1, bias1))
    return x + _pointwise(hidden, weight2, bias2)


def local_mixing(
    x: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
) -> torch.Tensor:
    """y = x + P·depthwise5×5(V·x), reflected at the border.

    Args and result as in :func:`mitnet_fast.ops.local_mixing`.
    """
    value = _pointwise(x, value_weight, value_bias)
    return x + _pointwise(_depthwise(value, local_weight, local_bias), proj_weight, proj_bias)


def local_global_mixing(
    x: torch.Tensor,
    value: torch.Tensor,
    attended: torch.Tensor,
    local_weight: torch.Tensor,
    local_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    rescale: torch.Tensor,
    rebias: torch.Tensor,
) -> torch.Tensor:
    """y = x + rescale·P·(depthwise5×5(value) + attended) + rebias, reflected at the border.

    Args and result as in :func:`mitnet_fast.ops.local_global_mixing`.
    """
    mixed = _pointwise(_depthwise(value, local_weight, local_bias) + attended, proj_weight, proj_bias)
    return torch.addcmul(x + rebias[..., None, None], mixed, rescale[..., None, None])


def normalized_qkv(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    query_key_weight: torch.Tensor,
    query_key_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """n = γ·(x − μ)/σ + β with μ and σ of each sample, V·n and QK·n at every pixel, μ, σ.

    Args and result as in :func:`mitnet_fast.ops.normalized_qkv`.
    """
    variance, mean = torch.var_mean(x, (1, 2, 3), correction=0)
    normalized = torch.group_norm(x, 1, norm_weight, norm_bias, NORM_EPS)
    value = _pointwise(normalized, value_weight, value_bias)
    return value, _pointwise(normalized, query_key_weight, query_key_bias), mean, (variance + NORM_EPS).sqrt()


def dense_block(
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_bias: torch.Tensor,
) -> torch.Tensor:
    """f_k = [f_{k−1}, ReLU(conv3×3, dilation 2 (f_{k−1}))] from f_0 = x, y = ReLU(P·f_5) + x.

    Args and result as in :func:`mitnet_fast.ops.dense_block`.
    """
    # The gradient of a dilated bfloat16 convolution in channels_last on a CPU reads up to megabytes beyond its memory,
    # where there may be none (oneDNN 3.12 on AVX-512); in NCHW it does not. The result keeps the layout of x, which
    # comes first in the sum.
    features = x.contiguous() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
    for weight, bias in dense_layers(x.shape[1], dense_weight, dense_bias):
        added = F.relu(F.conv2d(features, weight, bias, padding=2, dilation=2))
        features = torch.cat([features, added], 1)
    return x + F.relu(_pointwise(features, fuse_weight, fuse_bias))


def conv_relu(
    x: torch.Tensor, joined: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """y = ReLU(scale·conv3×3([x, joined]) + shift), zeros around the map.

    Args and result as in :func:`mitnet_fast.ops.conv_relu`.
    """
    maps = x if joined is None else torch.cat([x, joined], 1)
    return F.relu(torch.addcmul(shift[:, None, None], F.conv2d(maps, weight, padding=1), scale[:, None, None]))


def residual_conv(
    x: torch.Tensor,
    joined: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    identity_weight: torch.Tensor,
    identity_bias: torch.Tensor,
    *,
    identity_scale: float = 1.0,
    negative_slope: float = 0.2,
) -> torch.Tensor:
    """y = LeakyReLU(W2*LeakyReLU(W1*[x, joined] + b1) + b2) + identity_scale·(Wi·[x, joined] + bi), zeros around.

    Args and result as in :func:`mitnet_fast.ops.residual_conv`.
    """
    maps = x if joined is None else torch.cat([x, joined], 1)
    # in place, so that autograd keeps one map for both the activation and the convolution after it
    hidden = F.leaky_relu(F.conv2d(maps, weight1, bias1, padding=1), negative_slope, inplace=True)
    residual = F.leaky_relu(F.conv2d(hidden, weight2, bias2, padding=1), negative_slope, inplace=True)
    return torch.add(residual, _pointwise(maps, identity_weight, identity_bias), alpha=identity_scale)


def dense_layers(
    channels: int, dense_weight: torch.Tensor, dense_bias: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight [G, C + k·G, 3, 3] and bias [G] of each layer k of a dense block for maps of ``channels``."""
    place = 0
    for bias in dense_bias.chunk(DENSE_LAYERS):
        shape = bias.shape[0], channels, 3, 3
        weight = dense_weight[place : place + math.prod(shape)].view(shape)
        yield weight, bias
        place += weight.numel()
        channels += bias.shape[0]


def _pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight[..., None, None], bias)


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), weight[:, None], bias, groups=weight.shape[0])
