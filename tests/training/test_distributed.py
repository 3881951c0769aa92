"""Data-parallel training: as many processes as there may be, the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mitnet_fast.training import load_checkpoint
from mitnet_fast.training.distributed import Processes, join
from mitnet_fast.training.sampler import EpochBatches
from mitnet_fast.training.trainer import train

from .samples import Samples, small_config
from .test_trainer import differences, rows

OVERRIDES = {
    "mitnet": ("run.epochs=1", "data.batch=4", "loss.mutual_information_weight=0", "optimizer.clip=1"),
    "dcmpnet": ("run.epochs=1", "data.batch=4", "run.ema=0.9"),
}

SCRIPT = """
import sys, torch
from pathlib import Path
from tests.training.samples import Samples, small_config
from tests.training.test_distributed import OVERRIDES
from mitnet_fast.training import train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
datasets = (Samples(8), Samples(3, side=24))
for system, overrides in OVERRIDES.items():
    config = small_config(system, *overrides)
    train(config, folder / system, datasets=datasets, progress=False)
    result = train(config, folder / f"{system}-resumed", datasets=datasets, progress=False, max_steps=1)
    assert not result.finished
    train(None, folder / f"{system}-resumed", datasets=datasets, progress=False, resume=True)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every system trained by two processes, without a stop and with one."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launcher, str(script), str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("system", OVERRIDES)
def test_two_processes_train_what_one_trains_in_two_parts(system, two_processes, tmp_path):
    config = small_config(system, *OVERRIDES[system], "optimizer.accumulate=2")
    train(config, tmp_path, datasets=(Samples(8), Samples(3, side=24)), progress=False)
    one, two = (load_checkpoint(folder / "last.pt")["system"] for folder in (tmp_path, two_processes / system))
    state, expected = two["modules"]["network"], one["modules"]["network"]
    assert state.keys() == expected.keys()
    statistics = [name for name in state if "running_" in name]
    for name in state.keys() - set(statistics):
        if state[name].is_floating_point():
            torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=2e-6)
    assert bool(statistics) == (system == "dcmpnet")
    logs = [rows(folder) for folder in (tmp_path, two_processes / system)]
    assert [row["step"] for row in logs[1]] == ["2"]
    for ours, theirs in zip(*logs, strict=True):
        assert float(ours["total"]) == pytest.approx(float(theirs["total"]), rel=1e-4)
    validations = [rows(folder, "validation.csv") for folder in (tmp_path, two_processes / system)]
    for ours, theirs in zip(*validations, strict=True):
        assert ours["images"] == theirs["images"] == "3"
        assert float(ours["psnr"]) == pytest.approx(float(theirs["psnr"]), abs=0.05)


@pytest.mark.parametrize("system", OVERRIDES)
def test_two_processes_go_on_as_if_they_had_not_stopped(system, two_processes):
    whole, resumed = two_processes / system, two_processes / f"{system}-resumed"
    assert differences(load_checkpoint(resumed / "last.pt"), load_checkpoint(whole / "last.pt")) == []
    assert rows(resumed) == rows(whole)
    starts = json.loads((resumed / "versions.json").read_text())
    assert [(start["step"], start["processes"]) for start in starts] == [(0, 2), (1, 2)]


def test_processes_draw_noise_of_their_own(two_processes):
    states = load_checkpoint(two_processes / "dcmpnet" / "last.pt")["random"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_the_shares_of_all_processes_are_the_batch():
    whole = EpochBatches(24, 6, seed=1)
    shares = [EpochBatches(24, 6, seed=1, rank=rank, shares=3) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [index for part in parts for index in part] == batch
        assert [len(part) for part in parts] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"data\.batch: got 6, which 4 processes cannot share equally"):
        EpochBatches(24, 6, seed=1, shares=4)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join()
    assert processes == Processes(rank=0, size=1)
    tensor = torch.ones(2)
    processes.average_([tensor])
    assert tensor.tolist() == [1, 1]
    assert (processes.any(True), processes.any(False), processes.sum([2.5]), processes.gather("a")) == (
        True,
        False,
        [2.5],
        ["a"],
    )
    processes.wait()
