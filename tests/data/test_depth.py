"""Depth maps on disk: values, direction, holes, cards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mitnet_fast.data.depth import DepthMap, find_depth, read_depth, read_depth_size, write_card, write_depth
from mitnet_fast.data.images import ImageError

VALUES = np.array([[10, 20, 40], [80, 160, 110]])
SCALED = (VALUES - 10) / 150


def store(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


class TestRead:
    @pytest.mark.parametrize(
        ("name", "dtype"), [("a.png", "uint8"), ("a.png", "uint16"), ("a.npy", "float32"), ("a.npy", "uint8")]
    )
    def test_disparity(self, tmp_path: Path, name: str, dtype: str) -> None:
        path = store(tmp_path / name, VALUES.astype(dtype))
        depth = read_depth(DepthMap(str(path), "disparity"))
        assert (depth.dtype, depth.shape) == (torch.float32, (1, 2, 3))
        assert depth[0].numpy() == pytest.approx(SCALED, abs=1e-7)
        assert read_depth_size(path) == (3, 2)

    @pytest.mark.parametrize("name", ["a.png", "a.npy"])
    def test_distances_become_disparity(self, tmp_path: Path, name: str) -> None:
        path = store(tmp_path / name, VALUES.astype("uint16"))
        expected = (1 / VALUES - 1 / 160) / (1 / 10 - 1 / 160)
        depth = read_depth(DepthMap(str(path), "depth"))[0].numpy()
        assert depth == pytest.approx(expected, abs=1e-7)
        assert (depth[0, 0], depth[1, 1]) == (1, 0)  # nearest and farthest

    def test_holes_take_the_nearest_distance_and_the_sky_is_far(self, tmp_path: Path) -> None:
        path = store(tmp_path / "a.npy", np.array([[2.0, np.nan, 0.0, 4.0, np.inf]]))
        depth = read_depth(DepthMap(str(path), "depth"))
        assert depth[0, 0].tolist() == [1, 1, 0.5, 0.5, 0]

    def test_level_map(self, tmp_path: Path) -> None:
        path = store(tmp_path / "a.npy", np.full((2, 2), 3.0))
        assert read_depth(DepthMap(str(path), "disparity")).tolist() == [[[0, 0], [0, 0]]]

    @pytest.mark.parametrize(
        ("values", "kind", "words"),
        [
            (np.array([[1.0, np.nan]]), "disparity", "1 disparities are not finite"),
            (np.zeros((2, 2)), "depth", "no distance is positive"),
            (np.zeros((2, 2, 3)), "depth", r"expected an array \[H, W\] of real numbers"),
            (np.zeros((0, 2)), "depth", "expected an array"),
            (np.array([["a"]]), "depth", "expected an array"),
            (np.array([[{}]]), "depth", "not an array that can be read"),
        ],
    )
    def test_refused_arrays(self, tmp_path: Path, values: np.ndarray, kind: str, words: str) -> None:
        path = store(tmp_path / "a.npy", values)
        with pytest.raises(ImageError, match=words):
            read_depth(DepthMap(str(path), kind))

    @pytest.mark.parametrize("read", [read_depth_size, lambda path: read_depth(DepthMap(str(path), "depth"))])
    def test_refused_files(self, tmp_path: Path, read: object) -> None:
        with pytest.raises(ImageError, match="expected a grey depth map of 8 or 16 bits, got RGB"):
            read(store(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8)))
        (tmp_path / "b.npy").write_bytes(b"no array")
        with pytest.raises(ImageError, match=r"b\.npy: not an array"):
            read(tmp_path / "b.npy")


class TestWrite:
    def test_round_trip(self, tmp_path: Path) -> None:
        values = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0)) * 7 - 3
        write_depth(tmp_path / "a.png", values)
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == "I;16"
        expected = (values - values.min()) / (values.max() - values.min())
        restored = read_depth(DepthMap(str(tmp_path / "a.png"), "disparity"))
        assert (restored - expected).abs().max() < 0.51 / 65535
        assert (restored.min(), restored.max()) == (0, 1)

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("a.jpg", torch.rand(1, 2, 2), "path: expected a .png file"),
            ("a.png", torch.rand(3, 2, 2), "disparity: expected"),
            ("a.png", torch.full((2, 2), torch.nan), "disparity: expected finite"),
        ],
    )
    def test_refusals(self, tmp_path: Path, name: str, value: torch.Tensor, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            write_depth(tmp_path / name, value)
        assert list(tmp_path.iterdir()) == []


class TestFind:
    @pytest.mark.parametrize("place", ["train/GT/1.5.png", "train/1.5.npy", "1.5.png"])
    def test_places(self, tmp_path: Path, place: str) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        store(path, VALUES.astype("uint8"))
        assert find_depth(tmp_path, "train/GT/1.5.jpg") == DepthMap(str(path), "disparity")
        assert find_depth(tmp_path, "train/GT/1.jpg") is None

    def test_cards(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            store(tmp_path / name, VALUES.astype("uint8"))
        write_card(tmp_path, "depth", teacher="a stereo camera")
        (tmp_path / "b.json").write_text('{"kind": "disparity"}')
        assert json.loads((tmp_path / "card.json").read_text()) == {"kind": "depth", "teacher": "a stereo camera"}
        assert find_depth(tmp_path, "a.png").kind == "depth"
        assert find_depth(tmp_path, "b.png").kind == "disparity"

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "metres"}', '{"kind": null}'])
    def test_bad_card(self, tmp_path: Path, content: str) -> None:
        store(tmp_path / "a.png", VALUES.astype("uint8"))
        (tmp_path / "card.json").write_text(content)
        with pytest.raises(ImageError, match=r"card\.json: .*disparity.*depth"):
            find_depth(tmp_path, "a.png")

    def test_unknown_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="kind: expected one of disparity, depth, got 'metres'"):
            write_card(tmp_path, "metres")
