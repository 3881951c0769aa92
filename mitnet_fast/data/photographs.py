"""Real photographs with depth, offline: those in scikit-image's wheel, read at run time and never copied or downloaded.

One of them, the Middlebury 2014 motorcycle, has measured depth. Its disparity d (pixels of the left image) becomes the
distance Z = f·B / (d + d₀), with f = 994.978 pixels, the baseline B = 0.193001 m and the principal points' offset
d₀ = 31.086 pixels. The others have no depth; they get a planar ramp over the same distances, far at the top, and say so
in `depth_kind`.

Layout: images [3, H, W] in [0, 1], depth [1, H, W] in metres, float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from .haze import Range, sample_haze
from .images import read_image
from .transforms import draw_mitnet

FOCAL_LENGTH = 994.978  # pixels
BASELINE = 0.193001  # metres
DISPARITY_OFFSET = 31.086  # pixels, between the principal points of the two views

MEASURED = "measured"
PLANAR_RAMP = "planar ramp"


@dataclass(frozen=True)
class Source:
    """A photograph's file in scikit-image's wheel, and whose it is."""

    file: str
    credit: str


SOURCES = {
    "motorcycle": Source("motorcycle_left.png", "Middlebury 2014 stereo benchmark, Scharstein et al."),
    "astronaut": Source("astronaut.png", "NASA, public domain"),
    "coffee": Source("coffee.png", "Rachel Michetti, CC0"),
    "chelsea": Source("chelsea.png", "Stefan van der Walt, CC0"),
    "rocket": Source("rocket.jpg", "SpaceX, public domain"),
    "hubble": Source("hubble_deep_field.jpg", "NASA, public domain"),
    "retina": Source("retina.jpg", "Häggström 2014, CC0"),
    "camera": Source("camera.png", "Lav Varshney, CC0"),
    "brick": Source("brick.png", "CC0 Textures, CC0"),
    "grass": Source("grass.png", "linolafett, CC0"),
}
NAMES = tuple(SOURCES)


@dataclass(frozen=True)
class Photograph:
    """A haze-free photograph with the distance of every pixel.

    Args:
        name: one of `NAMES`.
        rgb: float32 [3, H, W] in [0, 1].
        depth: float32 [1, H, W], metres, positive.
        depth_kind: "measured" or "planar ramp".
        credit: who made it, and its licence.
    """

    name: str
    rgb: torch.Tensor
    depth: torch.Tensor
    depth_kind: str
    credit: str


def distance_from_disparity(disparity: np.ndarray) -> np.ndarray:
    """The motorcycle's distance Z = f·B / (d + d₀) in metres; pixels without disparity (not finite) come out as NaN.

    Source: calibration of the Middlebury 2014 scene "Motorcycle" at a quarter of its size.
    """
    known = np.isfinite(disparity)
    return np.where(known, FOCAL_LENGTH * BASELINE / (np.where(known, disparity, 0) + DISPARITY_OFFSET), np.nan)


def fill_from_background(depth: np.ndarray) -> np.ndarray:
    """Fill the holes of a stereo depth map along its rows with the farther of the two nearest known values.

    A hole is mostly a place that only one of the two cameras sees, behind the edge of something near: it belongs to
    the background. Where a row has known values on one side only, that one is taken; a row without any takes the
    nearest row that has some.

    Args:
        depth: [H, W], any unit that grows with distance, NaN at the holes.

    Returns:
        [H, W], the same type, without NaN; known values are unchanged.

    Raises:
        ValueError: `depth` is not two-dimensional, or has no known value at all.
    """
    if depth.ndim != 2:
        raise ValueError(f"depth must be [H, W], got shape {list(depth.shape)}")
    known = ~np.isnan(depth)
    if not known.any():
        raise ValueError("depth has no known value to fill its holes from")
    height, width = depth.shape
    columns = np.broadcast_to(np.arange(width), depth.shape)
    # Index of the nearest known pixel at or before, and at or after, each pixel; -1 and `width` where there is none.
    before = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, columns, width)[:, ::-1], axis=1)[:, ::-1]
    left = np.where(before >= 0, np.take_along_axis(depth, before.clip(min=0), axis=1), -np.inf)
    right = np.where(after < width, np.take_along_axis(depth, after.clip(max=width - 1), axis=1), -np.inf)
    filled = np.maximum(left, right).astype(depth.dtype)
    rows = np.flatnonzero(known.any(axis=1))
    nearest = rows[np.abs(np.arange(height)[:, None] - rows[None]).argmin(axis=1)]
    return filled[nearest]


def planar_ramp(height: int, width: int, *, near: float = 2.0, far: float = 5.0) -> torch.Tensor:
    """A plane that recedes from the bottom row (`near`) to the top row (`far`): [1, height, width], metres.

    The default span is that of the motorcycle's measured depth (2.1 m to 5.0 m), so one range of scattering
    coefficients fits both.

    Args:
        height: pixels.
        width: pixels.
        near: depth of the bottom row, metres, above 0.
        far: depth of the top row, metres, at least ``near``.

    Raises:
        ValueError: depths that are none.
    """
    if not 0 < near <= far:
        raise ValueError(f"need 0 < near ≤ far, got near={near}, far={far}")
    return torch.linspace(far, near, height).view(1, height, 1).expand(1, height, width).contiguous()


def nearness(depth: torch.Tensor) -> torch.Tensor:
    """Distances as the disparity-like map that depth networks predict: 1/Z scaled to [0, 1], 1 nearest.

    Args:
        depth: [1, H, W], metres, positive.

    Returns:
        [1, H, W] in [0, 1]; zeros where all distances are equal.
    """
    inverse = depth.reciprocal()
    low, high = inverse.min(), inverse.max()
    return (inverse - low) / (high - low) if high > low else torch.zeros_like(depth)


def photograph(name: str, *, max_side: int | None = None) -> Photograph:
    """One of scikit-image's bundled photographs, with its depth.

    Args:
        name: one of `NAMES`.
        max_side: shrink it so that its longer side has at most this many pixels; None keeps its size.

    Raises:
        ValueError: unknown name, or `max_side` below 1.
        FileNotFoundError: the installed scikit-image lacks the file.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown photograph {name!r}; there are {', '.join(NAMES)}")
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    source = SOURCES[name]
    with resources.as_file(_bundled(source.file)) as path:
        rgb = read_image(path).rgb
    if name == "motorcycle":
        with resources.as_file(_bundled("motorcycle_disp.npz")) as path, np.load(path) as archive:
            metres = fill_from_background(distance_from_disparity(archive["arr_0"]))
        depth, kind = torch.from_numpy(metres.astype(np.float32))[None], MEASURED
    else:
        depth, kind = planar_ramp(*rgb.shape[-2:]), PLANAR_RAMP
    longer = max(rgb.shape[-2:])
    if max_side is not None and longer > max_side:
        size = tuple(max(1, round(side * max_side / longer)) for side in rgb.shape[-2:])
        rgb, depth = _resized(rgb, size), _resized(depth, size)
    return Photograph(name, rgb, depth, kind, source.credit)


