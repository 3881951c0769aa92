"""MSAAM: the folded convolutions against the full-size map that the equations write down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.modules.msaam import MSAAM, fold_taps

from .. import golden

SIZES = [(8, 8), (12, 20), (28, 16)]


def levels(height: int, width: int, batch: int = 2) -> list[torch.Tensor]:
    shapes = [(batch, 3, height, width), (batch, 4, height // 2, width // 2), (batch, 5, height // 4, width // 4)]
    return [golden.uniform(f"e{level}", shape).requires_grad_() for level, shape in enumerate(shapes)]


def formula(module: MSAAM, e1: torch.Tensor, e2: torch.Tensor, e3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations as they stand: everything enlarged to full size and concatenated."""
    average = torch.cat([e1.mean((2, 3)), e2.mean((2, 3)), e3.mean((2, 3))], 1)[..., None, None]
    hidden, out = module.attention[0], module.attention[2]
    scale = F.conv2d(F.conv2d(average, hidden.weight, hidden.bias).relu(), out.weight, out.bias)
    e2, e3 = e2.repeat_interleave(2, 2).repeat_interleave(2, 3), e3.repeat_interleave(4, 2).repeat_interleave(4, 3)
    full = torch.cat([e1 * scale[:, :1], e2 * scale[:, 1:2], e3 * scale[:, 2:]], 1)
    fused = []
    for layer, stride in ((module.fuse2, 2), (module.fuse3, 4)):
        x = F.conv2d(full, layer.weight, layer.bias, stride=stride, padding=1)
        centred = x - x.mean((2, 3), keepdim=True)
        fused.append((centred / torch.sqrt(centred.square().mean((2, 3), keepdim=True) + 1e-5)).relu())
    return tuple(fused)


@pytest.fixture
def module() -> MSAAM:
    module = MSAAM((3, 4, 5), hidden=7)
    golden.deterministic.fill_module(module)
    return module.double()


@pytest.mark.parametrize(("taps", "factor", "stride"), [(3, 2, 2), (5, 2, 4), (5, 4, 4)])
def test_folded_taps_are_the_convolution_of_the_enlarged_map(taps, factor, stride):
    weight = golden.uniform("weight", (2, 3, taps, taps))
    small = golden.uniform("small", (1, 3, 8, 12))
    enlarged = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    expected = F.conv2d(enlarged, weight, stride=stride, padding=1)
    folded = fold_taps(weight, factor)
    assert folded.shape == (2, 3, 1 + (taps - 1) // factor, 1 + (taps - 1) // factor)
    actual = F.conv2d(F.pad(small, (1, 1, 1, 1)), folded, stride=stride // factor)
    assert golden.relative_error(actual[..., : expected.shape[2], : expected.shape[3]], expected) < 1e-14


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_the_equations(module, size):
    inputs = levels(*size)
    actual, expected = module(*inputs), formula(module, *inputs)
    scalars = []
    for results in (actual, expected):
        for result, reference in zip(results, expected, strict=True):
            assert golden.relative_error(result, reference.detach()) < 1e-13
        scalars.append(sum((golden.uniform(f"w{i}", r.shape) * r).sum() for i, r in enumerate(results)))
    parameters = {name: value for name, value in module.named_parameters() if not name.startswith("unused")}
    wanted = [*inputs, *parameters.values()]
    names = ["e1", "e2", "e3", *parameters]
    ours, theirs = (torch.autograd.grad(scalar, wanted) for scalar in scalars)
    for name, gradient, reference in zip(names, ours, theirs, strict=True):
        if name in ("fuse2.bias", "fuse3.bias"):  # a constant that the normalisation removes
            assert gradient.norm() < 1e-12
        else:
            assert golden.relative_error(gradient, reference) < 1e-11, name


def test_the_full_size_fusion_is_kept_and_takes_no_part(module):
    inputs = levels(8, 8)
    before = [result.detach() for result in module(*inputs)]
    with torch.no_grad():
        module.unused_full_size.weight.fill_(float("nan"))
    after = module(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    sum(result.sum() for result in after).backward()
    assert module.unused_full_size.weight.grad is None
    assert module.unused_full_size.weight.shape == (3, 12, 3, 3)


def test_published_size_has_the_published_parameters():
    shapes = {name: tuple(value.shape) for name, value in MSAAM().named_parameters()}
    assert shapes["attention.0.weight"] == (128, 168, 1, 1)
    assert shapes["attention.2.weight"] == (3, 128, 1, 1)
    assert shapes["fuse2.weight"] == (48, 168, 3, 3)
    assert shapes["fuse3.weight"] == (96, 168, 5, 5)
    assert shapes["unused_full_size.weight"] == (24, 168, 3, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 8, 8), (1, 4, 4, 4), (1, 5, 2, 2)], r"e1: expected .*\[1, 3, 8, 8\], got \[1, 2, 8, 8\]"),
        ([(1, 3, 8, 10), (1, 4, 4, 5), (1, 5, 2, 2)], "e1: height and width must be multiples of 4 .* got 8×10"),
        ([(1, 3, 4, 8), (1, 4, 2, 4), (1, 5, 1, 2)], "at least 8, got 4×8"),
        ([(1, 3, 8, 8), (1, 4, 8, 8), (1, 5, 2, 2)], r"e2: expected .*\[1, 4, 4, 4\], got \[1, 4, 8, 8\]"),
        ([(1, 3, 8, 8), (1, 4, 4, 4), (1, 5, 2, 1)], r"e3: expected .*\[1, 5, 2, 2\], got \[1, 5, 2, 1\]"),
    ],
)
def test_bad_maps_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        MSAAM((3, 4, 5))(*(torch.zeros(shape) for shape in shapes))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"widths: expected three levels, got \[3, 4\]"):
        MSAAM((3, 4))
    with pytest.raises(ValueError, match=r"widths\[1\]: expected an integer of at least 1, got 0"):
        MSAAM((3, 0, 5))
