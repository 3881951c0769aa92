"""Order of the samples: a permutation from (seed, epoch), from any batch of it on.

The order depends on nothing else, so a run that is resumed in the middle of an epoch goes on with
the very batches that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Share:
    """Which samples of a batch one process takes.

    Args:
        start: place of the first of them in the batch.
        count: how many; with none, the process computes the batch's first sample, which counts for nothing.
        size: samples of the whole batch.
    """

    start: int
    count: int
    size: int


class EpochBatches(Sampler[list[int]]):
    """Batches of indices of one epoch, or a process's share of them.

    Args:
        samples: of the data set.
        batch: indices per batch.
        seed: of the run.
        steps: batches per epoch; None: as many as there are.
        drop_last: leave out what does not fill a last batch.
        rank: which share of every batch to give.
        shares: number of shares that a batch is cut into, one per process: equal ones of a full batch, as equal as
            can be of the last.

    Raises:
        ValueError: fewer samples than one epoch needs, or a batch that cannot be cut so.
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        seed: int,
        steps: int | None = None,
        *,
        drop_last: bool = True,
        rank: int = 0,
        shares: int = 1,
    ) -> None:
        if batch % shares:
            raise ValueError(f"data.batch: got {batch}, which {shares} processes cannot share equally")
        needed = batch * (steps or 1) if drop_last else batch * ((steps or 1) - 1) + 1
        if samples < needed:
            wanted = f"data.batch = {batch}" + ("" if steps is None else f" × run.steps_per_epoch = {steps}")
            raise ValueError(
                f"an epoch of {wanted} needs {needed} samples, the training set has {samples}: raise data.repeat, or "
                "lower them"
            )
        self.samples = samples
        self.batch = batch
        self.seed = seed
        self.steps = steps or (samples // batch if drop_last else -(-samples // batch))
        self.rank = rank
        self.shares = shares
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with."""
        self.epoch = epoch
        self.start = start

    def share(self, step: int) -> Share:
        """What this process takes of a batch of the epoch."""
        size = min(self.batch, self.samples - step * self.batch)
        start, stop = (size * rank // self.shares for rank in (self.rank, self.rank + 1))
        return Share(start, stop - start, size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        for step in range(self.start, self.steps):
            batch, share = order[step * self.batch :], self.share(step)
            yield batch[share.start : share.start + share.count].tolist() or batch[:1].tolist()

    def __len__(self) -> int:
        return self.steps - self.start
