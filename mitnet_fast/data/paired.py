"""Hazy and clear images of a set on disk, with depth maps where there are any, as a dataset for training and testing.

Layout of an item: "hazy" and "clear" [3, H, W], "depth" [1, H, W] (disparity-like, in [0, 1], 1 nearest; only where
maps were asked for), "name" (the hazy file below the set's folder). Window and orientation are the same for all three
and depend on (seed, epoch, index) alone, so neither the number of workers nor their order changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .depth import DepthMap, find_depth, read_depth, read_depth_size
from .images import ImageError, read_pixels, to_float
from .layouts import DataError, Pair, Problem, examine, recognise, truth_margin
from .transforms import AUGMENTATIONS, Geometry, centre

SHOWN_PROBLEMS = 10


class PairedImages(Dataset[dict[str, torch.Tensor | str]]):
    """The pairs of a set, found, matched and measured when it is made, decoded when they are asked for.

    Args:
        root: the set's folder, in any layout of `mitnet_fast.data.layouts`.
        split: "train", "val", "test", or None for all; a set without splits is used whole.
        layout: name of the layout where several fit; None finds it out.
        patch: side of the square window taken from every image, pixels; None gives whole images.
        augment: "mitnet" or "dcmpnet", the window and orientation of that paper's training; None takes the window in
            the middle. Needs ``patch``.
        depth: folder of depth maps of the clear images, or None.
        seed: of the windows and orientations, ≥ 0.
        repeat: how often each pair comes in an epoch, each time with a window of its own.
        on_device: leave to the device what it does faster, with less to copy there: "hazy" and "clear" are the uint8
            samples of 8-bit files, for `to_float`, and windows are not turned, but come with "orientation" [3], for
            `turn`.

    Raises:
        ValueError: an argument outside what is allowed.
        DataError: no layout fits, a file is missing, doubled, unreadable or of the wrong size, or smaller than
            ``patch``. Nothing is left to be found during training but damage behind the headers.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str | None = None,
        *,
        layout: str | None = None,
        patch: int | None = None,
        augment: str | None = None,
        depth: str | PathLike[str] | None = None,
        seed: int = 0,
        repeat: int = 1,
        on_device: bool = False,
    ) -> None:
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(f"augment: expected one of {', '.join(AUGMENTATIONS)} or None, got {augment!r}")
        if augment is not None and patch is None:
            raise ValueError(f"patch: augment={augment!r} takes windows, give their side in pixels")
        if (patch is not None and patch < 1) or repeat < 1 or seed < 0:
            raise ValueError(f"expected patch ≥ 1, repeat ≥ 1, seed ≥ 0; got patch={patch}, {repeat=}, {seed=}")
        found = recognise(root, layout)
        part = found.split(split)
        sizes, problems = examine(found.root, part.pairs)
        problems = [problem for problem in part.problems if problem.fatal] + problems
        if patch is not None:
            problems += [
                Problem("smaller than the patch", f"{pair.hazy} is {width}×{height}, the patch {patch}×{patch}")
                for pair in part.pairs
                for width, height in [sizes.get(pair.hazy, (patch, patch))]
                if min(width, height) < patch
            ]
        self.root = found.root
        self.layout = found.layout.name
        self.split = part.name  # "all" for a set without splits
        self.pairs: Sequence[Pair] = tuple(part.pairs)
        self._depth = None if depth is None else self._depth_maps(Path(depth), sizes, problems)
        _raise_for(found.root, self.pairs, part.name, problems)
        self.patch = patch
        self.augment = augment
        self.seed = seed
        self.repeat = repeat
        self.on_device = on_device
        # Shared with the workers, so that those that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the windows and orientations of an epoch; call it before iterating.

        Args:
            epoch: ≥ 0.

        Raises:
            ValueError: it is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch whose windows and orientations are drawn."""
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.pairs) * self.repeat

    def name(self, index: int) -> str:
        """The hazy file of an item, below the set's folder."""
        return self._pair(index).hazy

    def geometry(self, index: int, height: int, width: int) -> Geometry | None:
        """Window and orientation of an item in the current epoch, or None for whole images."""
        if self.patch is None:
            return None
        if self.augment is None:
            return centre(height, width, self.patch)
        generator = np.random.default_rng([self.seed, self.epoch, index])
        return AUGMENTATIONS[self.augment](generator, height, width, self.patch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        pair = self._pair(index)
        hazy, clear = self._decode(pair.hazy), self._decode(pair.clear)
        height, width = hazy.shape[-2:]
        margin = truth_margin(pair, (width, height), (clear.shape[-1], clear.shape[-2]))
        images = {"hazy": hazy, "clear": _cut(clear, margin)}
        if self._depth is not None:
            images["depth"] = _cut(read_depth(self._depth[index % len(self.pairs)]), margin)
        geometry = self.geometry(index, height, width)
        if self.on_device:
            if geometry is not None:
                images = {key: geometry.window(image) for key, image in images.items()}
                images["orientation"] = torch.tensor(geometry.orientation)
            return {**{key: image.contiguous() for key, image in images.items()}, "name": pair.hazy}
        if geometry is not None:
            images = {key: geometry.apply(image) for key, image in images.items()}
        scaled = {
            key: to_float(image) if image.dtype == torch.uint8 else image.contiguous() for key, image in images.items()
        }
        return {**scaled, "name": pair.hazy}

    def _decode(self, path: str) -> torch.Tensor:
        samples = torch.from_numpy(read_pixels(self.root / path).rgb).permute(2, 0, 1)
        return samples if samples.dtype == torch.uint8 else to_float(samples)

    def _pair(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return self.pairs[index % len(self.pairs)]

    def _depth_maps(self, folder: Path, sizes: dict[str, tuple[int, int]], problems: list[Problem]) -> list[DepthMap]:
        if not folder.is_dir():
            raise DataError(f"depth: no folder {folder}; `mitnet-fast data depth` computes the maps")
        maps: dict[str, DepthMap] = {}
        for clear in dict.fromkeys(pair.clear for pair in self.pairs):
            try:
                found = find_depth(folder, clear)
                if found is None:
                    problems.append(Problem("without depth", f"{clear}: no map of that name in {folder}"))
                    continue
                size = read_depth_size(found.path)
            except ImageError as error:
                problems.append(Problem("unreadable", str(error)))
                continue
            maps[clear] = found
            if clear in sizes and size != sizes[clear]:
                measured = [f"{width}×{height}" for width, height in (size, sizes[clear])]
                problems.append(Problem("sizes differ", f"{found.path} is {measured[0]}, {clear} is {measured[1]}"))
        return [maps[pair.clear] for pair in self.pairs if pair.clear in maps]


def _cut(image: torch.Tensor, margin: int) -> torch.Tensor:
    return image[..., margin:-margin, margin:-margin] if margin else image


def _raise_for(root: Path, pairs: Sequence[Pair], split: str, problems: list[Problem]) -> None:
    if problems:
        lines = [f"{problem.kind}: {problem.message}" for problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
        raise DataError("\n  ".join([f"{root}: {len(problems)} problems", *lines]))
    if not pairs:
        raise DataError(f"{root}: no pairs in split {split!r}")
