from __future__ import annotations

import pytest
import torch

from mitnet_fast.modules import AmplitudePhaseBlock
from tests import golden
from tests.golden import deterministic
from tests.models import mitnet_formula as formula


def make(*arguments, **options) -> AmplitudePhaseBlock:
    block = AmplitudePhaseBlock(*arguments, **options).double()
    deterministic.fill_module(block)
    return block


def gradients(outputs, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    scalar = sum((output * golden.uniform(f"w{i}", output.shape)).sum() for i, output in enumerate(outputs))
    return torch.autograd.grad(scalar, inputs, allow_unused=True)


@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize("cross_stage", [False, True])
@pytest.mark.parametrize("mode", ["amplitude", "phase"])
def test_equals_the_formula_with_complex_spectra_and_concatenation(mode, cross_stage, size):
    block = make(3, 5, mode, negative_slope=0.3, cross_stage=cross_stage)
    x = golden.uniform("x", (2, 3, *size)).requires_grad_()
    features = tuple(golden.uniform(name, (2, 5, *size)).requires_grad_() for name in ("encoder", "decoder"))
    features = features if cross_stage else ()
    out = block(x, *features)
    w = formula.weights(block, "phase_encoder.0")
    expected = formula.block(w, "down_path_2.0", x, mode, 0.3, features=features or None)

    assert golden.relative_error(out, expected) < 1e-12
    inputs = [x, *features, *block.parameters()]
    for actual, truth in zip(gradients([out], inputs), gradients([expected], inputs), strict=True):
        assert golden.relative_error(actual, truth) < 1e-10


def test_without_the_spectral_branch_the_shortcut_counts_twice_and_the_branch_gets_no_gradient():
    block = make(4, 6, spectral=False)
    x = golden.uniform("x", (1, 4, 6, 7))
    out = block(x)
    assert golden.relative_error(out, block.residual(x) + 2 * block.identity(x)) < 1e-14
    out.sum().backward()
    unused = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    assert unused == {
        f"{part}.{leaf}" for part in ("spectral_in", "spectral_out", "fusion") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("spectral", [True, False])
def test_a_joined_map_counts_as_the_last_channels_of_the_input(spectral):
    block = make(5, 6, spectral=spectral)
    x, joined = (golden.uniform(name, (2, c, 6, 7)).requires_grad_() for name, c in (("x", 3), ("joined", 2)))
    out, expected = block(x, joined=joined), block(torch.cat([x, joined], 1))
    assert golden.relative_error(out, expected) < 1e-13
    inputs = [x, joined, *block.residual.parameters(), *block.identity.parameters()]
    for actual, truth in zip(gradients([out], inputs), gradients([expected], inputs), strict=True):
        assert golden.relative_error(actual, truth) < 1e-12


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 8, 8), (1, 1, 8, 8)], "x: expected fewer than 3 channels beside a joined map, got 3"),
        ([(1, 2, 8, 8), (1, 2, 8, 8)], r"joined: expected shape \[B, C, H, W\] = \[1, 1, 8, 8\], got \[1, 2, 8, 8\]"),
        ([(1, 2, 8, 8), (1, 1, 8, 4)], r"joined: .*got \[1, 1, 8, 4\]"),
    ],
)
def test_forward_names_what_is_wrong_with_a_joined_map(shapes, message):
    x, joined = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        AmplitudePhaseBlock(3, 5)(x, joined=joined)


def test_downsampling_also_returns_the_output_at_half_the_size():
    block = make(3, 4, "phase", downsample=True)
    x = golden.uniform("x", (2, 3, 6, 9))
    full, half = block(x)
    w = formula.weights(block, "phase_encoder.0")
    expected = formula.block(w, "down_path_2.0", x, "phase", 0.2)
    assert golden.relative_error(full, expected) < 1e-12
    assert golden.relative_error(half, formula.conv(w, "down_path_2.0.downsample", expected)) < 1e-12
    assert half.shape == (2, 4, 3, 4)
    assert block.downsample.bias is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "in_channels: expected an integer of at least 1, got 0"),
        ((4, 2.5), {}, "out_channels: expected an integer of at least 1, got 2.5"),
        ((4, True), {}, "out_channels: expected an integer of at least 1, got True"),
        ((4, 4, "magnitude"), {}, "mode: got 'magnitude', allowed are 'amplitude' and 'phase'"),
        ((4, 4), {"negative_slope": -0.1}, r"negative_slope: expected a number in \[0, 1\), got -0.1"),
        ((4, 4), {"spectral": False, "cross_stage": True}, "cross_stage: needs spectral=True"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        AmplitudePhaseBlock(*arguments, **options)


@pytest.mark.parametrize(
    ("cross_stage", "shapes", "error", "message"),
    [
        (False, [(1, 4, 8, 8)], ValueError, r"x: expected shape \[B, C, H, W\] = \[1, 3, 8, 8\], got \[1, 4, 8, 8\]"),
        (False, [(3, 8, 8)], ValueError, r"x: expected shape \[B, C, H, W\], got \[3, 8, 8\]"),
        (False, [(1, 3, 8, 8), (1, 5, 8, 8)], ValueError, "encoder_features: taken only with cross_stage=True"),
        (True, [(1, 3, 8, 8)], ValueError, "encoder_features: required with cross_stage=True"),
        (True, [(1, 3, 8, 8), (1, 5, 8, 8)], ValueError, "decoder_features: required with cross_stage=True"),
        (True, [(1, 3, 8, 8), (1, 5, 8, 8), (1, 5, 8, 4)], ValueError, r"decoder_features: .*got \[1, 5, 8, 4\]"),
    ],
)
def test_forward_names_what_is_wrong(cross_stage, shapes, error, message):
    with pytest.raises(error, match=message):
        AmplitudePhaseBlock(3, 5, cross_stage=cross_stage)(*(torch.zeros(shape) for shape in shapes))
