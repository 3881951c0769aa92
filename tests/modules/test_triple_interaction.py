from __future__ import annotations

import pytest
import torch

from mitnet_fast.modules import TripleInteraction
from tests import golden
from tests.golden import deterministic
from tests.models import mitnet_formula as formula


def pyramid(name: str, width: int, levels: int, size: tuple[int, int]) -> list[torch.Tensor]:
    maps = []
    for level in range(levels):
        maps.append(golden.uniform(f"{name}{level}", (2, width * 2**level, *size)).requires_grad_())
        size = tuple((side + 1) // 2 for side in size)
    return maps


@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 1)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_equals_the_formula(levels, size):
    module = TripleInteraction(2, levels).double()
    deterministic.fill_module(module)
    phase, amplitude = (pyramid(name, 2, levels, size) for name in ("phase", "amplitude"))
    fused = [*module(phase, amplitude)[0], *module(phase, amplitude)[1]]
    w = formula.weights(module, "triple_interaction")
    expected = [
        *formula.level_interaction(w, "fci", "pha", phase),
        *formula.level_interaction(w, "fci", "amp", amplitude),
    ]
    assert max(map(golden.relative_error, fused, expected)) < 1e-13

    inputs = [*phase, *amplitude, *module.parameters()]
    weights = [golden.uniform(f"w{i}", output.shape) for i, output in enumerate(fused)]
    actual = torch.autograd.grad(fused, inputs, weights)
    truth = torch.autograd.grad(expected, inputs, weights)
    assert max(map(golden.relative_error, actual, truth)) < 1e-12


def test_leaves_the_lists_it_is_given_alone():
    phase, amplitude = (pyramid(name, 2, 3, (8, 8)) for name in ("phase", "amplitude"))
    before = [*phase, *amplitude]
    TripleInteraction(2).double()(phase, amplitude)
    assert all(a is b for a, b in zip([*phase, *amplitude], before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 3), "width: expected an integer of at least 1, got 0"), ((4, 0), "levels: expected .* at least 1, got 0")],
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        TripleInteraction(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps[:2], "amplitude: expected 3 levels, got 2"),
        (lambda maps: [*maps[:2], maps[2][:, :4]], r"amplitude\[2\]: expected .* \[2, 8, 2, 3\], got \[2, 4, 2, 3\]"),
        (lambda maps: [maps[0], maps[1][..., :5], maps[2]], r"amplitude\[1\]: .* \[2, 4, 4, 6\], got \[2, 4, 4, 5\]"),
    ],
)
def test_forward_names_what_is_wrong(change, message):
    phase, amplitude = (pyramid(name, 2, 3, (8, 12)) for name in ("phase", "amplitude"))
    with pytest.raises(ValueError, match=message):
        TripleInteraction(2).double()(phase, change(amplitude))
