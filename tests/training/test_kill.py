"""Runs that are killed at any moment, while they write a checkpoint too, end as if they had not been."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mitnet_fast.data import write_image
from mitnet_fast.models import CheckpointError
from mitnet_fast.training import load_checkpoint
from mitnet_fast.training.trainer import train

from .processes import command, start, train_on_a_full_disk, train_small
from .samples import COMMON, MITNET, Samples, small_config
from .test_trainer import differences, rows

# everything that has a state is switched on, and a checkpoint is written at every step
EVERYTHING = {
    "mitnet": ("schedule.halve_every=1", "run.ema=0.9", "optimizer.clip=1", "optimizer.accumulate=2"),
    "dcmpnet": ("run.ema=0.9", "run.precision=bfloat16", "data.workers=1"),
}
EACH_STEP = "output.checkpoint_every=1"


def kill(folder: Path, system: str, overrides: tuple[str, ...], seconds: float, while_writing: bool) -> bool:
    """Start or resume a run and kill it after a time, or while it next writes; whether a file was half written."""
    process = start(train_small, folder, system, overrides, True)
    begin, log = time.monotonic(), folder / "versions.json"
    starts = log.stat().st_mtime_ns if log.exists() else 0
    while process.is_alive() and not (log.exists() and log.stat().st_mtime_ns > starts):
        assert time.monotonic() < begin + 120
        time.sleep(0.001)
    time.sleep(seconds)
    while while_writing and process.is_alive() and not any(name.endswith(".tmp") for name in os.listdir(folder)):
        pass
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (folder.parent / f"{folder.name}.stderr").read_text()
    return any(name.endswith(".tmp") for name in os.listdir(folder))


def killed_again_and_again(system: str, epochs: int, kills: int, folder: Path, seed: int) -> None:
    moments = random.Random(seed)
    overrides = (*EVERYTHING[system], f"run.epochs={epochs}", "output.log_every=3")
    train_small(folder / "whole", system, overrides)
    half_written = 0
    for number in range(kills):
        half_written += kill(
            folder / "killed", system, (*overrides, EACH_STEP), moments.uniform(0, 0.15), number % 2 == 0
        )
        if (folder / "killed" / "last.pt").exists():
            position = load_checkpoint(folder / "killed" / "last.pt")["position"]
            assert position["step"] == 4 * position["epoch"] + position["step_in_epoch"]
    assert half_written >= kills // 4
    process = start(train_small, folder / "killed", system, (*overrides, EACH_STEP))
    process.join()
    assert process.exitcode == 0, (folder / "killed.stderr").read_text()
    actual, expected = (load_checkpoint(folder / name / "last.pt") for name in ("killed", "whole"))
    assert actual["position"]["epoch"] == epochs
    assert differences(actual, expected) == ["/config/output/checkpoint_every"]
    best, expected_best = (load_checkpoint(folder / name / "best.pt") for name in ("killed", "whole"))
    assert differences(best, expected_best) == ["/config/output/checkpoint_every"]
    for name in ("log.csv", "validation.csv"):
        assert rows(folder / "killed", name) == rows(folder / "whole", name)
    assert (folder / "killed" / "last.safetensors").read_bytes() == (folder / "whole" / "last.safetensors").read_bytes()
    assert not list((folder / "killed").glob(".*.tmp"))


def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(tmp_path):
    killed_again_and_again("mitnet", 6, 3, tmp_path, seed=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("system", "epochs"), [("mitnet", 40), ("dcmpnet", 16)])  # more steps than the kills allow
def test_a_run_that_is_killed_24_times_ends_as_if_it_had_not_been(system, epochs, tmp_path):
    killed_again_and_again(system, epochs, 24, tmp_path, seed=1)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_it(tmp_path):
    config = small_config("mitnet", "run.epochs=1", "output.checkpoint_every=1", "validation.every=0")
    datasets = (Samples(8), None)
    train(config, tmp_path / "whole", datasets=datasets, progress=False)
    folder = tmp_path / "run"
    train(config, folder, datasets=datasets, progress=False, max_steps=3)
    last, previous = folder / "last.pt", folder / "previous.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"last\.pt: cut off .*; the newest good .*previous\.pt \(step 2\)"):
        train(None, folder, datasets=datasets, progress=False, resume=True)
    good = previous.read_bytes()
    train(None, folder, datasets=datasets, progress=False, resume=previous, max_steps=2)
    assert load_checkpoint(last)["position"]["step"] == 2
    assert previous.read_bytes() == good  # never replaced by the damaged one
    train(None, folder, datasets=datasets, progress=False, resume=True)
    assert differences(load_checkpoint(last), load_checkpoint(tmp_path / "whole" / "last.pt")) == []


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path):
    overrides = ("run.epochs=1", "validation.every=0")
    train_small(tmp_path / "whole", "mitnet", overrides)
    folder = tmp_path / "run"
    config = small_config("mitnet", *overrides, EACH_STEP)
    train(config, folder, datasets=(Samples(8), None), progress=False, max_steps=2)
    before = {file: (folder / file).read_bytes() for file in ("last.pt", "previous.pt")}
    process = start(train_on_a_full_disk, folder, "mitnet", (*overrides, EACH_STEP))
    process.join()
    errors = (tmp_path / "run.stderr").read_text()
    assert process.exitcode == 1
    assert "last.pt could not be written; the one before is as it was" in errors or "File too large" in errors
    assert {file: (folder / file).read_bytes() for file in before} == before
    assert not list(folder.glob(".*.tmp"))
    train_small(folder, "mitnet", (*overrides, EACH_STEP))
    differing = differences(load_checkpoint(folder / "last.pt"), load_checkpoint(tmp_path / "whole" / "last.pt"))
    assert differing == ["/config/output/checkpoint_every"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four training pairs and one to validate on."""
    folder, samples = tmp_path_factory.mktemp("images") / "set", Samples(5, side=40)
    for index in range(5):
        for kind, name in (("hazy", "hazy"), ("GT", "clear")):
            place = folder / ("test" if index == 4 else "train") / kind
            place.mkdir(parents=True, exist_ok=True)
            write_image(place / f"{index}.png", samples[index][name])
    return folder


