"""Crops, flips and rotations as the two papers' training draws them, as one geometry for all images of a pair.

Layout: tensors [..., H, W]. A geometry is a window (top, left, size), then flips, then a transposition, then
quarter turns. Windows lie anywhere between the borders:

- ``mitnet``: uniform on both axes; flips of either axis and a transposition, each with probability ½.
- ``dcmpnet``: on each axis, with probability 0.1 · patch / side at one of the two borders (either one with ½), else
  uniform, because uniform windows hardly ever show what is at the borders; a horizontal flip with probability ½ and
  0 to 3 quarter turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

BORDER_WEIGHT = 0.1


@dataclass(frozen=True)
class Geometry:
    """A square window of an image and how it is turned; the same for hazy image, clear image and depth.

    Args:
        top: first row of the window, pixels.
        left: first column of the window, pixels.
        size: rows and columns of the window, pixels.
        flip_horizontal: mirror left and right.
        flip_vertical: mirror top and bottom.
        transpose: exchange rows and columns.
        quarter_turns: counter-clockwise rotations by 90°, 0 to 3.
    """

    top: int
    left: int
    size: int
    flip_horizontal: bool = False
    flip_vertical: bool = False
    transpose: bool = False
    quarter_turns: int = 0

    def window(self, image: torch.Tensor) -> torch.Tensor:
        """The window of ``image`` [..., H, W], not turned: a view [..., size, size]."""
        return image[..., self.top : self.top + self.size, self.left : self.left + self.size]

    @property
    def orientation(self) -> tuple[bool, bool, bool]:
        """The same turn as a horizontal flip, a vertical flip and a transposition, in this order, for :func:`turn`."""
        horizontal, vertical, transpose = self.flip_horizontal, self.flip_vertical, self.transpose
        for _ in range(self.quarter_turns):  # a quarter turn is a horizontal flip, then a transposition
            horizontal, vertical = (horizontal, not vertical) if transpose else (not horizontal, vertical)
            transpose = not transpose
        return horizontal, vertical, transpose

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """The window of ``image`` [..., H, W], turned: a view or copy [..., size, size]."""
        window = self.window(image)
        axes = [axis for axis, flip in ((-1, self.flip_horizontal), (-2, self.flip_vertical)) if flip]
        window = window.flip(axes) if axes else window
        window = window.transpose(-2, -1) if self.transpose else window
        return window.rot90(self.quarter_turns, (-2, -1)) if self.quarter_turns else window


def turn(images: torch.Tensor, orientation: torch.Tensor) -> torch.Tensor:
    """Turn each image of a batch its own way, without waiting for the device.

    Args:
        images: [B, C, S, S], any dtype.
        orientation: [B, 3], each row an :attr:`Geometry.orientation`.

    Returns:
        The turned images, like ``images``: bit for bit what :meth:`Geometry.apply` gives.
    """
    flags = orientation.bool()[..., None, None, None]
    images = torch.where(flags[:, 0], images.flip(-1), images)
    images = torch.where(flags[:, 1], images.flip(-2), images)
    return torch.where(flags[:, 2], images.transpose(-2, -1), images)


def draw_mitnet(generator: np.random.Generator, height: int, width: int, patch: int) -> Geometry:
    """A window and orientation as in MITNet's training.

    Args:
        generator: source of randomness.
        height: rows of the image, at least ``patch``.
        width: columns of the image, at least ``patch``.
        patch: side of the window, pixels.
    """
    top, left = (int(generator.integers(side - patch + 1)) for side in (height, width))
    horizontal, vertical, transpose = (bool(bit) for bit in generator.integers(2, size=3))
    return Geometry(top, left, patch, horizontal, vertical, transpose)


def draw_dcmpnet(generator: np.random.Generator, height: int, width: int, patch: int) -> Geometry:
    """A window and orientation as in DCMPNet's training; the arguments are those of `draw_mitnet`."""
    top, left = (_near_borders(generator, side, patch) for side in (height, width))
    return Geometry(
        top,
        left,
        patch,
        flip_horizontal=bool(generator.integers(2)),
        quarter_turns=int(generator.integers(4)),
    )


def centre(height: int, width: int, patch: int) -> Geometry:
    """The window in the middle, not turned."""
    return Geometry((height - patch) // 2, (width - patch) // 2, patch)


def _near_borders(generator: np.random.Generator, side: int, patch: int) -> int:
    if generator.random() < BORDER_WEIGHT * patch / side:
        return int(generator.integers(2)) * (side - patch)
    return int(generator.integers(side - patch + 1))


AUGMENTATIONS: dict[str, Callable[[np.random.Generator, int, int, int], Geometry]] = {
    "mitnet": draw_mitnet,
    "dcmpnet": draw_dcmpnet,
}
