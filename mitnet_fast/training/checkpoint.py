"""Checkpoints of a run: written whole or not at all, read only when they are whole.

A checkpoint is a ``torch.save`` archive of tensors and plain data, so it loads with
``weights_only=True``. It begins with ``format`` and ``version``. PyTorch writes a CRC-32 for every
tensor but does not compare it when it reads; here it is compared.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import atomic_write
from ..models import CheckpointError
from ..models.official import damaged_entry
from ..weights import TRAINING_CHECKPOINT

VERSION = 2


def save_checkpoint(path: Path, content: Mapping[str, Any], keep_as: Path | None = None) -> None:
    """Write a checkpoint; when this fails the old file is as it was.

    Args:
        path: of the checkpoint.
        content: tensors and plain data: dictionaries, lists, tuples, strings, numbers, None.
        keep_as: a second name that the old file of ``path`` keeps.

    Raises:
        TypeError: something else in ``content``, with which it could not be read again.
        OSError: a full disk or the like; the message says what is there now.
    """
    _check_plain(content, "content")
    try:
        with atomic_write(path) as stream:
            torch.save({"format": TRAINING_CHECKPOINT, "version": VERSION, **content}, stream)
            if keep_as is not None and path.exists():
                _keep(path, keep_as)
        _sync_folder(path.parent)
    except OSError as error:
        left = "the one before is as it was" if path.exists() else "there was none before"
        raise OSError(error.errno, f"{error.strerror}: {path} could not be written; {left}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with all tensors on the CPU.

    Args:
        path: of the file.

    Returns:
        What was written, by name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, cut off, or no checkpoint of a training run of this version.
            Either message names the newest good checkpoint of the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint{_alternative(path)}")
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_alternative(path)}") from error.__cause__


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all global generators: PyTorch's for the CPU and for ``device``, Python's and NumPy's."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))


def _check_plain(value: object, where: str) -> None:
    """Subclasses are refused too: NumPy's float64 is a float, but not one that ``weights_only`` reads."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{where}: got {type(value).__name__}, a checkpoint holds tensors and plain data only")


def _keep(path: Path, keep_as: Path) -> None:
    """Give a file a second name; a copy where the file system knows no links."""
    temporary = keep_as.with_name(f".{keep_as.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, keep_as)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, where the system can (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        damaged = damaged_entry(path)
    except Exception as error:  # zipfile raises whatever a damaged directory makes it meet
        size = path.stat().st_size
        raise CheckpointError(f"{path}: cut off or no checkpoint ({size} bytes): {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} does not fit")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if code is not None:
            reason = f"it holds {code[1]}, which would be run; only tensors and plain data are read"
        raise CheckpointError(f"{path}: cannot be read safely: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != TRAINING_CHECKPOINT:
        raise CheckpointError(f"{path}: no checkpoint of a training run; weights to start from go in run.weights")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: of version {content.get('version')}, this program reads version {VERSION}")
    return content


def _alternative(path: Path) -> str:
    """The newest good checkpoint beside ``path``, as the end of a message."""
    others = [other for other in path.parent.glob("*.pt") if other != path]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(CheckpointError):
            step = _read(other)["position"]["step"]
            return f"; the newest good checkpoint beside it is {other} (step {step}), to resume from with --checkpoint"
    return "; there is no good checkpoint beside it"