def interrupt(folder: Path, words: list[str], moments: list[float], wait_for: str) -> tuple[int, str, str]:
    """Run the command, press Ctrl-C after these seconds each; its exit code, and what it wrote to both streams."""
    process = start(command, folder, *words)
    begin = time.monotonic()
    while not (folder.parent / wait_for).exists():
        assert process.is_alive()
        assert time.monotonic() < begin + 120
        time.sleep(0.001)
    for moment in moments:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.killpg(process.pid, signal.SIGINT)
    process.join()
    return process.exitcode, *((folder.parent / f"{folder.name}.{name}").read_text() for name in ("stdout", "stderr"))


def train_words(images: Path, folder: Path) -> list[str]:
    """A long training of a small network, with a checkpoint at every step."""
    overrides = (*COMMON[:2], *MITNET, EACH_STEP, "run.device=cpu", "data.workers=1", "data.repeat=100")
    overrides = (*overrides, "output.log_every=1")
    return ["train", "mitnet-its", "-d", str(images), "--run", str(folder)] + [
        word for override in overrides for word in ("-s", override)
    ]


def interrupted(images: Path, tmp_path: Path, number: int, moments: list[float], wait_for: str) -> None:
    folder = tmp_path / f"run{number}"
    code, out, errors = interrupt(folder, train_words(images, folder), moments, wait_for.format(folder.name))
    assert code == 130, (out, errors)
    assert "stopped" in out + errors
    assert "Traceback" not in out + errors
    assert not list(folder.glob(".*.tmp"))
    if (folder / "last.pt").exists():
        goes_on(folder)


def goes_on(folder: Path) -> None:
    """One more step can be done."""
    step = load_checkpoint(folder / "last.pt")["position"]["step"]
    assert train(None, folder, resume=True, max_steps=step + 1, progress=False).step == step + 1


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["the set vanishes", "the worker is killed"])
def test_a_fault_of_the_data_ends_the_command_with_a_message(fault, images, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "run"
    shutil.copytree(images, root)
    process = start(command, folder, *train_words(root, folder))
    begin = time.monotonic()
    while not (folder / "log.csv").exists():
        assert process.is_alive()
        assert time.monotonic() < begin + 120
        time.sleep(0.01)
    if fault == "the set vanishes":
        root.rename(tmp_path / "elsewhere")
    else:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
    process.join()
    errors = (tmp_path / "run.stderr").read_text()
    assert process.exitcode == 2, errors
    assert "error:" in errors
    assert {"the set vanishes": str(root / "train"), "the worker is killed": "data.workers"}[fault] in errors
    assert f"to go on, type: mitnet-fast train --resume -r {folder}" in errors
    assert "Traceback" not in errors
    if fault == "the set vanishes":
        (tmp_path / "elsewhere").rename(root)
    goes_on(folder)


def test_ctrl_c_stops_a_run_that_can_go_on(images, tmp_path):
    interrupted(images, tmp_path, 0, [0.2], "{}/log.csv")


@pytest.mark.exhaustive
def test_ctrl_c_at_any_moment(images, tmp_path):
    moments = random.Random(0)
    for number in range(16):
        interrupted(images, tmp_path, number, [moments.uniform(0, 2)], "{}.started")
    for number in range(16, 24):  # a second one
        interrupted(images, tmp_path, number, [moments.uniform(0, 2), moments.uniform(0, 0.1)], "{}/config.yaml")


@pytest.mark.exhaustive
def test_ctrl_c_while_the_program_starts(tmp_path):
    moments, started = random.Random(0), tmp_path / "started"
    program = (
        "import pathlib, sys; from mitnet_fast.__main__ import main; pathlib.Path(sys.argv.pop(1)).touch(); main()"
    )
    for _ in range(12):
        started.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(started), "train", "mitnet-its", "-d", str(tmp_path / "missing")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while not started.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 2))
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=120)
        assert (process.returncode, text.strip()) == (130, "stopped") or "missing" in text
        assert "Traceback" not in text
