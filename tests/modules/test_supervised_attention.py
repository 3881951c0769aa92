from __future__ import annotations

import pytest
import torch

from mitnet_fast.modules import SupervisedAttention
from tests import golden
from tests.golden import deterministic
from tests.models import mitnet_formula as formula


@pytest.mark.parametrize("image_channels", [1, 3])
def test_equals_the_formula(image_channels):
    module = SupervisedAttention(6, image_channels).double()
    deterministic.fill_module(module)
    features = golden.uniform("features", (2, 6, 5, 7)).requires_grad_()
    image = golden.tensor("image", (2, image_channels, 5, 7)).requires_grad_()
    outputs = module(features, image)
    expected = formula.supervised_attention(formula.weights(module, "supervised_attention"), "sam12", features, image)
    assert max(map(golden.relative_error, outputs, expected)) < 1e-14

    inputs = [features, image, *module.parameters()]
    weights = [golden.uniform(f"w{i}", output.shape) for i, output in enumerate(outputs)]
    actual = torch.autograd.grad(outputs, inputs, weights)
    truth = torch.autograd.grad(expected, inputs, weights)
    assert max(map(golden.relative_error, actual, truth)) < 1e-13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "channels: expected .* at least 1, got 0"), ((4, 0), "image_channels: expected .* at least 1, got 0")],
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        SupervisedAttention(*arguments)


@pytest.mark.parametrize(
    ("features", "image", "message"),
    [
        ((1, 5, 8, 8), (1, 3, 8, 8), r"features: expected .* \[1, 4, 8, 8\], got \[1, 5, 8, 8\]"),
        ((1, 4, 8, 8), (1, 1, 8, 8), r"image: expected .* \[1, 3, 8, 8\], got \[1, 1, 8, 8\]"),
        ((1, 4, 8, 8), (1, 3, 8, 4), r"image: expected .* \[1, 3, 8, 8\], got \[1, 3, 8, 4\]"),
    ],
)
def test_forward_names_what_is_wrong(features, image, message):
    with pytest.raises(ValueError, match=message):
        SupervisedAttention(4)(torch.zeros(features), torch.zeros(image))
