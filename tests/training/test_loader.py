"""Batches: the same whatever loads them, and what goes wrong with the data said clearly."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from mitnet_fast.data import DataError, PairedImages, to_float, write_image
from mitnet_fast.training import load_checkpoint, trainer
from mitnet_fast.training.loader import _ahead, batches
from mitnet_fast.training.sampler import EpochBatches
from mitnet_fast.training.trainer import train

from .samples import Samples, small_config
from .test_trainer import differences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Six training pairs of two sizes, and one to validate on."""
    folder = tmp_path_factory.mktemp("images") / "set"
    for index in range(7):
        split = "test" if index == 6 else "train"
        item = Samples(7, side=40 + 3 * (index % 2))[index]
        for kind, name in (("hazy", "hazy"), ("GT", "clear")):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            write_image(folder / split / kind / f"{index}.png", item[name])
    return folder


def epoch_of(dataset: Dataset, workers: int) -> list[dict]:
    return list(batches(dataset, CPU, workers=workers, seed=0, batch_sampler=EpochBatches(len(dataset), 2, seed=1)))


def test_batches_are_the_items_turned_and_do_not_depend_on_the_workers(images):
    arguments = {"patch": 32, "augment": "mitnet", "repeat": 2, "seed": 4}
    raw, done = (PairedImages(images, "train", on_device=on_device, **arguments) for on_device in (True, False))
    first, *others = (epoch_of(raw, workers) for workers in (0, 1, 3))
    assert len(first) == 6
    for batch, indices in zip(first, EpochBatches(12, 2, seed=1), strict=True):
        assert set(batch) == {"hazy", "clear", "name"}
        assert batch["hazy"].dtype == torch.uint8
        for place, index in enumerate(indices):
            for name in ("hazy", "clear"):
                assert torch.equal(to_float(batch[name][place]), done[index][name])
    for other in others:
        assert differences(other, first) == []


def test_a_run_does_not_depend_on_the_workers(images, tmp_path):
    states = []
    for workers in (0, 1, 3):
        config = small_config("mitnet", "run.epochs=1", f"data.root={images}", f"data.workers={workers}")
        train(config, tmp_path / str(workers), progress=False)
        states.append(load_checkpoint(tmp_path / str(workers) / "last.pt"))
        del states[-1]["config"]
    assert states[0]["position"]["step"] == 3
    assert differences(states[1], states[0]) == differences(states[2], states[0]) == []


def test_8_bit_and_16_bit_files_make_one_batch(images, tmp_path):
    shutil.copytree(images, tmp_path / "set")
    values = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "set" / "train" / "hazy" / "0.png", values, bits=16)
    raw, done = (
        PairedImages(tmp_path / "set", "train", patch=32, augment="mitnet", on_device=choice)
        for choice in (True, False)
    )
    seen = {torch.uint8: 0, torch.float32: 0}
    for batch, indices in zip(epoch_of(raw, 0), EpochBatches(6, 2, seed=1), strict=True):
        seen[batch["hazy"].dtype] += 1
        for place, index in enumerate(indices):
            value = batch["hazy"][place]
            assert torch.equal(to_float(value) if value.dtype == torch.uint8 else value, done[index]["hazy"])
    assert seen == {torch.uint8: 2, torch.float32: 1}


class Numbered(Dataset):
    """Item i is i; it may fail, or end the worker that makes it."""

    def __init__(self, broken: Exception | None = None, kill: int | None = None) -> None:
        self.broken = broken
        self.kill = kill

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7 and self.broken is not None:
            raise self.broken
        if self.kill is not None and get_worker_info() is not None:
            os.kill(os.getpid(), self.kill)
        return {"value": torch.tensor(index)}


def test_more_workers_than_cores_are_the_users_choice(monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert len(epoch_of(Numbered(), 2)) == 6
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ValueError("7.png: damaged"), FileNotFoundError(2, "gone", "7.png")])
def test_what_cannot_be_read_is_one_message_without_a_traceback(error, workers):
    with pytest.raises(DataError) as caught:
        epoch_of(Numbered(broken=error), workers)
    assert str(caught.value) == str(error)


def test_an_error_in_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        epoch_of(Numbered(broken=ZeroDivisionError("ours")), 1)


def test_batches_are_fetched_ahead_in_their_order():
    fetched, values = [], iter([{"value": torch.tensor(k)} for k in range(4)])

    def fetch():
        fetched.append(threading.current_thread())
        return next(values, None)

    ahead = _ahead(fetch, CPU)
    assert [int(batch["value"]) for batch in ahead] == [0, 1, 2, 3]
    assert len(fetched) == 5
    assert threading.main_thread() not in fetched
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_what_goes_wrong_ahead_comes_when_its_batch_is_asked_for():
    values = iter([{"value": torch.tensor(0)}])

    def fetch():
        batch = next(values, None)
        if batch is None:
            raise DataError("7.png: damaged")
        return batch

    ahead = _ahead(fetch, CPU)
    assert int(next(ahead)["value"]) == 0
    with pytest.raises(DataError, match=r"7\.png: damaged"):
        next(ahead)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_vanishes_ends_the_run_with_its_state_saved(workers, images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "set")
    overrides = ("run.epochs=2", "data.repeat=4", "output.log_every=1", f"data.root={tmp_path / 'set'}")
    config = small_config("mitnet", *overrides, f"data.workers={workers}")
    train(config, tmp_path / "whole", progress=False)
    write = trainer.CsvLog.write

    def vanish(log, row):
        write(log, row)
        if (tmp_path / "set").exists():
            (tmp_path / "set").rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.CsvLog, "write", vanish)
        with pytest.raises(DataError) as error:
            train(config, tmp_path / "run", progress=False)
    step = load_checkpoint(tmp_path / "run" / "last.pt")["position"]["step"]
    assert 1 <= step <= 1 + 2 * workers + 1
    assert str(tmp_path / "set" / "train") in str(error.value)
    assert f"saved as it was after step {step}; to go on, type: mitnet-fast train --resume" in str(error.value)
    (tmp_path / "elsewhere").rename(tmp_path / "set")
    train(None, tmp_path / "run", resume=True, progress=False)
    actual, expected = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "whole"))
    assert differences(actual, expected) == []


def test_a_killed_worker_ends_the_run_with_its_state_saved(tmp_path):
    config = small_config("mitnet", "run.epochs=2", "validation.every=0", "data.workers=1")
    train(config, tmp_path / "whole", datasets=(Samples(8), None), progress=False)
    train(config, tmp_path / "run", datasets=(Samples(8), None), progress=False, max_steps=2)

    def die(index):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError) as error:
        train(None, tmp_path / "run", resume=True, datasets=(Samples(8, on_item=die), None), progress=False)
    assert signal.getsignal(signal.SIGCHLD) == handler
    for part in ("a process that reads the data was killed", "data.workers", "saved as it was after step 2"):
        assert part in str(error.value)
    train(None, tmp_path / "run", resume=True, datasets=(Samples(8), None), progress=False)
    actual, expected = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "whole"))
    assert differences(actual, expected) == []
