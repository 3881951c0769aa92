"""U-Net prior: sizes that do not halve evenly, written out with explicit padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.modules.unet_prior import UNetPrior

from .. import golden

WIDTHS = (2, 3, 4, 5, 6)


@pytest.fixture
def module() -> UNetPrior:
    module = UNetPrior(3, WIDTHS).eval()
    golden.deterministic.fill_module(module)
    return module.double()


def double(level: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for convolution, norm in ((level[0], level[1]), (level[3], level[4])):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
        x = (x - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        x = x.clamp_min(0)
    return x


@pytest.mark.parametrize("size", [(16, 16), (28, 44), (60, 32), (20, 52)])
@pytest.mark.parametrize("gradients", [True, False])  # without, convolutions are fused
def test_values_are_those_of_the_equations(module, size, gradients):
    image = golden.uniform("image", (2, 3, *size))
    encoded = [double(module.encoder[0], image)]
    for level in module.encoder[1:]:
        height, width = (side // 2 * 2 for side in encoded[-1].shape[2:])
        blocks = encoded[-1][..., :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        encoded.append(double(level, blocks.amax((3, 5))))
    x = encoded[4]
    decoded = []
    for level, skip in zip(module.decoder, encoded[3::-1], strict=True):
        enlarged = torch.zeros(2, x.shape[1], *skip.shape[2:], dtype=x.dtype)
        x = F.interpolate(x, (2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True)
        top, left = ((outer - inner) // 2 for outer, inner in zip(skip.shape[2:], x.shape[2:], strict=True))
        enlarged[..., top : top + x.shape[2], left : left + x.shape[3]] = x
        x = double(level, torch.cat([skip, enlarged], 1))
        decoded.append(x)
    expected = (decoded[1], decoded[2], F.conv2d(decoded[3], module.out.weight, module.out.bias))
    with torch.set_grad_enabled(gradients):
        actual = module(image)
    for ours, formula, channels, scale in zip(actual, expected, module.out_channels, (4, 2, 1), strict=True):
        assert ours.shape == (2, channels, size[0] // scale, size[1] // scale)
        assert golden.relative_error(ours, formula) < 1e-13


def test_the_fused_convolutions_follow_their_parameters(module):
    image = golden.uniform("image", (2, 3, 44, 28))
    with torch.no_grad():
        module(image)
        for parameter in module.parameters():
            parameter.mul_(1.1)
        actual = module(image)
    for ours, plain in zip(actual, module(image), strict=True):
        assert golden.relative_error(ours, plain) < 1e-13


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (18, 16), (16, 30)])
def test_bad_sizes_are_named(module, size):
    with pytest.raises(ValueError, match=f"multiples of 4 and at least 16, got {size[0]}×{size[1]}"):
        module(torch.zeros(1, 3, *size, dtype=torch.float64))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"widths: expected five levels, got \[2, 3\]"):
        UNetPrior(3, (2, 3))
    with pytest.raises(ValueError, match=r"widths\[4\]: expected an integer of at least 1, got 0"):
        UNetPrior(3, (2, 3, 4, 5, 0))
