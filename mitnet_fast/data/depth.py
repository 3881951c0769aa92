"""Depth maps on disk: 8- or 16-bit grey PNG or .npy, with a JSON card that says which way they run.

The networks are trained with disparity-like maps: near is large, and every map is scaled by itself to [0, 1],
(m − min m) / (max m − min m). A card with ``"kind": "depth"`` marks distances Z, whose map is m = 1/Z; with
``"kind": "disparity"``, or without a card, the map is taken as it is. Reading one for the other inverts the fog.

Layout: stored [H, W]; read float32 [1, H, W].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .files import atomic_write
from .images import ImageError, open_image

KINDS = ("disparity", "depth")
SUFFIXES = (".png", ".npy")
CARD = "card.json"


@dataclass(frozen=True, slots=True)
class DepthMap:
    """A depth map's file and which way its values run, "disparity" (near is large) or "depth" (distances)."""

    path: str
    kind: str


def find_depth(folder: str | PathLike[str], clear: str) -> DepthMap | None:
    """The depth map of a clear image, or None where there is none.

    The map of ``train/GT/1.png`` is ``train/GT/1``, ``train/1`` or ``1`` below ``folder``, with .png or .npy. Its kind
    is that of the card ``1.json`` or ``card.json`` beside it.

    Args:
        folder: where the maps are.
        clear: path of the clear image below its data set's folder.

    Raises:
        ImageError: the card is not one.
    """
    folder, relative = Path(folder), Path(clear).with_suffix("")
    for below in (relative, relative.parent.parent / relative.name, Path(relative.name)):
        place = folder / below
        for suffix in SUFFIXES:
            path = place.with_name(place.name + suffix)
            if path.is_file():
                return DepthMap(str(path), _kind_of(path))
    return None


def read_depth_size(path: str | PathLike[str]) -> tuple[int, int]:
    """Width and height of a depth map, from its header alone.

    Raises:
        ImageError: not a map of one channel.
    """
    if Path(path).suffix.lower() == ".npy":
        height, width = _array(path).shape
        return width, height
    with open_image(path) as image:
        _check_grey(path, image)
        return image.size


def read_depth(depth_map: DepthMap) -> torch.Tensor:
    """A depth map as the networks are trained with it.

    Args:
        depth_map: the file and its kind. Of distances, those that are not positive (or no number) are places without
            a measurement and take the value of the nearest place that has one; infinity is the sky, farthest.

    Returns:
        float32 [1, H, W] in [0, 1], 1 nearest; zeros where the whole map is level.

    Raises:
        ImageError: not a map of one channel, a disparity that is not finite, or no distance at all.
    """
    path = depth_map.path
    if Path(path).suffix.lower() == ".npy":
        values = np.asarray(_array(path), dtype=np.float64)
    else:
        with open_image(path) as image:
            _check_grey(path, image)
            values = np.asarray(image, dtype=np.float64)
    if depth_map.kind == "depth":
        known = values > 0
        if not known.any():
            raise ImageError(f"{path}: no distance is positive")
        values = 1 / _filled(values, known)
    elif not np.isfinite(values).all():
        raise ImageError(f"{path}: {int((~np.isfinite(values)).sum())} disparities are not finite")
    return torch.from_numpy(_unit_range(values).astype(np.float32))[None]


def write_depth(path: str | PathLike[str], disparity: torch.Tensor) -> None:
    """Write a disparity-like map, scaled to its full range, as a 16-bit grey PNG; whole or not at all.

    Args:
        path: the .png file; its folder must exist.
        disparity: [1, H, W] or [H, W], finite, near is large, any scale.

    Raises:
        ValueError: wrong shape, or values that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a .png file, got {path}")
    values = disparity.detach().to("cpu", torch.float64).numpy()
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"disparity: expected finite values [1, H, W] or [H, W], got shape {list(disparity.shape)}")
    samples = np.rint(_unit_range(values) * 65535).astype(np.uint16)
    with atomic_write(path) as stream:
        Image.fromarray(samples).save(stream, "PNG")


def write_card(folder: str | PathLike[str], kind: str, **details: object) -> None:
    """Record which way a folder's maps run, and what made them, in ``card.json``.

    Args:
        folder: where the maps are.
        kind: "disparity" or "depth".
        details: whatever JSON holds: the teacher's name, versions.

    Raises:
        ValueError: unknown ``kind``.
        OSError: the folder is missing or cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    with atomic_write(Path(folder) / CARD) as stream:
        stream.write(json.dumps({"kind": kind, **details}, indent=2).encode())


def _kind_of(path: Path) -> str:
    for card in (path.with_suffix(".json"), path.with_name(CARD)):
        if card.is_file():
            try:
                kind = json.loads(card.read_text(encoding="utf-8"))["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise ImageError(f'{card}: expected JSON with "kind", "disparity" or "depth"') from error
            if kind not in KINDS:
                raise ImageError(f'{card}: "kind" must be "disparity" or "depth", got {kind!r}')
            return kind
    return "disparity"


def _array(path: str | PathLike[str]) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: not an array that can be read: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.size == 0 or values.dtype.kind not in "uif":
        raise ImageError(f"{path}: expected an array [H, W] of real numbers")
    return values


def _check_grey(path: str | PathLike[str], image: Image.Image) -> None:
    if image.mode != "L" and not image.mode.startswith("I"):
        raise ImageError(f"{path}: expected a grey depth map of 8 or 16 bits, got {image.mode}")


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if known.all():
        return values
    from scipy.ndimage import distance_transform_edt  # comes with scikit-image

    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[tuple(nearest)]


def _unit_range(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
