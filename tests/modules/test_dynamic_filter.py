from __future__ import annotations

import pytest
import torch

from mitnet_fast.modules import DynamicFilterBlock
from tests import golden
from tests.golden import deterministic
from tests.models import mitnet_formula as formula


@pytest.mark.parametrize("size", [(6, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_equals_the_formula_with_stored_filters_and_the_channel_term_added_before(kernel_size, size):
    block = DynamicFilterBlock(4, kernel_size).double()
    deterministic.fill_module(block)
    maps = [golden.uniform(name, (2, 4, *size)).requires_grad_() for name in ("x", "phase", "amplitude")]
    out = block(*maps)
    expected = formula.dynamic_filter_block(formula.weights(block, "phase_decoder.0.filter"), "up_path_2.0.afg", *maps)
    assert golden.relative_error(out, expected) < 1e-13

    inputs = [*maps, *block.parameters()]
    grad_out = golden.uniform("w", out.shape)
    actual = torch.autograd.grad(out, inputs, grad_out)
    truth = torch.autograd.grad(expected, inputs, grad_out)
    assert max(map(golden.relative_error, actual, truth)) < 1e-12


def test_channel_attention_sees_neighbouring_channels_only():
    block = DynamicFilterBlock(5).double()
    deterministic.fill_module(block)
    averages = torch.eye(5, dtype=torch.float64)
    term = block.channel_attention(averages[:, None])[:, 0] - block.channel_attention.bias
    left, centre, right = block.channel_attention.weight.flatten()
    expected = sum(torch.diag(value.repeat(5 - abs(k)), k) for k, value in ((1, left), (0, centre), (-1, right)))
    # a unit average in channel c reaches channel c + 1 through the left weight
    assert golden.relative_error(term, expected) < 1e-15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "channels: expected an integer of at least 1, got 0"),
        ((4, 2), "kernel_size: got 2, allowed are 1, 3, 5 and 7"),
        ((4, 9), "kernel_size: got 9, allowed are 1, 3, 5 and 7"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicFilterBlock(*arguments)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_forward_names_the_map_that_does_not_fit(position):
    maps = [torch.zeros(1, 4, 6, 6) for _ in range(3)]
    maps[position] = torch.zeros(1, 3, 6, 6)
    name = ("x", "phase", "amplitude")[position]
    with pytest.raises(ValueError, match=rf"{name}: expected .* \[1, 4, 6, 6\], got \[1, 3, 6, 6\]"):
        DynamicFilterBlock(4)(*maps)
