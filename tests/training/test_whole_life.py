"""A run's whole life, typed as a user types it: begun, killed, resumed by two processes, measured, used, exported.

The photographs and the network are those of ``mitnet-fast demo``; averaged weights, bfloat16, accumulation and
clipping are switched on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from mitnet_fast.data import read_image
from mitnet_fast.demo import RECIPES, run_demo
from mitnet_fast.training import load_checkpoint
from mitnet_fast.weights import load_weights, read_card

from .test_trainer import rows

TINY = ("run.epochs=1", "run.steps_per_epoch=1", "data.batch=2", "data.patch=32", "network.width=4", "network.depth=2")
STEPS = 60
SETTINGS = {
    "network": {"width": 8, "depth": 2},
    "data": {"batch": 4, "repeat": 16, "workers": 1},
    "optimizer": {"clip": 1.0, "accumulate": 2},
    "run": {"epochs": 2, "steps_per_epoch": STEPS // 2, "ema": 0.8, "precision": "bfloat16", "device": "cpu"},
    "validation": {"every": 1},
    "output": {"checkpoint_every": 5, "log_every": 5},
}


def begin(*words: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "mitnet_fast", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def typed(*words: str, processes: int = 1) -> str:
    process = begin(*words, processes=processes)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    return text


@pytest.mark.exhaustive
def test_a_runs_whole_life(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_demo("demo", overrides=TINY, side=96, draws=2, console=Console(file=io.StringIO()))
    photographs, folder = Path("demo/photographs"), Path("runs/life")
    settings = {**RECIPES["mitnet"], **{k: {**RECIPES["mitnet"].get(k, {}), **v} for k, v in SETTINGS.items()}}
    Path("life.yaml").write_text(yaml.safe_dump(settings))
    assert "photographs" in typed("data", "check", str(photographs))

    process = begin("train", "life.yaml", "--data", str(photographs))
    log, deadline = folder / "log.csv", time.monotonic() + 300
    while process.poll() is None and not (log.exists() and len(rows(folder)) > 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, text
    killed = load_checkpoint(folder / "last.pt")["position"]["step"]
    assert 0 < killed < STEPS

    typed("train", "--resume", str(folder), processes=2)
    state = load_checkpoint(folder / "last.pt")
    assert state["position"]["step"] == STEPS
    assert [(start["step"], start["processes"]) for start in json.loads((folder / "versions.json").read_text())] == [
        (0, 1),
        (killed, 2),
    ]
    log = rows(folder)
    assert [int(row["step"]) for row in log] == list(range(5, STEPS + 1, 5))
    assert float(log[-1]["restored"]) < 0.8 * float(log[0]["restored"])
    assert log[-1]["skipped"] == "0"
    assert read_card(folder / "last.safetensors")["training"] == {
        "preset": None,
        "epochs": 2,
        "steps": STEPS,
        "averaged": True,
    }

    best = str(folder / "best.safetensors")
    typed("evaluate", str(photographs), "-w", best, "--protocol", "full-rgb", "--csv", "scores.csv", "--device", "cpu")
    with open("scores.csv", newline="") as file:
        scores = [float(row["full-rgb psnr"]) for row in csv.DictReader(file)]
    assert len(scores) == 4
    validated = max(float(row["psnr"]) for row in rows(folder, "validation.csv"))
    assert sum(scores) / len(scores) == pytest.approx(validated, abs=1e-3)

    hazy = sorted((photographs / "test" / "hazy").iterdir())[0]
    typed("dehaze", str(hazy), "-w", best, "-o", "restored", "--device", "cpu")
    network, _ = load_weights(best)
    image = read_image(hazy).rgb[None]
    with torch.inference_mode():
        expected = network.restore(image).clamp(0, 1)
    assert (read_image(Path("restored") / hazy.name).rgb[None] - expected).abs().max() <= 0.5 / 255 + 1e-6

    height, width = image.shape[2:]
    typed("export", "-w", best, "-o", "life.pt2", "--size", f"{height}x{width}", "--backend", "reference")
    standalone = (
        "import sys, torch; image, expected = torch.load('pair.pt');"
        "restored = torch.export.load('life.pt2').module()(image);"
        "assert 'mitnet_fast' not in sys.modules; print(float((restored.clamp(0, 1) - expected).abs().max()))"
    )
    torch.save((image, expected), "pair.pt")
    shown = subprocess.run([sys.executable, "-c", standalone], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert float(shown.stdout) < 1e-4
