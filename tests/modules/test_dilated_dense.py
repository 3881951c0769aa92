"""DRDB against its equation, and how far it sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.modules.dilated_dense import DRDB

from .. import golden


def filled(channels: int, growth: int) -> DRDB:
    module = DRDB(channels, growth)
    golden.deterministic.fill_module(module)
    return module.double()


@pytest.mark.parametrize(("channels", "growth", "size"), [(1, 4, (9, 12)), (5, 3, (16, 16)), (3, 8, (1, 2))])
def test_block_is_its_equation(channels, growth, size):
    module = filled(channels, growth)
    x = golden.uniform("x", (2, channels, *size)).requires_grad_()
    maps = [x]
    for layer in module.dense:
        sums = [
            F.conv2d(part, kernel, dilation=2, padding=2)
            for part, kernel in zip(maps, layer.weight.split([m.shape[1] for m in maps], 1), strict=True)
        ]
        maps.append((sum(sums) + layer.bias.view(1, -1, 1, 1)).clamp_min(0))
    fused = torch.einsum("oc,bchw->bohw", module.fuse.weight[..., 0, 0], torch.cat(maps, 1))
    expected = (fused + module.fuse.bias.view(1, -1, 1, 1)).clamp_min(0) + x
    actual = module(x)
    assert golden.relative_error(actual, expected.detach()) < 1e-13
    w = golden.uniform("w", actual.shape)
    wanted = [x, *module.parameters()]
    for ours, formula in zip(*(torch.autograd.grad((w * y).sum(), wanted) for y in (actual, expected)), strict=True):
        assert golden.relative_error(ours, formula) < 1e-12


def test_a_pixel_reaches_ten_rows_in_steps_of_two():
    module = filled(1, 4)
    with torch.no_grad():
        for layer in (*module.dense, module.fuse):  # positive everywhere: no ReLU hides a path
            layer.weight.abs_()
            layer.bias.abs_()
    x = torch.ones(1, 1, 31, 31, dtype=torch.float64)
    other = x.clone()
    other[0, 0, 15, 15] = 2
    rows = (module(other) - module(x)).abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert rows == list(range(5, 26, 2))


def test_published_size_has_the_published_shapes():
    module = DRDB(24)
    assert [tuple(layer.weight.shape) for layer in module.dense] == [(32, 24 + 32 * k, 3, 3) for k in range(5)]
    assert module.fuse.weight.shape == (24, 184, 1, 1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="channels: expected an integer of at least 1, got 0"):
        DRDB(0)
    with pytest.raises(ValueError, match="growth: expected an integer of at least 1, got 0"):
        DRDB(3, 0)
    with pytest.raises(ValueError, match=r"x: expected .*\[1, 3, 4, 4\], got \[1, 2, 4, 4\]"):
        DRDB(3)(torch.zeros(1, 2, 4, 4))
