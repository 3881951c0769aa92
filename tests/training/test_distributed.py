"""Data-parallel training: as many processes as there may be, the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun

from mitnet_fast.training import build_system, load_checkpoint, trainer
from mitnet_fast.training.distributed import Processes, join
from mitnet_fast.training.sampler import EpochBatches
from mitnet_fast.training.trainer import train

from .samples import Samples, small_config
from .test_trainer import differences, rows

OVERRIDES = {
    # batches of 4 samples and of 1, in which one process has nothing to do
    "mitnet": ("run.epochs=2", "data.batch=4", "data.drop_last=false", "loss.mutual_information_weight=1"),
    "dcmpnet": ("run.epochs=1", "data.batch=4", "run.ema=0.9"),
    # batches of 4 samples and of 3; batch norms use the statistics that they have
    "dcmpnet-eval": ("run.epochs=2", "data.batch=4", "data.drop_last=false", "validation.every=0"),
}
SEPARATE = (("dehazing", ("network",)), ("depth", ("depth",)))  # what each optimizer of DCMPNet trains
SAMPLES = {"mitnet": 5, "dcmpnet": 8, "dcmpnet-eval": 7}

SCRIPT = """
import atexit, sys, torch
from pathlib import Path
from tests.training.test_distributed import OVERRIDES, begin, end_without_threads_of_the_group, names_of_threads

atexit.register(end_without_threads_of_the_group)  # called after what training registers
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for run in OVERRIDES:
    begin(run, folder / run)
    result = begin(run, folder / f"{run}-resumed", max_steps=1)
    assert not result.finished
    begin(run, folder / f"{run}-resumed", resume=True)
assert any("gloo" in name for name in names_of_threads())
"""


def begin(run: str, folder: Path, *overrides: str, **arguments):
    """Train one of the runs in this process, or in this process's part of it."""
    with pytest.MonkeyPatch.context() as patched:
        if run == "dcmpnet-eval":
            patched.setattr(trainer, "build_system", with_fixed_statistics)
        config = small_config(run.removesuffix("-eval"), *OVERRIDES[run], *overrides)
        datasets = (Samples(SAMPLES[run]), Samples(3, side=24))
        return train(config, folder, datasets=datasets, progress=False, **arguments)


def names_of_threads() -> list[str]:
    """Of this process, those that the interpreter does not know of included."""
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # one that has ended meanwhile
            names.append(name.read_text().strip())
    return names


def end_without_threads_of_the_group() -> None:
    """Fail where threads of the process group outlive it: they abort a process that ends before them, now and then."""
    if left := [name for name in names_of_threads() if "gloo" in name]:
        print(f"threads that outlive the process group: {left}", file=sys.stderr, flush=True)
        os._exit(1)


def with_fixed_statistics(*arguments):
    """A system whose batch norms take their running statistics in training too."""
    system = build_system(*arguments)
    for module in system.modules.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return system


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


def assert_same_weights(two: dict, one: dict, optimizer: str, modules: tuple[str, ...], run: str) -> None:
    """The same weights to rounding, where Adam does not make a step of what is nothing but rounding.

    Some gradients are zero but for rounding, such as those of biases of keys in front of a softmax; Adam divides every
    gradient by its size, and so moves their weights by as much as all others. So its means of the gradients are
    compared everywhere, and the weights where gradients are far above rounding.
    """
    system = build_system(small_config(run.removesuffix("-eval"), *OVERRIDES[run]), torch.device("cpu"))
    names = [
        (module, name) for module in modules for name, p in system.modules[module].named_parameters() if p.requires_grad
    ]
    states = [each["optimizers"][optimizer]["state"] for each in (two, one)]
    sizes = {index: entry["exp_avg_sq"].sqrt() for index, entry in states[1].items()}
    assert set(states[0]) == set(sizes)
    largest, compared = max(float(size.max()) for size in sizes.values()), 0
    for index, size in sizes.items():
        actual, expected = (state[index]["exp_avg"] for state in states)
        assert (actual - expected).abs().max() <= 1e-4 * size.max() + 1e-5 * largest
        module, name = names[index]
        actual, expected = (each["modules"][module][name][size > 1e-4 * largest] for each in (two, one))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        compared += actual.numel()
    assert compared > 0.25 * sum(size.numel() for size in sizes.values())


@pytest.mark.parametrize(
    ("run", "overrides"),
    [
        ("mitnet", ()),
        ("dcmpnet-eval", ()),
        ("dcmpnet", ("optimizer.accumulate=2",)),  # the statistics of a batch norm are those of a share or part
    ],
)
def test_two_processes_train_what_one_trains(run, overrides, two_processes, tmp_path):
    begin(run, tmp_path, *overrides)
    one, two = (load_checkpoint(folder / "last.pt")["system"] for folder in (tmp_path, two_processes / run))
    for optimizer, modules in (("restoration", ("network", "loss")),) if run == "mitnet" else SEPARATE:
        assert_same_weights(two, one, optimizer, modules, run)
    statistics = [name for name in two["modules"]["network"] if "running_" in name]
    assert bool(statistics) == run.startswith("dcmpnet")
    assert two["steps"] == one["steps"] == {"mitnet": 4, "dcmpnet": 2, "dcmpnet-eval": 4}[run]
    logs = [rows(folder) for folder in (tmp_path, two_processes / run)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["step"] == theirs["step"]
        assert float(ours["total"]) == pytest.approx(float(theirs["total"]), rel=1e-4)
    if run != "dcmpnet-eval":
        validations = [rows(folder, "validation.csv") for folder in (tmp_path, two_processes / run)]
        for ours, theirs in zip(*validations, strict=True):
            assert ours["images"] == theirs["images"] == "3"
            assert float(ours["psnr"]) == pytest.approx(float(theirs["psnr"]), abs=0.05)


@pytest.mark.parametrize("run", OVERRIDES)
def test_two_processes_go_on_as_if_they_had_not_stopped(run, two_processes):
    whole, resumed = two_processes / run, two_processes / f"{run}-resumed"
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


def test_torchrun_leaves_the_options_of_the_command_to_it():
    words = "train --resume -r runs/a -d ITS --data ITS -s a.b=1 --override a.b=2 --checkpoint runs/a/previous.pt"
    words = [*words.split(), "--overwrite", "--max-steps", "4", "--show"]
    parsed = torchrun.parse_args(["--nproc-per-node=2", "-m", "mitnet_fast", *words])
    assert (parsed.training_script, parsed.training_script_args) == ("mitnet_fast", words)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join()
    assert processes == Processes(rank=0, size=1)
    tensor = torch.ones(2)
    processes.average_([tensor], weight=3)
    assert tensor.tolist() == [1, 1]
    assert (processes.any(True), processes.any(False), processes.sum([2.5]), processes.gather("a")) == (
        True,
        False,
        [2.5],
        ["a"],
    )
    processes.wait()
