"""The reference of feature mixing against its equations written out pixel by pixel."""

import pytest
import torch

from mitnet_fast import reference


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def mirrored(place, size):
    return place if 0 <= place < size else -place if place < 0 else 2 * (size - 1) - place


def depthwise(value, weight, bias):
    height, width = value.shape[2:]
    out = torch.empty_like(value)
    for y in range(height):
        for x in range(width):
            out[..., y, x] = bias
            for dy in range(5):
                for dx in range(5):
                    source = value[..., mirrored(y + dy - 2, height), mirrored(x + dx - 2, width)]
                    out[..., y, x] += weight[:, dy, dx] * source
    return out


def test_the_mlp_at_each_pixel():
    x, weight1, bias1, weight2, bias2 = numbers(2, 3, 4, 5), numbers(6, 3), numbers(6), numbers(3, 6), numbers(3)
    expected = x.clone()
    for sample, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)):
        hidden = (weight1 @ x[sample, :, row, column] + bias1).clamp(min=0)
        expected[sample, :, row, column] += weight2 @ hidden + bias2
    torch.testing.assert_close(reference.pointwise_mlp(x, weight1, bias1, weight2, bias2), expected)


def test_local_mixing_at_each_pixel():
    x, value_weight, value_bias = numbers(2, 3, 4, 3), numbers(3, 3), numbers(3)
    weight, bias, proj_weight, proj_bias = numbers(3, 5, 5), numbers(3), numbers(3, 3) + 1, numbers(3) + 1
    value = torch.einsum("ij,bjyx->biyx", value_weight, x) + value_bias[:, None, None]
    mixed = depthwise(value, weight, bias)
    expected = x + torch.einsum("ij,bjyx->biyx", proj_weight, mixed) + proj_bias[:, None, None]
    actual = reference.local_mixing(x, value_weight, value_bias, weight, bias, proj_weight, proj_bias)
    torch.testing.assert_close(actual, expected)


def test_local_global_mixing_at_each_pixel():
    x, value, attended = numbers(2, 3, 4, 6), numbers(2, 3, 4, 6) + 1, numbers(2, 3, 4, 6) - 1
    weight, bias, proj_weight, proj_bias = numbers(3, 5, 5), numbers(3), numbers(3, 3), numbers(3) + 1
    rescale, rebias = numbers(2, 3), numbers(2, 3) + 1
    mixed = depthwise(value, weight, bias) + attended
    mixed = torch.einsum("ij,bjyx->biyx", proj_weight, mixed) + proj_bias[:, None, None]
    expected = x + rescale[..., None, None] * mixed + rebias[..., None, None]
    actual = reference.local_global_mixing(x, value, attended, weight, bias, proj_weight, proj_bias, rescale, rebias)
    torch.testing.assert_close(actual, expected)


def test_normalized_qkv_at_each_pixel():
    x, weight, bias = 2 * numbers(2, 3, 4, 5) + 3, numbers(3) + 1, numbers(3)
    projections = numbers(3, 3), numbers(3) - 1, numbers(6, 3), numbers(6)
    value, query_key = torch.empty(2, 3, 4, 5, dtype=torch.float64), torch.empty(2, 6, 4, 5, dtype=torch.float64)
    means, deviations = [], []
    for sample, pixels in enumerate(x):
        means.append(sum(pixels.flatten().tolist()) / 60)
        deviations.append((sum((v - means[-1]) ** 2 for v in pixels.flatten().tolist()) / 60 + 1e-5) ** 0.5)
        for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(5)):
            n = (pixels[:, row, column] - means[-1]) / deviations[-1] * weight + bias
            value[sample, :, row, column] = projections[0] @ n + projections[1]
            query_key[sample, :, row, column] = projections[2] @ n + projections[3]
    *maps, mean, deviation = reference.normalized_qkv(x, weight, bias, *projections)
    torch.testing.assert_close(maps, [value, query_key])
    assert mean.tolist() == pytest.approx(means, rel=1e-13)
    assert deviation.tolist() == pytest.approx(deviations, rel=1e-13)


