"""The bundled photographs: depth by the calibration's formula, holes filled from the background, ramps labelled."""

from __future__ import annotations

import math
from collections import Counter
from importlib import resources
from itertools import permutations

import numpy as np
import pytest
import skimage.data
import torch

from mitnet_fast.data.haze import synthesise_haze
from mitnet_fast.data.photographs import (
    MEASURED,
    NAMES,
    PLANAR_RAMP,
    HazyPhotographs,
    Photograph,
    distance_from_disparity,
    fill_from_background,
    nearness,
    photograph,
    photographs,
    planar_ramp,
)

SIZES = {
    "motorcycle": (500, 741),
    "astronaut": (512, 512),
    "coffee": (400, 600),
    "chelsea": (300, 451),
    "rocket": (427, 640),
    "hubble": (872, 1000),
    "retina": (1411, 1411),
    "camera": (512, 512),
    "brick": (512, 512),
    "grass": (512, 512),
}
LOADERS = {"hubble": "hubble_deep_field"}


@pytest.fixture(scope="module")
def motorcycle() -> Photograph:
    return photograph("motorcycle")


@pytest.fixture(scope="module")
def disparity() -> np.ndarray:
    return skimage.data.stereo_motorcycle()[2]


@pytest.mark.parametrize("name", NAMES)
def test_photographs_are_scikit_images(name):
    photo = photograph(name)
    assert photo.rgb.shape == (3, *SIZES[name])
    assert photo.depth.shape == (1, *SIZES[name])
    assert photo.rgb.dtype == photo.depth.dtype == torch.float32
    if name == "motorcycle":
        expected = skimage.data.stereo_motorcycle()[0]
    else:
        expected = getattr(skimage.data, LOADERS.get(name, name))()
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    samples = (photo.rgb * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    # JPEG decoders may round differently
    tolerance = 0 if photo.name not in ("rocket", "hubble", "retina") else 2
    assert np.abs(samples.astype(int) - expected).max() <= tolerance
    assert photo.credit


@pytest.mark.parametrize("name", NAMES)
def test_depth_is_finite_positive_and_labelled(name):
    photo = photograph(name, max_side=200)
    assert bool(torch.isfinite(photo.depth).all())
    assert float(photo.depth.min()) > 1.9
    assert float(photo.depth.max()) < 5.1
    assert photo.depth_kind == (MEASURED if name == "motorcycle" else PLANAR_RAMP)


@pytest.mark.parametrize(("row", "column"), [(499, 370), (300, 300), (60, 560), (20, 250), (420, 100)])
def test_motorcycle_depth_is_the_calibrations(motorcycle, disparity, row, column):
    d = float(disparity[row, column])
    assert math.isfinite(d)
    assert float(motorcycle.depth[0, row, column]) == pytest.approx(994.978 * 0.193001 / (d + 31.086), rel=1e-6)


def test_motorcycle_holes_take_the_farther_neighbour_in_their_row(motorcycle, disparity):
    hole = ~np.isfinite(disparity)
    assert hole.mean() == pytest.approx(0.0735, abs=1e-4)
    depth = motorcycle.depth[0].numpy()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(hole.any(axis=1)))[:40]
    for row in rows:
        known = np.flatnonzero(~hole[row])
        for column in np.flatnonzero(hole[row]):
            left, right = known[known < column], known[known > column]
            neighbours = [depth[row, side] for side in (*left[-1:], *right[:1])]
            assert depth[row, column] == max(neighbours)


def test_distance_of_a_hole_is_not_a_number():
    distance = distance_from_disparity(np.array([[0.0, np.inf], [np.nan, 30.0]]))
    np.testing.assert_allclose(distance, [[6.177435, np.nan], [np.nan, 3.143629]], rtol=1e-6)


