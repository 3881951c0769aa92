"""Ctrl-C at any moment of a command: exit code 130, at most one line, no traceback, nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mitnet_fast._interrupt import STOPPED
from mitnet_fast.models import MITNet
from mitnet_fast.weights import save_weights

IMAGES = 300
# Python tells of every module that it has imported, on the error stream: moments that can be counted.
PROGRAM = [sys.executable, "-X", "importtime", "-m", "mitnet_fast"]
COMMAND = [*PROGRAM, "dehaze", "in", "-w", "w.safetensors", "-o", "out"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
IN_A_FINALISER = """
import os, signal, time
from mitnet_fast._interrupt import interruptible, leave

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

signal.signal(signal.SIGINT, leave)
interruptible()
try:
    Finalised()
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupt")
    torch.manual_seed(0)
    save_weights(folder / "w.safetensors", MITNet(width=1, depth=2))
    (folder / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for index in range(IMAGES):
        Image.fromarray(pixels).save(folder / f"in/{index}.png")
    return folder


def test_ctrl_c_in_a_finaliser_comes_again():
    begun = time.monotonic()
    run = subprocess.run([sys.executable, "-c", IN_A_FINALISER], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "interrupted\n", "")
    assert time.monotonic() - begun < 10


def interrupted(
    folder: Path, modules: int, seconds: float = 0, command: list[str] = COMMAND
) -> tuple[int, list[str], list[Path]]:
    """Stop a command so many modules, at least one, after its handler's, and so many seconds after these.

    Returns:
        Exit code, the lines of its error stream that are not about imports, and what lies in the output folder.
    """
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said, started, left = [], False, modules
    for line in process.stderr:
        if not line.startswith("import time:"):
            said.append(line)
            continue
        left -= started
        started = started or line.rstrip().endswith("mitnet_fast._interrupt")
        if started and left <= 0:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    said += [line for line in process.stderr if not line.startswith("import time:")]
    code = process.wait()
    too_late.cancel()
    if code == -signal.SIGINT:  # what `python -m` makes of 130 where Ctrl-C met the text of an exec; shells say 130
        code = STOPPED
    return code, said, sorted((folder / "out").rglob("*")) if (folder / "out").exists() else []


def check(folder: Path, modules: int, seconds: float = 0) -> int:
    """Assert that the command ends as it should, and return the number of images that it had written."""
    code, said, files = interrupted(folder, modules, seconds)
    assert code == STOPPED, said
    assert said in ([], ["stopped\n"])
    for file in files:
        assert file.suffix == ".png"
        with Image.open(file) as image:
            image.load()
            assert image.size == (64, 64)
        file.unlink()
    return len(files)


def test_while_modules_are_imported(folder: Path) -> None:
    assert check(folder, 5) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(15))
def test_at_any_module(seed: int, folder: Path) -> None:
    check(folder, random.Random(seed).randrange(1, 1000))


@pytest.mark.exhaustive
def test_while_images_are_restored(folder: Path) -> None:
    last = "mitnet_fast.inference"
    answer = subprocess.run(COMMAND, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-500:]
    modules = [
        line.rstrip().rpartition("|")[2].strip() for line in answer.stderr.splitlines() if "import time:" in line
    ]
    imported = modules.index(last) - modules.index("mitnet_fast._interrupt")
    for file in (folder / "out").iterdir():
        file.unlink()
    written = [check(folder, imported, random.Random(seed).uniform(0, 1.5)) for seed in range(10)]
    assert 0 < max(written) < IMAGES


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "set", "-w", "w.safetensors", "--csv", "result/scores.csv"],
        ["export", "-w", "w.safetensors", "-o", "result/w.pt2", "--size", "64x64"],
    ],
    ids=lambda words: words[0],
)
def test_other_commands(words: list[str], seed: int, folder: Path) -> None:
    (folder / "set").mkdir(exist_ok=True)
    for name in ("GT", "hazy"):
        (folder / "set" / name).unlink(missing_ok=True)
        (folder / "set" / name).symlink_to(folder / "in")
    (folder / "result").mkdir(exist_ok=True)
    moment = random.Random(seed)
    code, said, _ = interrupted(folder, moment.randrange(1, 1200), moment.uniform(0, 2), [*PROGRAM, *words])
    assert code == STOPPED, said
    assert said in ([], ["stopped\n"])
    assert list((folder / "result").iterdir()) == []
