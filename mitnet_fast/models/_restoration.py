"""What restoring an image outside training needs: reflection to any size, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def reflect_to(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Continue an image by reflection at the right and bottom.

    Args:
        image: [..., H, W], at least 1×1.
        height: of the result, at least H.
        width: of the result, at least W.

    Returns:
        [..., height, width]. The border pixel is not repeated; where the pad exceeds H − 1 or W − 1
        the reflection goes on back and forth, and a side of one pixel is repeated.
    """
    for axis, target in ((-2, height), (-1, width)):
        size = image.shape[axis]
        if target > size:
            position = torch.arange(target, device=image.device) % max(2 * size - 2, 1)
            image = image.index_select(axis, torch.minimum(position, (2 * size - 2) - position).abs())
    return image


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and every part of it back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