def photographs(names: Iterable[str] = NAMES, *, max_side: int | None = None) -> list[Photograph]:
    """Several of them, as `photograph` gives each."""
    return [photograph(name, max_side=max_side) for name in names]


class HazyPhotographs(Dataset):
    """Photographs seen through haze, each time from another place and through other haze: a training set.

    Item i shows photograph i mod n. The window is a square whose side is a random share of the photograph's shorter
    side, shrunk (or enlarged) to the patch, flipped and transposed at random. Its haze is that of the scattering model
    at the photograph's own distances, I = J·t + A·(1 − t), t = exp(−β·Z), with β and a grey A uniform in their ranges.
    A handful of photographs is no sample of the world's colours; so that a network does not learn theirs, colours may
    be drawn nearer to or farther from grey, and channels exchanged. All of it depends on (seed, epoch, index) alone.

    Items hold "hazy" and "clear" [3, patch, patch], "depth" [1, patch, patch] (`nearness` of the whole photograph) and
    "name".

    Args:
        photographs: what to look at.
        patch: side of the items, pixels.
        views: items per photograph and epoch.
        share: least and greatest side of the window, as a share of the photograph's shorter side; logarithmically
            uniform between them.
        beta: range of the scattering coefficient, 1/m.
        airlight: range of the haze's brightness, in [0, 1].
        saturation: range of the factor on the distance of the colours from grey; what leaves [0, 1] is clipped.
        exchanged: share of the items whose colour channels are put in random order.
        seed: at least 0.

    Raises:
        ValueError: no photograph, or a number outside what is allowed.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        *,
        patch: int,
        views: int = 1,
        share: Range = (0.3, 1.0),
        beta: Range = (0.2, 0.5),
        airlight: Range = (0.7, 1.0),
        saturation: Range = (1.0, 1.0),
        exchanged: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not photographs:
            raise ValueError("photographs: expected at least one")
        if patch < 1 or views < 1 or seed < 0:
            raise ValueError(f"expected patch ≥ 1, views ≥ 1 and seed ≥ 0, got {patch=}, {views=}, {seed=}")
        if not 0 < share[0] <= share[1] <= 1:
            raise ValueError(f"share: expected a range within (0, 1], got {share}")
        if not 0 <= saturation[0] <= saturation[1] < math.inf:
            raise ValueError(f"saturation: expected a range with 0 ≤ low ≤ high, got {saturation}")
        if not 0 <= exchanged <= 1:
            raise ValueError(f"exchanged: expected a share in [0, 1], got {exchanged}")
        self.photographs = tuple(photographs)
        self.patch = patch
        self.views = views
        self.share = share
        self.beta = beta
        self.airlight = airlight
        self.saturation = saturation
        self.exchanged = exchanged
        self.seed = seed
        self._nearness = [nearness(photo.depth) for photo in photographs]
        # Shared with the workers, so that those that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the windows and the haze of an epoch; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.photographs) * self.views

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        generator = np.random.default_rng([self.seed, int(self._epoch), index])
        chosen = index % len(self.photographs)
        photo = self.photographs[chosen]
        height, width = photo.rgb.shape[-2:]
        share = np.exp(generator.uniform(*np.log(self.share)))
        geometry = draw_mitnet(generator, height, width, max(1, round(share * min(height, width))))
        clear, depth, near = (
            _resized(geometry.apply(image), (self.patch, self.patch))
            for image in (photo.rgb, photo.depth, self._nearness[chosen])
        )
        noise = torch.Generator().manual_seed(int(generator.integers(2**63)))
        clear = self._recoloured(clear, generator)
        hazy, _ = sample_haze(clear, depth, beta=self.beta, airlight=self.airlight, generator=noise)
        return {"hazy": hazy, "clear": clear, "depth": near, "name": photo.name}

    def _recoloured(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        factor, order = generator.uniform(*self.saturation), generator.permutation(3)
        image = torch.lerp(image.mean(0, keepdim=True), image, factor).clamp(0, 1)
        return image[torch.from_numpy(order)] if generator.random() < self.exchanged else image


def _resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[C, H, W] at another size; each value is an average of the original's, none leaves their range."""
    resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return torch.minimum(torch.maximum(resized, image.amin()), image.amax())


def _bundled(file: str) -> Path:
    path = resources.files("skimage.data") / file
    if not path.is_file():
        raise FileNotFoundError(f"the installed scikit-image has no {file}; its wheel from PyPI (0.25 or later) has it")
    return path