def test_the_dense_block_layer_by_layer():
    x, biases, fuse_weight, fuse_bias = numbers(2, 3, 4, 5), numbers(10), numbers(3, 13), numbers(3)
    weights = [numbers(2, 3 + 2 * layer, 3, 3) / 4 for layer in range(5)]
    features = torch.zeros(2, 13, 4 + 4, 5 + 4, dtype=torch.float64)  # surrounded by two pixels of zeros
    features[:, :3, 2:-2, 2:-2] = x
    for layer, weight in enumerate(weights):
        first = 3 + 2 * layer
        for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
            seen = features[:, :first, row : row + 5 : 2, column : column + 5 : 2]
            value = torch.einsum("oiyx,biyx->bo", weight, seen) + biases[2 * layer : 2 * layer + 2]
            features[:, first : first + 2, row + 2, column + 2] = value.clamp(min=0)
    fused = torch.einsum("oi,biyx->boyx", fuse_weight, features[:, :, 2:-2, 2:-2]) + fuse_bias[:, None, None]
    flat = torch.cat([weight.flatten() for weight in weights])
    actual = reference.dense_block(x, flat, biases, fuse_weight, fuse_bias)
    torch.testing.assert_close(actual, fused.clamp(min=0) + x)


def test_the_conv_relu_at_each_pixel():
    x, joined, weight, scale, shift = (
        numbers(2, 3, 4, 5),
        numbers(2, 1, 4, 5),
        numbers(6, 4, 3, 3),
        numbers(6),
        numbers(6),
    )
    maps = torch.zeros(2, 4, 4 + 2, 5 + 2, dtype=torch.float64)  # surrounded by zeros
    maps[:, :3, 1:-1, 1:-1], maps[:, 3:, 1:-1, 1:-1] = x, joined
    expected = torch.empty(2, 6, 4, 5, dtype=torch.float64)
    for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
        value = torch.einsum("oiyx,biyx->bo", weight, maps[:, :, row : row + 3, column : column + 3])
        expected[:, :, row, column] = (scale * value + shift).clamp(min=0)
    torch.testing.assert_close(reference.conv_relu(x, joined, weight, scale, shift), expected)
    alone = reference.conv_relu(torch.cat([x, joined], 1), None, weight, scale, shift)
    torch.testing.assert_close(alone, expected)


def test_the_residual_convolutions_at_each_pixel():
    x, joined, weight1, bias1 = numbers(2, 3, 4, 5), numbers(2, 1, 4, 5), numbers(6, 4, 3, 3), numbers(6)
    weight2, bias2, identity_weight, identity_bias = numbers(6, 6, 3, 3), numbers(6) + 1, numbers(6, 4), numbers(6) - 1
    maps, hidden = (torch.zeros(2, c, 4 + 2, 5 + 2, dtype=torch.float64) for c in (4, 6))  # surrounded by zeros
    maps[:, :3, 1:-1, 1:-1], maps[:, 3:, 1:-1, 1:-1] = x, joined
    expected = torch.empty(2, 6, 4, 5, dtype=torch.float64)

    def leaky(value):
        return torch.where(value > 0, value, 0.1 * value)

    def convolved(values, weight, bias, row, column):
        return torch.einsum("oiyx,biyx->bo", weight, values[:, :, row : row + 3, column : column + 3]) + bias

    pixels = torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist()
    for row, column in pixels:
        hidden[:, :, row + 1, column + 1] = leaky(convolved(maps, weight1, bias1, row, column))
    for row, column in pixels:
        identity = maps[:, :, row + 1, column + 1] @ identity_weight.T + identity_bias
        expected[:, :, row, column] = leaky(convolved(hidden, weight2, bias2, row, column)) + 2 * identity
    weights, options = (weight1, bias1, weight2, bias2, identity_weight, identity_bias), {"negative_slope": 0.1}
    actual = reference.residual_conv(x, joined, *weights, identity_scale=2, **options)
    torch.testing.assert_close(actual, expected)
    alone = reference.residual_conv(torch.cat([x, joined], 1), None, *weights, identity_scale=2, **options)
    torch.testing.assert_close(alone, expected)
