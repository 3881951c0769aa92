"""Windows and orientations: exact geometry, and the distributions that the papers' training draws from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mitnet_fast.data.transforms import Geometry, centre, draw_dcmpnet, draw_mitnet, turn

IMAGE = torch.arange(2 * 6 * 7).view(2, 6, 7)
DRAWS = 4000


def within(count: int, probability: float) -> bool:
    """Five standard deviations of a binomial count; the generators are seeded, so this cannot fail by chance."""
    return abs(count - DRAWS * probability) < 5 * (DRAWS * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        (Geometry(1, 2, 3), [[9, 10, 11], [16, 17, 18], [23, 24, 25]]),
        (Geometry(1, 2, 3, flip_horizontal=True), [[11, 10, 9], [18, 17, 16], [25, 24, 23]]),
        (Geometry(1, 2, 3, flip_vertical=True), [[23, 24, 25], [16, 17, 18], [9, 10, 11]]),
        (Geometry(1, 2, 3, transpose=True), [[9, 16, 23], [10, 17, 24], [11, 18, 25]]),
        (Geometry(1, 2, 3, quarter_turns=1), [[11, 18, 25], [10, 17, 24], [9, 16, 23]]),
        (Geometry(1, 2, 3, quarter_turns=2), [[25, 24, 23], [18, 17, 16], [11, 10, 9]]),
        (Geometry(1, 2, 3, flip_horizontal=True, transpose=True), [[11, 18, 25], [10, 17, 24], [9, 16, 23]]),
        (Geometry(1, 2, 3, flip_horizontal=True, quarter_turns=3), [[25, 18, 11], [24, 17, 10], [23, 16, 9]]),
    ],
)
def test_geometry(geometry: Geometry, expected: list[list[int]]) -> None:
    window = geometry.apply(IMAGE)
    assert window[0].tolist() == expected
    assert torch.equal(window[1], window[0] + 42)


def test_a_batch_is_turned_as_its_geometries_say() -> None:
    bits = [*np.ndindex(2, 2, 2)]
    geometries = [Geometry(1, 2, 3, *map(bool, each), quarter_turns=turns) for each in bits for turns in range(4)]
    windows = torch.stack([geometry.window(IMAGE) for geometry in geometries])
    orientation = torch.tensor([geometry.orientation for geometry in geometries])
    turned = turn(windows, orientation)
    for image, geometry in zip(turned, geometries, strict=True):
        assert torch.equal(image, geometry.apply(IMAGE))
    assert len({tuple(image[0].flatten().tolist()) for image in turned}) == 8


def test_centre() -> None:
    assert centre(6, 7, 3) == Geometry(1, 2, 3)
    assert centre(3, 3, 3) == Geometry(0, 0, 3)


@pytest.mark.parametrize("draw", [draw_mitnet, draw_dcmpnet])
def test_whole_image_has_one_window(draw: object) -> None:
    generator = np.random.default_rng(0)
    assert {(each.top, each.left) for each in (draw(generator, 5, 5, 5) for _ in range(50))} == {(0, 0)}


def test_mitnet_draws_uniformly() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_mitnet(generator, 11, 9, 8) for _ in range(DRAWS)]
    for top in range(4):
        assert within(sum(each.top == top for each in drawn), 1 / 4)
    for left in range(2):
        assert within(sum(each.left == left for each in drawn), 1 / 2)
    orientations = [(each.flip_horizontal, each.flip_vertical, each.transpose) for each in drawn]
    for orientation in np.ndindex(2, 2, 2):
        assert within(orientations.count(tuple(map(bool, orientation))), 1 / 8)
    assert {(each.top, each.left) for each in drawn} == set(np.ndindex(4, 2))
    assert {each.quarter_turns for each in drawn} == {0}


def test_dcmpnet_prefers_the_borders() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_dcmpnet(generator, 20, 10, 8) for _ in range(DRAWS)]
    for axis, side in (("top", 20), ("left", 10)):
        places = side - 8 + 1
        special = 0.1 * 8 / side
        for start in range(places):
            border = special / 2 if start in (0, places - 1) else 0
            assert within(sum(getattr(each, axis) == start for each in drawn), border + (1 - special) / places)
    orientations = [(each.flip_horizontal, each.quarter_turns) for each in drawn]
    for orientation in np.ndindex(2, 4):
        assert within(orientations.count((bool(orientation[0]), orientation[1])), 1 / 8)
    assert not any(each.flip_vertical or each.transpose for each in drawn)
