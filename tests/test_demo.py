"""The demo, small: what it writes, that its numbers are those of its files, and that held-out means held out."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio

from mitnet_fast import demo
from mitnet_fast.data import PairedImages, check, read_image
from mitnet_fast.data.photographs import HazyPhotographs, photograph
from mitnet_fast.data.haze import synthesise_haze
from mitnet_fast.evaluation import evaluate, score
from mitnet_fast.weights import load_weights, read_card

SMALL = {
    "mitnet": ("network.width=4", "run.epochs=2", "run.steps_per_epoch=2", "data.batch=2", "data.patch=32"),
    "dcmpnet": ("run.epochs=1", "run.steps_per_epoch=2", "data.batch=2", "data.patch=32"),
}
SIDE, DRAWS = 64, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    seen = []
    original = HazyPhotographs.__getitem__

    def spy(self, index):
        item = original(self, index)
        seen.append(item["name"])
        return item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HazyPhotographs, "__getitem__", spy)
        result = demo.run_demo(folder, overrides=SMALL["mitnet"], side=SIDE, draws=DRAWS, console=console)
    return folder, result, console.export_text(), seen
