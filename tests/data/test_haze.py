"""The scattering model against its formula, its limits, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from mitnet_fast.data.haze import depth_from_disparity, sample_haze, synthesise_haze


def scene(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clear = torch.rand(*batch, 3, 5, 7, generator=generator, dtype=dtype)
    return clear, 4 * torch.rand(*batch, 1, 5, 7, generator=generator, dtype=dtype)


class TestSynthesise:
    def test_formula(self) -> None:
        clear, depth = scene()
        hazy = synthesise_haze(clear, depth, 0.7, 0.9)
        t = math.exp(-0.7 * depth[0, 2, 3].item())
        assert hazy[1, 2, 3].item() == pytest.approx(clear[1, 2, 3].item() * t + 0.9 * (1 - t), abs=1e-15)
        assert (hazy.shape, hazy.dtype) == (clear.shape, clear.dtype)

    def test_near_is_clear_and_far_is_airlight(self) -> None:
        clear, depth = scene()
        airlight = torch.tensor([0.7, 0.8, 0.9], dtype=torch.float64)
        assert torch.equal(synthesise_haze(clear, torch.zeros_like(depth), 1.5, airlight), clear)
        assert torch.equal(synthesise_haze(clear, depth, 0, 0.9), clear)
        far = synthesise_haze(clear, torch.full_like(depth, 1e6), 1.5, airlight)
        assert torch.equal(far, airlight[:, None, None].expand_as(clear))

    def test_batch_is_image_by_image(self) -> None:
        clear, depth = scene(2, 3)
        beta, airlight = torch.rand(2, 3).double(), torch.rand(2, 3, 3).double()
        hazy = synthesise_haze(clear, depth, beta, airlight)
        for i in range(2):
            for j in range(3):
                alone = synthesise_haze(clear[i, j], depth[i, j], beta[i, j], airlight[i, j])
                assert torch.equal(hazy[i, j], alone)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"clear": torch.rand(4, 5, 7)}, ValueError, r"clear: expected \[..., 3, H, W\], got \[4, 5, 7\]"),
            ({"clear": torch.ones(3, 5, 7, dtype=torch.uint8)}, TypeError, "clear: expected floating point"),
            ({"clear": torch.rand(3, 5, 7) + 1.5}, ValueError, r"clear: expected values in \[0, 1\]"),
            ({"clear": torch.full((3, 5, 7), math.nan)}, ValueError, "clear: expected values"),
            ({"depth": torch.rand(3, 5, 7)}, ValueError, r"depth: expected \[..., 1, H, W\]"),
            ({"depth": torch.rand(1, 5, 8)}, ValueError, r"depth: expected \[1, 5, 7\]"),
            ({"depth": -torch.ones(1, 5, 7)}, ValueError, "depth: expected values finite and at least 0"),
            ({"depth": torch.full((1, 5, 7), math.inf)}, ValueError, "depth: expected values finite"),
            ({"beta": -0.1}, ValueError, "beta: expected values"),
            ({"beta": math.nan}, ValueError, "beta: expected values"),
            ({"beta": torch.rand(2)}, ValueError, r"beta: expected a number or shape \[\]"),
            ({"airlight": 1.1}, ValueError, r"airlight: expected values in \[0, 1\]"),
            ({"airlight": torch.rand(2)}, ValueError, r"airlight: expected a number, \[3\]"),
        ],
    )
    def test_refusals(self, change: dict[str, object], error: type[Exception], words: str) -> None:
        arguments = {"clear": torch.rand(3, 5, 7), "depth": torch.rand(1, 5, 7), "beta": 1.0, "airlight": 0.8}
        with pytest.raises(error, match=words):
            synthesise_haze(**(arguments | change))


class TestSample:
    def test_parameters_explain_the_haze(self) -> None:
        clear, depth = scene(4, dtype=torch.float32)
        hazy, parameters = sample_haze(clear, depth, generator=torch.Generator().manual_seed(1))
        assert (parameters.beta.shape, parameters.airlight.shape) == ((4,), (4, 3))
        assert torch.equal(hazy, synthesise_haze(clear, depth, *parameters))
        assert len(set(parameters.beta.tolist())) == 4
        assert torch.equal(parameters.airlight, parameters.airlight[:, :1].expand(4, 3))

    def test_one_image(self) -> None:
        _, parameters = sample_haze(*scene(), beta=(0.5, 0.5), airlight=(0.8, 0.8))
        assert parameters.beta.item() == 0.5
        assert parameters.airlight.tolist() == [0.8, 0.8, 0.8]

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_ranges_are_filled_evenly(self, per_channel: bool) -> None:
        clear, depth = torch.rand(2000, 3, 1, 1), torch.rand(2000, 1, 1, 1)
        generator = torch.Generator().manual_seed(0)
        _, drawn = sample_haze(
            clear, depth, beta=(0.2, 0.6), airlight=(0.5, 1), per_channel=per_channel, generator=generator
        )
        for values, low, high in ((drawn.beta, 0.2, 0.6), (drawn.airlight, 0.5, 1.0)):
            share = (values - low) / (high - low)
            assert 0 <= share.min() < 0.01
            assert 0.99 < share.max() <= 1
            assert share.mean() == pytest.approx(0.5, abs=0.03)
        assert torch.equal(drawn.airlight[:, 0], drawn.airlight[:, 1]) != per_channel

    def test_seed_decides(self) -> None:
        first, second, other = (
            sample_haze(*scene(2), generator=torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"beta": (1.0, 0.5)}, r"beta: expected a range with 0 ≤ low ≤ high, got \(1.0, 0.5\)"),
            ({"beta": (-0.1, 0.5)}, "beta: expected a range"),
            ({"beta": (0.5, math.inf)}, "beta: expected a range"),
            ({"airlight": (0.5, 1.5)}, "airlight: expected a range with 0 ≤ low ≤ high ≤ 1"),
        ],
    )
    def test_refusals(self, options: dict[str, tuple[float, float]], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            sample_haze(*scene(), **options)


class TestDepthFromDisparity:
    def test_ends_and_middle(self) -> None:
        depth = depth_from_disparity(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), near=2, far=6)
        assert depth.tolist() == pytest.approx([2, 6, 3], abs=1e-12)  # 1/3 lies in the middle of 1/2 and 1/6

    @pytest.mark.parametrize(("near", "far"), [(0, 1), (2, 1), (1, math.inf), (-1, 1)])
    def test_bad_span(self, near: float, far: float) -> None:
        with pytest.raises(ValueError, match="near and far"):
            depth_from_disparity(torch.rand(3), near=near, far=far)

    def test_bad_disparity(self) -> None:
        with pytest.raises(ValueError, match=r"disparity: expected values in \[0, 1\], got 0.0 to 5.0"):
            depth_from_disparity(torch.tensor([0.0, 5.0]))
