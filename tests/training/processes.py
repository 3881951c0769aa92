"""Training in processes that can be killed, forked from one that has imported everything: they start at once."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mitnet_fast.__main__ import main
from mitnet_fast.training import checkpoint, train

from .samples import Samples, small_config

SLOW = 0.005  # seconds that a half-written checkpoint is left lying, so that kills meet one


def start(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    """Run a function of this module in a process of its own.

    Its first argument is a folder; what it prints is in files beside it, ``.stdout`` and ``.stderr``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_redirected, args=(function, *arguments))
    process.start()
    return process


def train_small(folder: Path, system: str, overrides: tuple[str, ...], slow_writes: bool = False) -> None:
    """Begin a run, or go on with the one that is there."""
    if slow_writes:
        checkpoint.torch = SlowSave()
    resume = (folder / "last.pt").exists()
    config = small_config(system, *overrides)
    datasets = (Samples(8), Samples(2, side=24))
    train(config, folder, datasets=datasets, progress=False, resume=resume, overwrite=not resume)


def train_on_a_full_disk(folder: Path, system: str, overrides: tuple[str, ...]) -> None:
    """Go on with a run where no file can grow beyond a few kilobytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    train_small(folder, system, overrides)


class SlowSave:
    """PyTorch, but a checkpoint reaches the file in two halves."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def save(self, content: object, stream: io.BufferedIOBase) -> None:
        memory = io.BytesIO()
        torch.save(content, memory)
        whole = memory.getvalue()
        stream.write(whole[: len(whole) // 2])
        stream.flush()
        time.sleep(SLOW)
        stream.write(whole[len(whole) // 2 :])


def command(folder: Path, *words: str) -> None:
    """The command line, in a process group of its own as a terminal starts it."""
    os.setsid()
    sys.argv = ["mitnet-fast", *words]
    (folder.parent / f"{folder.name}.started").touch()
    main()


def _redirected(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as outside of tests
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = (folder.parent / f"{folder.name}.{name}").open("a")
        os.dup2(stream.fileno(), descriptor)
        setattr(sys, name, stream)
    function(folder, *arguments)
