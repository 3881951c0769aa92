"""MFM against the published values, its equation, and what any weighting by softmax must do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.modules.modulation_fusion import MFM

from .. import golden


def filled(channels: int, maps: int = 2, reduction: int = 8) -> MFM:
    module = MFM(channels, maps, reduction)
    golden.deterministic.fill_module(module)
    return module.double()


def test_published_values():
    maps = [golden.uniform(name, (2, 32, 20, 24)) for name in ("a", "b")]
    expected = golden.arrays("modulation_fusion_float64")["out"]
    assert golden.relative_error(filled(32)(maps), expected) < 1e-6


@pytest.mark.parametrize("maps", [1, 2, 3, 5])
def test_values_and_gradients_are_those_of_the_equation(maps):
    module = filled(16, maps, reduction=3)
    inputs = [golden.uniform(f"map{index}", (2, 16, 5, 6)).requires_grad_() for index in range(maps)]
    stacked = torch.stack(inputs, 1)  # [B, n, C, H, W]
    average = stacked.sum(1).mean((2, 3))
    hidden = F.linear(average, module.mlp[0].weight.flatten(1)).relu()
    logits = F.linear(hidden, module.mlp[2].weight.flatten(1)).view(2, maps, 16)
    expected = (stacked * logits.softmax(1)[..., None, None]).sum(1)
    actual = module(inputs)
    assert golden.relative_error(actual, expected.detach()) < 1e-14
    w = golden.uniform("w", actual.shape)
    wanted = [*inputs, *module.parameters()]
    for ours, formula in zip(*(torch.autograd.grad((w * y).sum(), wanted) for y in (actual, expected)), strict=True):
        if maps == 1 and formula.norm() < 1e-14:  # the softmax over one map is 1
            assert ours.norm() < 1e-14
        else:
            assert golden.relative_error(ours, formula) < 1e-12


def test_weights_sum_to_one_in_every_channel():
    x = golden.uniform("x", (2, 16, 5, 6))
    assert golden.relative_error(filled(16, 3)([x, x, x]), x) < 1e-15


@pytest.mark.parametrize(("channels", "hidden"), [(24, 4), (32, 4), (48, 6), (96, 12)])
def test_hidden_layer_has_an_eighth_of_the_channels_and_at_least_four(channels, hidden):
    module = MFM(channels)
    assert module.mlp[0].weight.shape == (hidden, channels, 1, 1)
    assert module.mlp[2].weight.shape == (2 * channels, hidden, 1, 1)
    assert [name for name, _ in module.named_parameters()] == ["mlp.0.weight", "mlp.2.weight"]


def test_bad_maps_are_named():
    module = MFM(8)
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match="maps: expected 2 maps, got 3"):
        module([x, x, x])
    with pytest.raises(ValueError, match=r"maps\[1\]: expected .*\[1, 8, 4, 4\], got \[1, 8, 4, 5\]"):
        module([x, torch.zeros(1, 8, 4, 5)])
    with pytest.raises(ValueError, match=r"maps\[0\]: expected .*\[1, 8, 4, 4\], got \[1, 7, 4, 4\]"):
        module([torch.zeros(1, 7, 4, 4), x])


@pytest.mark.parametrize("name", ["channels", "maps", "reduction"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 0"):
        MFM(**({"channels": 8} | {name: 0}))
