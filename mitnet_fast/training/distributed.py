"""Data-parallel training: one process per device, as torchrun starts them.

Every process takes its share of each batch. After the backward pass gradients, losses and running
statistics are averaged over the processes, weighted by their numbers of samples, so the weights stay the
same everywhere, and a run means the same whatever the number of processes: ``data.batch`` is the batch of
all of them. Parameters without gradients, of which both networks have some, take no part. One message in
the end, not one by one during the backward pass: the gradients of the networks are 11 MB and 69 MB.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """The processes of a run and the place of this one among them.

    Args:
        rank: of this process.
        size: number of processes; with one, all methods return what they are given.
        local_rank: number of this process on its machine, and of the GPU it may use.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def average_(self, tensors: Iterable[torch.Tensor], weight: float) -> None:
        """Replace every tensor by its mean over the processes, one message per dtype.

        Args:
            tensors: floating point, the same in every process but for their values.
            weight: of this process's values, at least 0, in no process more than 2²⁴.
        """
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([*(tensor.reshape(-1) for tensor in group), group[0].new_ones(1)]) * weight
            dist.all_reduce(flat)
            means = flat[:-1] / flat[-1]
            for tensor, mean in zip(group, means.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks; for the first process only, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.first else None
        dist.gather_object(value, gathered)
        return gathered or []

    def wait(self) -> None:
        """Wait for all processes."""
        self.sum([0.0])


def join() -> Processes:
    """Join the processes that torchrun started, or be the only one.

    The process group is made once and lasts as long as the process: torchrun's rendezvous cannot be
    repeated. One that exists already is used as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # It keeps the group that exists when it is first imported, as others do on demand, in its functions' defaults:
        # destroying the group would leave its threads alive, and one that needs the interpreter when this has ended
        # aborts the process.
        import torch.distributed.nn

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    if not dist.is_available() or not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
