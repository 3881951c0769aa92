"""LEGM: every part against its equation, where attention and shifts sit, sizes, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mitnet_fast.modules.legm import (
    LEGM,
    LEGMBlock,
    LocalGlobalMixing,
    RelativePositionBias,
    RescaleNorm,
    relative_offsets,
    smallest_side,
)

from .. import golden


def fill(module: nn.Module, salt: int = 0) -> nn.Module:
    """Deterministic weights, in float64."""
    golden.deterministic.fill_module(module, salt)
    return module.double()


def attend(block: LocalGlobalMixing, x: torch.Tensor, meta: nn.Module) -> torch.Tensor:
    """Window attention written out pixel by pixel, with the meta network on every pair of pixels."""
    w, shift, heads = block.window_size, block.shift, block.heads
    qkv = torch.cat([block.query_key(x), block.value(x)], 1)
    height, width = x.shape[2:]
    pads = []
    for size in (width, height):
        behind = (w - size % w) % w
        pads += [shift, (w - shift + behind) % w] if shift else [0, behind]
    padded = F.pad(qkv, pads, mode="reflect")
    channels = x.shape[1]
    size = channels // heads
    pixels = [(i, j) for i in range(w) for j in range(w)]
    delta = torch.tensor([[(qi - ki, qj - kj) for ki, kj in pixels] for qi, qj in pixels], dtype=torch.float32)
    bias = meta((delta.sign() * torch.log(1 + delta.abs())).double())  # [w², w², heads]
    out = torch.zeros_like(padded[:, :channels])
    for top in range(0, padded.shape[2], w):
        for left in range(0, padded.shape[3], w):
            window = padded[:, :, top : top + w, left : left + w].flatten(2)  # [B, 3C, w²]
            for head in range(heads):
                q, k, v = (
                    window[:, part * channels + head * size : part * channels + (head + 1) * size] for part in range(3)
                )
                scores = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(size) + bias[..., head]
                result = torch.einsum("bqk,bck->bcq", scores.softmax(-1), v).unflatten(2, (w, w))
                out[:, head * size : (head + 1) * size, top : top + w, left : left + w] = result
    return out[:, :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]


def local(block: LocalGlobalMixing, x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(block.value(x), (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, block.local.weight, block.local.bias, groups=x.shape[1])


@pytest.mark.parametrize("window_size", [2, 3, 8])
def test_offsets_are_log_spaced_and_in_the_order_of_the_bias_table(window_size):
    offsets = relative_offsets(window_size)
    assert offsets.dtype == torch.float32
    assert offsets.shape == ((2 * window_size - 1) ** 2, 2)
    for dy in range(1 - window_size, window_size):
        for dx in range(1 - window_size, window_size):
            row = (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1
            expected = [math.copysign(math.log1p(abs(delta)), delta) for delta in (dy, dx)]
            assert offsets[row].tolist() == pytest.approx(expected, abs=2e-7)


def test_offsets_keep_their_float32_rounding_in_a_float64_network():
    bias = RelativePositionBias(2).double()
    assert bias.offsets.dtype == torch.float64
    assert torch.equal(bias.offsets, relative_offsets(8).double())
    assert "offsets" not in "".join(bias.state_dict())


def test_rescale_norm_is_its_equation():
    norm, value, query_key = fill(RescaleNorm(6)), fill(nn.Conv2d(6, 6, 1), 1), fill(nn.Conv2d(6, 12, 1), 2)
    x = (3 + 2 * golden.uniform("x", (2, 6, 5, 7))).requires_grad_()
    mean = x.mean((1, 2, 3), keepdim=True)
    deviation = torch.sqrt(((x - mean) ** 2).mean((1, 2, 3), keepdim=True) + 1e-5)
    expected = (
        value((x - mean) / deviation * norm.weight + norm.bias),
        query_key((x - mean) / deviation * norm.weight + norm.bias),
        deviation.view(2, 1) * norm.rescale.weight.view(6) + norm.rescale.bias,
        mean.view(2, 1) * norm.rebias.weight.view(6) + norm.rebias.bias,
    )
    actual = norm(x, value, query_key)
    inputs = [x, *norm.parameters(), *value.parameters(), *query_key.parameters()]
    for ours, formula in zip(actual, expected, strict=True):
        assert golden.relative_error(ours, formula.detach()) < 1e-14
    weights = [golden.uniform(f"w{index}", value.shape) for index, value in enumerate(expected)]
    gradients, formula_gradients = (
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, values, strict=True)), inputs)
        for values in (actual, expected)
    )
    for ours, formula in zip(gradients, formula_gradients, strict=True):
        assert golden.relative_error(ours, formula) < 1e-12


@pytest.mark.parametrize(("shift", "size"), [(0, (8, 8)), (0, (13, 10)), (4, (16, 16)), (4, (11, 18)), (3, (9, 20))])
def test_attention_block_is_its_equations(shift, size):
    block = fill(LEGMBlock(6, heads=2, mlp_ratio=1.5, window_size=8, shift=shift))
    x = golden.uniform("x", (2, 6, *size))
    *_, rescale, rebias = block.norm(x, block.mix.value, block.mix.query_key)
    normalised = F.group_norm(x, 1, block.norm.weight.view(-1), block.norm.bias.view(-1), 1e-5)
    mixed = block.mix.proj(local(block.mix, normalised) + attend(block.mix, normalised, block.mix.position_bias.meta))
    y = x + rescale[..., None, None] * mixed + rebias[..., None, None]
    first, second = block.mlp[0], block.mlp[2]
    assert first.weight.shape == (9, 6, 1, 1)
    expected = y + F.conv2d(F.conv2d(y, first.weight, first.bias).clamp_min(0), second.weight, second.bias)
    assert golden.relative_error(block(x), expected) < 1e-13


def test_block_without_attention_is_its_equations():
    block = fill(LEGMBlock(6, mlp_ratio=2))
    x = golden.uniform("x", (2, 6, 5, 9))
    y = x + block.mix.proj(local(block.mix, x))
    assert golden.relative_error(block(x), y + block.mlp(y)) < 1e-14
    assert not any(name.startswith(("norm", "mix.query_key", "mix.position_bias")) for name in block.state_dict())


def test_a_constant_added_to_the_scores_has_no_gradient():
    block = fill(LEGMBlock(6, heads=2))
    x = golden.uniform("x", (1, 6, 12, 12))
    (block(x) * golden.uniform("w", x.shape)).sum().backward()
    assert block.mix.position_bias.meta[2].bias.grad.norm() < 1e-13
    assert block.mix.position_bias.meta[2].weight.grad.norm() > 1e-6


@pytest.mark.parametrize(
    ("depth", "ratio", "attending"),
    [(8, 1 / 4, [6, 7]), (8, 1 / 2, [4, 5, 6, 7]), (8, 3 / 4, [2, 3, 4, 5, 6, 7]), (4, 0, []), (3, 1, [0, 1, 2])],
)
def test_the_last_blocks_attend_and_every_other_is_shifted(depth, ratio, attending):
    legm = LEGM(4, depth, 2, attention_ratio=ratio)
    assert [index for index, block in enumerate(legm.blocks) if block.mix.heads] == attending
    assert [block.mix.shift for block in legm.blocks] == [4 * (index % 2) for index in range(depth)]
    assert all((block.norm is not None) == (index in attending) for index, block in enumerate(legm.blocks))


def test_legm_applies_its_blocks_in_order():
    legm = fill(LEGM(4, 3, 2, mlp_ratio=2, attention_ratio=2 / 3))
    x = golden.uniform("x", (1, 4, 9, 8))
    expected = legm.blocks[2](legm.blocks[1](legm.blocks[0](x)))
    assert torch.equal(legm(x), expected)


@pytest.mark.parametrize("window_size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_size_from_the_smallest_runs_and_the_one_below_is_an_error(window_size, depth):
    legm = LEGM(2, depth, 1, window_size=window_size)
    smallest = legm.smallest_side
    assert smallest == max(3, smallest_side(window_size, shifted=depth == 2))
    for side in range(smallest, smallest + window_size):
        x = torch.rand(1, 2, side, smallest)
        assert torch.isfinite(legm(x)).all()
    with pytest.raises(ValueError, match=f"at least {smallest}×{smallest} pixels, got {smallest}×{smallest - 1}"):
        legm(torch.rand(1, 2, smallest, smallest - 1))


def test_published_window_needs_five_pixels_and_seven_when_shifted():
    assert smallest_side(8, shifted=False) == 5
    assert smallest_side(8, shifted=True) == 7


def test_initial_weights_have_the_published_distribution():
    torch.manual_seed(0)
    block = LEGMBlock(96, heads=6, mlp_ratio=4, network_depth=32)
    gain = (8 * 32) ** -0.25
    expected = {
        "mix.value": gain * math.sqrt(2 / (96 + 96)),
        "mix.query_key": math.sqrt(2 / (96 + 192)),
        "mix.local": gain * math.sqrt(2 / (25 + 25 * 96)),
        "mix.proj": gain * math.sqrt(2 / (96 + 96)),
        "mlp.0": gain * math.sqrt(2 / (96 + 384)),
        "mlp.2": gain * math.sqrt(2 / (384 + 96)),
        "norm.rescale": 0.02,
        "norm.rebias": 0.02,
    }
    for name, deviation in expected.items():
        layer = block.get_submodule(name)
        values = layer.weight.detach().double().flatten()
        margin = 5 / math.sqrt(len(values))  # five standard errors: of the mean, and (√2 wider) of the deviation
        assert abs(values.mean()) < margin * deviation, name
        assert abs(values.std() / deviation - 1) < margin, name
        assert torch.equal(layer.bias, torch.full_like(layer.bias, name == "norm.rescale")), name
    assert torch.equal(block.norm.weight, torch.ones(1, 96, 1, 1))
    assert torch.equal(block.norm.bias, torch.zeros(1, 96, 1, 1))
    for layer in (block.mix.position_bias.meta[0], block.mix.position_bias.meta[2]):  # PyTorch's default
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_network_depth_defaults_to_the_legms_own():
    torch.manual_seed(0)
    own = LEGM(16, 2, 2)
    torch.manual_seed(0)
    explicit = LEGM(16, 2, 2, network_depth=2)
    torch.manual_seed(0)
    deeper = LEGM(16, 2, 2, network_depth=32)
    assert torch.equal(own.blocks[0].mlp[0].weight, explicit.blocks[0].mlp[0].weight)
    assert golden.relative_error(deeper.blocks[0].mlp[0].weight * 2, own.blocks[0].mlp[0].weight) < 1e-6  # (32/2)^¼


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels: expected an integer of at least 1, got 0"),
        ({"depth": 0}, "depth: expected an integer of at least 1, got 0"),
        ({"heads": 3}, "heads: must divide the 8 channels, or be 0, got 3"),
        ({"mlp_ratio": 0}, "mlp_ratio: must leave at least one of 8 channels, got 0"),
        ({"attention_ratio": 1.5}, r"attention_ratio: expected a number in \[0, 1\], got 1.5"),
        ({"window_size": 1}, "window_size: must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LEGM(**({"channels": 8, "depth": 2, "heads": 2} | arguments))


def test_shift_beyond_the_window_is_named():
    with pytest.raises(ValueError, match="shift: must be at least 0 and below window_size = 8, got 8"):
        LEGMBlock(8, heads=2, shift=8)


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \[B, C, H, W\] = \[1, 8, 9, 9\], got \[1, 7, 9, 9\]"):
        LEGM(8, 1, 2)(torch.zeros(1, 7, 9, 9))