def test_filling_by_hand():
    nan = np.nan
    depth = np.array(
        [
            [nan, nan, nan, nan, nan],
            [2.0, nan, nan, 5.0, nan],
            [nan, 7.0, nan, 3.0, 4.0],
            [nan, nan, nan, nan, nan],
            [nan, nan, nan, nan, nan],
            [1.0, 1.5, nan, nan, 1.25],
        ]
    )
    expected = np.array(
        [
            [2.0, 5.0, 5.0, 5.0, 5.0],
            [2.0, 5.0, 5.0, 5.0, 5.0],
            [7.0, 7.0, 7.0, 3.0, 4.0],
            [7.0, 7.0, 7.0, 3.0, 4.0],
            [1.0, 1.5, 1.5, 1.5, 1.25],
            [1.0, 1.5, 1.5, 1.5, 1.25],
        ]
    )
    np.testing.assert_array_equal(fill_from_background(depth), expected)


def test_filling_keeps_what_is_whole():
    depth = np.random.default_rng(0).uniform(1, 9, (7, 5)).astype(np.float32)
    filled = fill_from_background(depth)
    assert filled.dtype == np.float32
    np.testing.assert_array_equal(filled, depth)


@pytest.mark.parametrize(
    ("depth", "message"), [(np.full((3, 3), np.nan), "no known value"), (np.zeros(3), r"\[H, W\], got shape \[3\]")]
)
def test_filling_refuses(depth, message):
    with pytest.raises(ValueError, match=message):
        fill_from_background(depth)


def test_ramp_is_a_plane_far_at_the_top():
    ramp = planar_ramp(4, 3, near=1.0, far=7.0)
    assert torch.equal(ramp, torch.tensor([7.0, 5.0, 3.0, 1.0]).view(1, 4, 1).expand(1, 4, 3))
    assert torch.equal(photograph("chelsea").depth, planar_ramp(300, 451))


@pytest.mark.parametrize(("near", "far"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_ramp_refuses(near, far):
    with pytest.raises(ValueError, match="near"):
        planar_ramp(4, 4, near=near, far=far)


def test_nearness_is_inverse_distance_over_its_range():
    near = nearness(torch.tensor([[[1.0, 2.0, 4.0]]]))
    torch.testing.assert_close(near, torch.tensor([[[1.0, 1 / 3, 0.0]]]))
    assert torch.equal(nearness(torch.full((1, 2, 2), 3.0)), torch.zeros(1, 2, 2))


def test_shrinking_keeps_shape_range_and_mean():
    whole, small = photograph("motorcycle"), photograph("motorcycle", max_side=190)
    assert small.rgb.shape == (3, 128, 190)
    assert small.depth.shape == (1, 128, 190)
    for before, after in ((whole.rgb, small.rgb), (whole.depth, small.depth)):
        assert float(after.min()) >= float(before.min())
        assert float(after.max()) <= float(before.max())
        assert float(after.mean()) == pytest.approx(float(before.mean()), rel=2e-3)
    assert torch.equal(photograph("chelsea", max_side=451).rgb, photograph("chelsea").rgb)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("moon",), "unknown photograph 'moon'; there are motorcycle"), (("coffee", 0), "max_side")],
)
def test_photograph_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        photograph(arguments[0], max_side=arguments[1] if len(arguments) > 1 else None)


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no coffee\.png"):
        photograph("coffee")


@pytest.fixture(scope="module")
def small() -> list[Photograph]:
    return photographs(("chelsea", "motorcycle"), max_side=96)


def test_items_are_hazy_by_the_scattering_model(small):
    dataset = HazyPhotographs(small, patch=32, views=3, beta=(0.3, 0.3), airlight=(0.8, 0.8), share=(0.5, 1.0), seed=3)
    assert len(dataset) == 6
    for index in range(6):
        item = dataset[index]
        photo = small[index % 2]
        assert item["name"] == photo.name
        assert item["hazy"].shape == item["clear"].shape == (3, 32, 32)
        assert item["depth"].shape == (1, 32, 32)
        # nearness back to metres: exact but for shrinking, which does not commute with 1/Z
        low, high = 1 / float(photo.depth.max()), 1 / float(photo.depth.min())
        distance = 1 / (low + item["depth"] * (high - low))
        expected = synthesise_haze(item["clear"], distance, 0.3, 0.8)
        assert float((item["hazy"] - expected).abs().mean()) < 2e-3


