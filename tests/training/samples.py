"""Small configurations and data sets that live in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from mitnet_fast.training import Configuration, load_config

PATCH = 32

MITNET = ("network.width=4", "network.depth=2")
DCMPNET = (
    "network.widths=[4, 4, 4]",
    "network.depths=[1, 1, 1, 1, 1]",
    "network.heads=[1, 1, 1, 1, 1]",
    "network.attention_ratios=[1, 1, 1, 0, 0]",
    "network.prior_widths=[2, 2, 4, 4, 4]",
    "network.depth_widths=[4]",
    "network.growth=2",
    "loss.contrastive_weight=0",
)
COMMON = (f"data.patch={PATCH}", "data.batch=2", "data.workers=0", "run.device=cpu", "output.log_every=2")


def small_config(system: str, *overrides: str) -> Configuration:
    """A network of a few thousand weights, trained on two patches of 32 pixels at a time."""
    return load_config(f"{system}-its", (*COMMON, *(MITNET if system == "mitnet" else DCMPNET), *overrides))


class Samples(Dataset):
    """Smooth images under even haze; what an item holds depends on epoch and index only.

    Args:
        size: number of items.
        side: of the images, pixels.
        depth: whether items have depth maps.
        on_item: called with every index that is asked for.
    """

    def __init__(
        self, size: int, side: int = PATCH, depth: bool = True, on_item: Callable[[int], None] | None = None
    ) -> None:
        self.size = size
        self.side = side
        self.depth = depth
        self.on_item = on_item
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.size:
            raise IndexError(index)
        if self.on_item is not None:
            self.on_item(index)
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        coarse = torch.rand(1, 4, 5, 5, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (self.side, self.side), mode="bilinear")[0]
        item = {"hazy": 0.6 * fine[:3] + 0.36, "clear": fine[:3], "name": str(index)}
        return {**item, "depth": fine[3:]} if self.depth else item


def batch_of(size: int, **arguments: Any) -> dict[str, torch.Tensor]:
    """The first items of :class:`Samples` as a batch."""
    samples = Samples(size, **arguments)
    items = [samples[index] for index in range(size)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "name"}
