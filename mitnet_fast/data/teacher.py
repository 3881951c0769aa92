"""Depth maps of a data set's clear images by a pretrained network, computed once and kept on disk.

The maps lie as `find_depth` looks for them: that of ``train/GT/1.png`` is ``train/GT/1.png`` below the output folder,
a 16-bit grey PNG of the image's size. They are disparity-like whatever the teacher gives, near is large:

    m = disparity, or 1 / Z of distances Z;    stored (m − min m) / (max m − min m), each map by itself

Every folder of maps holds ``card.json`` with the teacher, which way its values run, the scaling and the versions. Which
way they run is measured before the first map is written: on the motorcycle that comes with scikit-image, whose depth is
known, the ranks of the teacher's values and of the true nearness must agree.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from .. import __version__
from .depth import CARD, KINDS, read_depth_size, write_card, write_depth
from .images import ImageError, read_image
from .layouts import DataError, recognise
from .photographs import nearness, photograph

DEFAULT_TEACHER = "depth-anything/Depth-Anything-V2-Small-hf"
SCALING = "(m − min m) / (max m − min m), each map by itself, 16 bits"
PICTURE = "motorcycle"
AGREEMENT = 0.5  # least rank correlation with the true nearness; teachers reach 0.8 and more, noise about 0
DEPTH_FOLDER = "depth"


class Teacher(Protocol):
    """A network that estimates depth.

    Attributes:
        name: of the network, for the card.
        versions: of what computes it, by package.
    """

    name: str
    versions: dict[str, str]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Values [h, w] of any size for an image [3, H, W] in [0, 1]: disparities or distances, any scale."""
        ...


@dataclass(frozen=True)
class DepthFailure:
    """A clear image without a map, and why."""

    clear: str
    error: str


