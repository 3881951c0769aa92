"""From items of a data set to batches on the device.

Worker processes decode and cut windows; the batch goes to the device as it was stored, 8-bit samples for 8-bit
files; there it is turned. On CUDA a thread fetches the next batch and copies it from pinned memory on a stream of
its own while a step is computed.

What goes wrong with the data comes as one :class:`~mitnet_fast.data.DataError` when the batch is asked for, never
within a step: a file that is damaged or gone, a folder that vanished, a worker that was killed.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.images import to_float
from ..data.layouts import DataError
from ..data.transforms import turn

ORIENTATION = "orientation"
Item = Mapping[str, Any]


@dataclass(frozen=True)
class _Failure:
    """An item that could not be read; an exception from a worker would carry a traceback in its message."""

    message: str


class _Reporting(Dataset):
    """A data set whose unreadable items say so instead of raising."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item | _Failure:
        try:
            return self.dataset[index]
        except (OSError, ValueError) as error:
            return _Failure(str(error) or type(error).__name__)


def batches(
    dataset: Dataset, device: torch.device, *, workers: int, seed: int, **arguments: Any
) -> Iterator[dict[str, Any]]:
    """Items of a data set in batches, or one by one, on the device and turned.

    Args:
        dataset: see :func:`~mitnet_fast.training.train`. What an item's "orientation" [3] says is done to its other
            tensors on the device.
        device: where the tensors go.
        workers: processes that make items; 0: this one.
        seed: of the workers' generators.
        arguments: what to take, as for :class:`torch.utils.data.DataLoader`: ``batch_sampler``, or ``sampler`` with
            ``batch_size=None``.

    Raises:
        DataError: an item cannot be read, or a worker died.
    """
    single = arguments.get("batch_size", 1) is None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores is the user's choice
        loader = DataLoader(
            _Reporting(dataset),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            # of its own: a loader without one draws from the global generator, once more after a resume
            generator=torch.Generator().manual_seed(seed),
            collate_fn=None if single else _collate,
            **arguments,
        )
        loaded = _start(loader)

    def fetch() -> dict[str, Any] | None:
        batch = _next(loaded)
        return batch if batch is None or single else _on_device(batch, device)

    if device.type == "cuda":
        yield from _ahead(fetch, device)
    else:
        while (batch := fetch()) is not None:
            yield batch


def _ahead(fetch: Callable[[], dict[str, Any] | None], device: torch.device) -> Iterator[dict[str, Any]]:
    """What ``fetch`` returns until it returns None, each fetched while the one before is worked on."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch_on_stream() -> dict[str, Any] | None:
        with torch.cuda.stream(stream):
            return fetch()

    with ThreadPoolExecutor(1, "batches") as executor:
        ahead = executor.submit(fetch_on_stream)
        while (batch := ahead.result()) is not None:
            if stream is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                for value in batch.values():
                    if isinstance(value, torch.Tensor):
                        value.record_stream(current)  # its memory may not be taken again before the step is done
            ahead = executor.submit(fetch_on_stream)
            yield batch


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the device, and turned there as its orientation says."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    orientation = moved.pop(ORIENTATION, None)
    if orientation is None:
        return moved
    return {
        name: turn(value, orientation) if isinstance(value, torch.Tensor) else value for name, value in moved.items()
    }


def _collate(items: list[Item | _Failure]) -> Item | _Failure:
    """A batch of items; where a set holds 8-bit and 16-bit files, all of a batch in float32."""
    for item in items:
        if isinstance(item, _Failure):
            return item
    mixed = {
        name
        for name, value in items[0].items()
        if isinstance(value, torch.Tensor) and len({item[name].dtype for item in items}) > 1
    }
    return default_collate(
        [
            {
                name: to_float(value) if name in mixed and value.dtype == torch.uint8 else value
                for name, value in item.items()
            }
            for item in items
        ]
    )


def _start(loader: DataLoader) -> Iterator[Any]:
    """Begin to load; a worker that dies is noticed when its batch is asked for, not by a signal within a step."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
    return loaded


def _next(loaded: Iterator[Any]) -> Any | None:
    try:
        batch = next(loaded, None)
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            "a process that reads the data was killed, most often because memory or shared memory (/dev/shm) was "
            f"full; fewer of them (data.workers) need less: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if isinstance(batch, _Failure):
        raise DataError(batch.message)
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Let the training process alone answer Ctrl-C: a worker that dies would end the step in hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