def test_items_depend_on_seed_epoch_and_index_alone(small):
    def items(seed: int, epoch: int) -> list[dict]:
        dataset = HazyPhotographs(small, patch=16, views=2, seed=seed)
        dataset.set_epoch(epoch)
        return [dataset[index] for index in range(len(dataset))]

    first, second = items(1, 2), items(1, 2)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("hazy", "clear", "depth"))
    for other in (items(1, 3), items(2, 2)):
        assert not any(torch.equal(a["hazy"], b["hazy"]) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0]["hazy"], first[2]["hazy"])  # the same photograph, two views


def test_haze_stays_within_its_ranges():
    black = Photograph("black", torch.zeros(3, 40, 40), torch.full((1, 40, 40), 2.0), PLANAR_RAMP, "")
    dataset = HazyPhotographs([black], patch=8, views=200, beta=(0.2, 0.4), airlight=(0.6, 0.9))
    levels = torch.stack([dataset[index]["hazy"].mean() for index in range(200)])
    # I = A·(1 − exp(−2β)) for J = 0
    low, high = 0.6 * (1 - math.exp(-0.4)), 0.9 * (1 - math.exp(-0.8))
    assert low <= float(levels.min()) < low + 0.03
    assert high - 0.06 < float(levels.max()) <= high


def test_saturation_moves_colours_from_grey_by_its_factor(small):
    plain = HazyPhotographs(small, patch=32, seed=5)
    for factor in (0.0, 0.5):
        altered = HazyPhotographs(small, patch=32, seed=5, saturation=(factor, factor))
        for index in range(2):
            clear, expected = altered[index]["clear"], plain[index]["clear"]
            grey = expected.mean(0, keepdim=True)
            torch.testing.assert_close(clear, grey + factor * (expected - grey))
            assert torch.equal(altered[index]["depth"], plain[index]["depth"])
    vivid = HazyPhotographs(small, patch=32, seed=5, saturation=(2.0, 2.0))[1]["clear"]
    expected = plain[1]["clear"]
    grey = expected.mean(0, keepdim=True)
    torch.testing.assert_close(vivid, (2 * expected - grey).clamp(0, 1))
    assert float((vivid - expected).abs().max()) > 0.1


def test_channels_are_exchanged_in_their_share(small):
    plain = HazyPhotographs(small, patch=8, views=100, seed=6)
    assert torch.equal(plain[0]["clear"], HazyPhotographs(small, patch=8, views=100, seed=6, exchanged=0.0)[0]["clear"])
    orders = Counter()
    altered = HazyPhotographs(small, patch=8, views=100, seed=6, exchanged=0.6)
    for index in range(200):
        clear, expected = altered[index]["clear"], plain[index]["clear"]
        (found,) = [order for order in permutations(range(3)) if torch.equal(clear, expected[list(order)])]
        orders[found] += 1
    # a sixth of the exchanged ones keep their order: 100 of 200, and 20 of each other order, are expected
    assert 80 <= orders[0, 1, 2] <= 120
    assert len(orders) == 6
    assert all(8 <= count <= 34 for order, count in orders.items() if order != (0, 1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photographs": []}, "photographs"),
        ({"patch": 0}, "patch"),
        ({"views": 0}, "views"),
        ({"seed": -1}, "seed"),
        ({"share": (0.5, 1.5)}, "share"),
        ({"share": (0.0, 1.0)}, "share"),
        ({"saturation": (1.5, 1.0)}, "saturation"),
        ({"saturation": (-0.5, 1.0)}, "saturation"),
        ({"exchanged": 1.5}, "exchanged"),
    ],
)
def test_dataset_refuses(small, changes, message):
    arguments = {"photographs": small, "patch": 16, **changes}
    with pytest.raises(ValueError, match=message):
        HazyPhotographs(arguments.pop("photographs"), **arguments)


def test_an_index_outside_is_an_error(small):
    with pytest.raises(IndexError, match="0 to 1"):
        HazyPhotographs(small, patch=16)[2]