@dataclass(frozen=True)
class DepthSummary:
    """What `estimate_depth` did; `rich.print` shows it.

    Args:
        folder: where the maps are: what ``data.depth`` takes.
        teacher: name of the network.
        kind: which way its values run, "disparity" or "depth".
        agreement: rank correlation of its map with the true nearness of the test picture, in [0, 1].
        written: number of maps computed now.
        kept: number of maps that were there.
        failures: images without a map.
    """

    folder: Path
    teacher: str
    kind: str
    agreement: float
    written: int
    kept: int
    failures: tuple[DepthFailure, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs = {"disparity": "near is large", "depth": "far is large, turned round"}[self.kind]
        yield Text(
            f"{self.folder}: {self.written} depth maps written, {self.kept} kept\n"
            f"{self.teacher}: {self.kind} ({runs}), rank correlation with measured nearness {self.agreement:.2f}"
        )
        for failure in self.failures:
            yield Text(f"failed: {failure.clear}: {failure.error}", "red")


def estimate_depth(
    root: str | PathLike[str],
    teacher: Teacher,
    *,
    output: str | PathLike[str] | None = None,
    layout: str | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DepthSummary:
    """Compute the depth maps of all clear images of a set that have none yet; what fails does not stop the others.

    Started again after an interrupt it goes on with the images that are left: a map is there whole or not at all.

    Args:
        root: the set's folder, in any layout of `mitnet_fast.data.layouts`.
        teacher: estimates depth, such as `load_teacher` gives.
        output: folder of the maps; None: ``depth`` within the set's.
        layout: name of the layout where several fit; None finds it out.
        kind: which way the teacher's values run, "disparity" or "depth"; None takes what the test picture shows.
        overwrite: compute maps anew that are there.
        progress: called with the number of images done and of all.

    Returns:
        What was computed, what was there, and what failed with its reason.

    Raises:
        ValueError: unknown ``kind`` or ``layout``, a teacher whose values run the other way on the test picture or
            have nothing to do with its depth, or maps of another teacher in the folder.
        DataError: no layout fits, or the set has no pair.
        OSError: the folder cannot be written.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)} or None, got {kind!r}")
    found = recognise(root, layout)
    clear = list(dict.fromkeys(pair.clear for pair in found.split(None).pairs))
    if not clear:
        raise DataError(f"{found.root}: no pairs")
    folder = found.root / DEPTH_FOLDER if output is None else Path(output)
    kind, agreement = find_direction(teacher, kind)
    card = {"teacher": teacher.name, "teacher_kind": kind, "scaling": SCALING}
    details = {
        "direction": {"picture": PICTURE, "rank_correlation": round(agreement, 4)},
        "versions": {"mitnet-fast": __version__, "torch": torch.__version__, **teacher.versions},
    }
    places = {path: folder / PurePosixPath(path).with_suffix(".png") for path in clear}
    shared = Counter(places.values())
    if twice := [path for path, place in places.items() if shared[place] > 1]:
        raise DataError(f"{found.root}: {' and '.join(twice[:2])} would share one depth map; rename one")
    _prepare(places.values(), card, details, overwrite)
    written, kept, failures = 0, 0, []
    for done, (path, place) in enumerate(places.items(), 1):
        try:
            image = read_image(found.root / path).rgb
            if place.is_file() and read_depth_size(place) == (image.shape[2], image.shape[1]):
                kept += 1
            else:
                write_depth(place, _disparity(teacher, image, kind))
                written += 1
        except ImageError as error:
            failures.append(DepthFailure(path, str(error)))
        if progress:
            progress(done, len(places))
    return DepthSummary(folder, teacher.name, kind, agreement, written, kept, tuple(failures))


def find_direction(teacher: Teacher, kind: str | None = None) -> tuple[str, float]:
    """Which way a teacher's values run, by a picture whose depth is known.

    Args:
        teacher: estimates depth.
        kind: "disparity" or "depth" where it is known; None decides by the picture.

    Returns:
        "disparity" (near is large) or "depth", and the rank correlation (Spearman's) of the map, turned to near is
        large, with the true nearness.

    Raises:
        ValueError: the values have nothing to do with depth, or run the other way than ``kind`` says.
    """
    photo = photograph(PICTURE)
    values = _values(teacher, photo.rgb)
    correlation = _rank_correlation(_resized(values, photo.depth.shape[-2:]), nearness(photo.depth)[0])
    shown = "disparity" if correlation > 0 else "depth"
    told = (
        f"{teacher.name}: on scikit-image's {PICTURE} the rank correlation with the true nearness is {correlation:.2f}"
    )
    if not abs(correlation) >= AGREEMENT:
        raise ValueError(f"{told}, at least {AGREEMENT} (or at most −{AGREEMENT}) is expected of a depth teacher")
    if kind is not None and kind != shown:
        raise ValueError(f"kind: {told}: its values are {shown!r}, not {kind!r}")
    return shown, abs(correlation)


def load_teacher(name: str = DEFAULT_TEACHER, device: str | torch.device = "cpu") -> Teacher:
    """A pretrained depth network by the transformers library, which fetches it once.

    Args:
        name: of a depth estimation model on the Hugging Face hub, or a folder that holds one.
        device: where it runs.

    Raises:
        RuntimeError: transformers is not installed.
        OSError, ValueError: no such model, or none that estimates depth; the hub cannot be reached.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    except ImportError as error:
        raise RuntimeError(
            "depth teachers need the transformers library: pip install 'mitnet-fast[depth]', or pip install "
            f"transformers ({error})"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForDepthEstimation.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"teacher: {name} is no folder with a depth network, and the Hugging Face hub does not give one of that "
            f"name: {' '.join(str(error).split())}"
        ) from error
    return _TransformersTeacher(name, processor, model.to(device).eval())


class _TransformersTeacher:
    """A depth estimation model of transformers with its own preprocessing."""

    def __init__(self, name: str, processor: object, model: torch.nn.Module) -> None:
        self.name = name
        self.versions = {"transformers": importlib.metadata.version("transformers")}
        self._processor = processor
        self._model = model

    @torch.inference_mode()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        samples = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        inputs = self._processor(images=samples, return_tensors="pt").to(self._model.device)
        return self._model(**inputs).predicted_depth[0].float().cpu()


def _values(teacher: Teacher, image: torch.Tensor) -> torch.Tensor:
    """The teacher's map [h, w] in float64, finite."""
    values = teacher(image).detach().to("cpu", torch.float64)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"teacher: expected a map [h, w] of {teacher.name}, got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ImageError(f"{teacher.name} gives {int((~torch.isfinite(values)).sum())} values that are not finite")
    return values


def _disparity(teacher: Teacher, image: torch.Tensor, kind: str) -> torch.Tensor:
    """The teacher's map of an image [3, H, W] as [H, W], near is large."""
    values = _values(teacher, image)
    if kind == "depth":
        if not (values > 0).all():
            raise ImageError(f"{teacher.name} gives {int((values <= 0).sum())} distances that are not positive")
        values = values.reciprocal()
    return _resized(values, image.shape[-2:])


def _resized(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    from scipy.stats import rankdata  # comes with scikit-image

    ranks = [rankdata(values[::4, ::4].numpy().ravel()) for values in (first, second)]
    if any(rank.min() == rank.max() for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _prepare(places: Iterable[Path], card: dict[str, str], details: dict[str, object], overwrite: bool) -> None:
    """Make the folders of the maps, each with its card, and refuse to mix maps of two teachers.

    Maps to overwrite are removed at once, so that an interrupt leaves none of them under the new card.
    """
    folders = defaultdict(list)
    for place in places:
        folders[place.parent].append(place)
    for folder in [] if overwrite else folders:
        _check_card(folder, card)
    for folder, maps in folders.items():
        if overwrite:
            for place in maps:
                place.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite or not (folder / CARD).is_file():
            write_card(folder, "disparity", **card, **details)


def _check_card(folder: Path, card: dict[str, str]) -> None:
    path = folder / CARD
    if not path.is_file():
        if folder.is_dir() and any(folder.glob("*.png")):
            raise ValueError(f"output: {folder} holds images without a {CARD}; name another folder, or overwrite them")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    other = {name: found.get(name) if isinstance(found, dict) else None for name in card}
    if other != card:
        raise ValueError(
            f"output: the maps in {folder} are of {other}, these would be of {card}; overwrite them, or name another "
            "folder"
        )
