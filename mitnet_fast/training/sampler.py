"""Order of the samples: a permutation from (seed, epoch), from any batch of it on.

The order depends on nothing else, so a run that is resumed in the middle of an epoch goes on with
the very batches that are left.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batches of indices of one epoch, or a process's share of them, all of the same size.

    Args:
        samples: of the data set.
        batch: indices per batch; what is left of the last is dropped.
        seed: of the run.
        steps: batches per epoch; None: as many as there are.
        rank: which share of every batch to give.
        shares: number of equal shares that a batch is cut into, one per process.

    Raises:
        ValueError: fewer samples than one epoch needs, or a batch that cannot be cut so.
    """

    def __init__(
        self, samples: int, batch: int, seed: int, steps: int | None = None, *, rank: int = 0, shares: int = 1
    ) -> None:
        if batch % shares:
            raise ValueError(f"data.batch: got {batch}, which {shares} processes cannot share equally")
        if samples < batch * (steps or 1):
            wanted = f"data.batch = {batch}" + ("" if steps is None else f" × run.steps_per_epoch = {steps}")
            raise ValueError(
                f"an epoch of {wanted} needs {batch * (steps or 1)} samples, the training set has {samples}: raise "
                "data.repeat, or lower them"
            )
        self.samples = samples
        self.batch = batch
        self.seed = seed
        self.steps = steps or samples // batch
        self.rank = rank
        self.share = batch // shares
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with."""
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        for step in range(self.start, self.steps):
            start = step * self.batch + self.rank * self.share
            yield order[start : start + self.share].tolist()

    def __len__(self) -> int:
        return self.steps - self.start
