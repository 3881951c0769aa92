"""The training loop: exact resume, run folders, logs, validation, and errors before the first step."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from mitnet_fast.data import write_image
from mitnet_fast.evaluation import Score
from mitnet_fast.models import CheckpointError
from mitnet_fast.training import ConfigError, RunFolderError, TrainingDiverged, load_changes, load_checkpoint, trainer
from mitnet_fast.training.logs import Clock, Display
from mitnet_fast.training.trainer import train
from mitnet_fast.weights import load_weights, read_card

from .samples import PATCH, Samples, small_config

TIMES = ("images_per_second", "data_wait")
# epochs of four steps; everything that has a state is switched on
EVERYTHING = {
    "mitnet": ("run.epochs=3", "schedule.halve_every=1", "run.ema=0.9", "optimizer.clip=1", "output.log_every=3"),
    "dcmpnet": ("run.epochs=2", "run.ema=0.9", "run.precision=bfloat16", "output.log_every=3"),
}
EPOCHS = {"mitnet": 3, "dcmpnet": 2}


def run(config, folder, samples=None, **arguments):
    datasets = arguments.pop("datasets", None) or (samples or Samples(8), Samples(2, side=24))
    return train(config, folder, datasets=datasets, progress=False, **arguments)


def rows(folder: Path, name: str = "log.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def differences(a, b, where: str = "") -> list[str]:
    """Where two nested states differ in a single bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for k in range(len(a)) for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [where]


def assert_same_run(actual: Path, expected: Path) -> None:
    assert differences(load_checkpoint(actual / "last.pt"), load_checkpoint(expected / "last.pt")) == []
    assert differences(load_checkpoint(actual / "best.pt"), load_checkpoint(expected / "best.pt")) == []
    for name in ("log.csv", "validation.csv"):
        assert rows(actual, name) == rows(expected, name)
    for name in ("last.safetensors", "best.safetensors"):
        assert (actual / name).read_bytes() == (expected / name).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Both systems trained without a stop."""
    folders = {}
    for system, overrides in EVERYTHING.items():
        folders[system] = tmp_path_factory.mktemp("uninterrupted") / system
        result = run(small_config(system, *overrides), folders[system])
        assert (result.finished, result.step, result.epoch) == (True, 4 * EPOCHS[system], EPOCHS[system])
    return folders


class Killed(BaseException):
    """Ends a run as a kill would: nothing is written after it."""


@pytest.mark.parametrize("system", EVERYTHING)
@pytest.mark.parametrize("stop", [4, 5])  # at the end of an epoch; within one
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(system, stop, uninterrupted, tmp_path):
    config = small_config(system, *EVERYTHING[system])
    result = run(config, tmp_path, max_steps=stop)
    assert (result.finished, result.step, result.epoch) == (False, stop, stop // 4)
    torch.rand(7)  # the generators are elsewhere when the run is resumed
    result = run(None, tmp_path, resume=True)
    assert (result.finished, result.step, result.epoch) == (True, 4 * EPOCHS[system], EPOCHS[system])
    assert_same_run(tmp_path, uninterrupted[system])


def test_a_run_that_is_killed_anywhere_goes_on_from_its_last_checkpoint(uninterrupted, tmp_path, monkeypatch):
    config = small_config("mitnet", *EVERYTHING["mitnet"], "output.checkpoint_every=2")
    places = [
        ("training_step", 3),  # the third step of the first start: after the checkpoint of step 2
        ("_validate", 0),
        ("save_weights", 1),  # the state is there, its weights are not
        ("training_step", 2),
        ("log", 1),
    ]

    def kill_at(monkeypatch, place, count):
        calls = []

        def counted(function):
            def wrapper(*arguments, **keywords):
                calls.append(place)
                if len(calls) > count:
                    raise Killed
                return function(*arguments, **keywords)

            return wrapper

        owner, name = {
            "training_step": (trainer.build_system.__globals__["MITNetSystem"], "training_step"),
            "_validate": (trainer._Trainer, "_validate"),
            "save_weights": (trainer, "save_weights"),
            "log": (trainer.CsvLog, "write"),
        }[place]
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

    resume = False
    for place, count in places:
        with monkeypatch.context() as patched:
            kill_at(patched, place, count)
            with pytest.raises(Killed):
                run(config, tmp_path, resume=resume)
        resume = True
    (tmp_path / ".0123.tmp").write_bytes(b"what a kill leaves while a file is written")
    assert run(config, tmp_path, resume=True).finished
    expected = load_checkpoint(uninterrupted["mitnet"] / "last.pt")
    actual = load_checkpoint(tmp_path / "last.pt")
    assert differences(actual, expected) == ["/config/output/checkpoint_every"]
    assert rows(tmp_path) == rows(uninterrupted["mitnet"])
    assert rows(tmp_path, "validation.csv") == rows(uninterrupted["mitnet"], "validation.csv")
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(json.loads((tmp_path / "versions.json").read_text())) == 6


def test_workers_do_not_change_the_result(uninterrupted, tmp_path):
    config = small_config("mitnet", *EVERYTHING["mitnet"], "data.workers=1")
    run(config, tmp_path, max_steps=6)
    run(config, tmp_path, resume=True)
    actual, expected = (load_checkpoint(folder / "last.pt") for folder in (tmp_path, uninterrupted["mitnet"]))
    assert differences(actual, expected) == ["/config/data/workers"]


def test_ctrl_c_finishes_the_step_and_the_run_can_go_on(uninterrupted, tmp_path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    asked = []

    def interrupt(index):
        asked.append(index)
        if len(asked) == 12:  # one item is looked at before the training; the others come in pairs: the sixth step
            os.kill(os.getpid(), signal.SIGINT)

    console = Console(record=True, width=200, file=io.StringIO())
    config = small_config("mitnet", *EVERYTHING["mitnet"])
    datasets = (Samples(8, on_item=interrupt), Samples(2, side=24))
    result = train(config, tmp_path, datasets=datasets, console=console)
    assert (result.finished, result.step, result.epoch) == (False, 6, 1)
    assert (
        f"stopped after step 6 of 12; to go on, train again with resume=True and run_dir='{tmp_path}'"
        in console.export_text()
    )
    assert load_checkpoint(tmp_path / "last.pt")["position"] == {
        "epoch": 1,
        "step_in_epoch": 2,
        "step": 6,
        "samples": 8,
    }
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    run(config, tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted["mitnet"])


def test_ctrl_c_during_the_validation_repeats_the_validation(uninterrupted, tmp_path):
    def interrupt(index):
        if index == 1:  # the second image of the first validation
            os.kill(os.getpid(), signal.SIGTERM)

    config = small_config("mitnet", *EVERYTHING["mitnet"])
    result = run(config, tmp_path, datasets=(Samples(8), Samples(2, side=24, on_item=interrupt)))
    assert (result.finished, result.step, result.epoch, result.scores) == (False, 4, 0, None)
    run(config, tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted["mitnet"])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    asked = []

    def interrupt(index):
        asked.append(index)
        if len(asked) > 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(small_config("mitnet"), tmp_path, Samples(8, on_item=interrupt))
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 0


def test_the_run_folder_says_what_was_done(uninterrupted):
    folder = uninterrupted["mitnet"]
    config = small_config("mitnet", *EVERYTHING["mitnet"])
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.model_dump(mode="json")
    (start,) = json.loads((folder / "versions.json").read_text())
    assert start["torch"] == torch.__version__
    assert start["step"] == 0
    log = rows(folder)
    assert [int(row["step"]) for row in log] == [3, 4, 6, 8, 9, 12]
    assert [int(row["epoch"]) for row in log] == [1, 1, 2, 2, 3, 3]
    assert [float(row["learning_rate"]) for row in log] == [2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 5e-5]
    assert all(math.isfinite(float(value)) for row in log for value in row.values())
    terms = ("total", "stage1", "restored", "stage1_amplitude", "restored_spectrum", "mutual_information")
    assert set(terms) < set(log[0])
    assert [(int(row["epoch"]), int(row["step"])) for row in rows(folder, "validation.csv")] == [
        (1, 4),
        (2, 8),
        (3, 12),
    ]
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml",
        "versions.json",
        "log.csv",
        "validation.csv",
        "last.pt",
        "previous.pt",
        "best.pt",
        "last.safetensors",
        "best.safetensors",
    }


def test_the_log_holds_means_over_its_steps(tmp_path):
    for name, every in (("each", 1), ("pairs", 2)):
        run(small_config("mitnet", "run.epochs=1", f"output.log_every={every}"), tmp_path / name)
    each, pairs = ([float(row["restored"]) for row in rows(tmp_path / name)] for name in ("each", "pairs"))
    assert len(each) == 4
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-5)


def test_weights_carry_their_card_and_restore_as_the_averaged_network(uninterrupted):
    folder = uninterrupted["dcmpnet"]
    model, card = load_weights(folder / "last.safetensors")
    assert card["training"] == {"preset": "dcmpnet-its", "epochs": 2, "steps": 8, "averaged": True}
    last = rows(folder, "validation.csv")[-1]
    assert card["scores"]["dcmp-test"]["psnr"] == pytest.approx(float(last["psnr"]), rel=1e-6)
    state = load_checkpoint(folder / "last.pt")
    average = {name: value for name, value in state["system"]["average"].items() if name.startswith("module.")}
    assert differences({f"module.{name}": value for name, value in model.state_dict().items()}, average) == []
    from_state, _ = load_weights(folder / "last.pt")
    image = torch.rand(1, 3, 30, 33)
    assert torch.equal(model.restore(image), from_state.restore(image))


def test_the_caller_adds_to_the_card(tmp_path):
    config = small_config("mitnet", "validation.every=0")
    run(config, tmp_path, max_steps=1, card={"demo": True, "data": "three photographs"})
    run(config, tmp_path, max_steps=2, resume=True)
    card = read_card(tmp_path / "last.safetensors")
    assert (card["demo"], card["data"], card["training"]["steps"]) == (True, "three photographs", 2)


def test_the_best_validation_is_kept(tmp_path, monkeypatch):
    psnrs = iter([20.0, 24.0, 22.0])
    monkeypatch.setattr(trainer, "score", lambda *_: Score(20.0, 0.5))
    monkeypatch.setattr(trainer._Trainer, "_validate", lambda self: {"psnr": next(psnrs), "ssim": 0.5, "images": 2})
    result = run(small_config("mitnet", "run.epochs=3", "run.steps_per_epoch=1"), tmp_path)
    assert result.best == {"epoch": 2, "psnr": 24.0, "ssim": 0.5, "images": 2}
    assert result.scores["psnr"] == 22.0
    assert load_checkpoint(tmp_path / "best.pt")["position"] == {
        "epoch": 2,
        "step_in_epoch": 0,
        "step": 2,
        "samples": 8,
    }
    assert read_card(result.best_weights)["scores"]["mitnet-crop16"]["psnr"] == 24.0
    assert read_card(result.weights)["scores"]["mitnet-crop16"]["psnr"] == 22.0


def test_the_validation_scores_what_restore_gives_under_the_protocol(tmp_path):
    validation = Samples(3, side=40)
    config = small_config("mitnet", "run.epochs=1", "run.steps_per_epoch=1", "validation.images=2")
    result = run(config, tmp_path, datasets=(Samples(8), validation))
    model, _ = load_weights(result.weights)
    expected = []
    for index in range(2):
        hazy, clear = (validation[index][name][:, :32, :32] for name in ("hazy", "clear"))
        restored = (model.restore(hazy[None])[0].clamp(0, 1) * 255).round()
        error = ((restored - (clear * 255).round()) ** 2).mean().item()
        expected.append(10 * math.log10(255**2 / error))
    assert result.scores["images"] == 2
    assert result.scores["psnr"] == pytest.approx(sum(expected) / 2, abs=1e-4)


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (2, [2, 3])])
def test_validation_and_kept_checkpoints_come_when_asked_for(every, epochs, tmp_path):
    config = small_config(
        "mitnet", "run.epochs=3", "run.steps_per_epoch=1", f"validation.every={every}", "output.keep_every=2"
    )
    result = run(config, tmp_path)
    validated = rows(tmp_path, "validation.csv") if every else []
    assert [int(row["epoch"]) for row in validated] == epochs
    assert (result.scores is None, result.best_weights is None) == (not epochs, not epochs)
    assert [file.name for file in tmp_path.glob("epoch-*.pt")] == ["epoch-00002.pt"]
    assert load_checkpoint(tmp_path / "epoch-00002.pt")["position"]["epoch"] == 2


def test_steps_that_are_not_finite_are_counted_and_left_out_of_the_means(tmp_path):
    class Broken(Samples):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "hazy": item["hazy"] * math.nan} if index == 5 else item

    result = run(
        small_config("mitnet", "run.epochs=1", "output.log_every=4", "validation.every=0"), tmp_path, Broken(8)
    )
    (row,) = rows(tmp_path)
    assert (result.skipped, result.step, row["skipped"]) == (1, 4, "1")
    assert math.isfinite(float(row["total"]))


def test_a_run_that_diverges_saves_its_weights_and_says_what_to_do(tmp_path):
    class Broken(Samples):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "hazy": item["hazy"] * math.nan} if self.epoch == 1 else item

    config = small_config("mitnet", "run.epochs=2", "run.max_nonfinite=2", "validation.every=0")
    with pytest.raises(TrainingDiverged) as error:
        run(config, tmp_path, Broken(8))
    for part in ("2 steps in a row", str(tmp_path / "last.safetensors"), "run.weights"):
        assert part in str(error.value)
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 5
    model, _ = load_weights(tmp_path / "last.safetensors")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_waiting_for_data_is_measured(tmp_path):
    config = small_config("mitnet", "validation.every=0", "output.log_every=1")
    slow = run(config, tmp_path / "slow", Samples(8, on_item=lambda _: time.sleep(0.3)), max_steps=2)
    assert slow.data_wait > 0.5
    assert slow.images_per_second < 2 / 0.6
    with (tmp_path / "slow" / "log.csv").open(newline="") as file:
        logged = [float(row["data_wait"]) for row in csv.DictReader(file)]
    assert min(logged) > 0.3
    assert max(logged) < 1


def test_the_progress_bar_shows_losses_speed_and_what_waits(tmp_path):
    console = Console(record=True, force_terminal=True, width=120, file=io.StringIO())
    config = small_config("mitnet", "run.epochs=2", "run.steps_per_epoch=2")
    train(config, tmp_path, datasets=(Samples(8), Samples(1)), console=console)
    text = console.export_text()
    for part in ("epoch 2/2", "4/4", "total 0.", "restored 0.", "images/s", "epoch 1: PSNR", "dB, SSIM", "(best)"):
        assert part in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_progress_bar_fits_the_terminal(width):
    console = Console(record=True, width=width, file=io.StringIO())
    clock = Clock()
    clock.add(images=8, seconds=2.0, waited=0.5)
    display = Display(console, True, steps=1_748_000, done=0, epochs=1000)
    display.update(1_234_567, 999, {"total": 0.123456, "restored": 0.0123456}, clock, skipped=12)
    console.print(display.progress.get_renderable())
    (text,) = console.export_text().splitlines()
    assert text.startswith("epoch 1000/1000 ━")
    assert "1234567/1748000" in text
    assert "…" not in text
    assert len(text) <= width
    shown = [part in text for part in ("total 0.1235", "12 skipped", "25% waiting for data", "4 images/s", "restored")]
    assert shown == {60: [False] * 5, 80: [True, True, False, False, False], 120: [True] * 4 + [False]}[width]


def test_a_run_ends_with_its_account(tmp_path):
    class Broken(Samples):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "hazy": item["hazy"] * math.nan} if index == 5 else item

    console = Console(record=True, width=200, file=io.StringIO())
    config = small_config("mitnet", "run.epochs=1", "validation.every=0")
    train(config, tmp_path, datasets=(Broken(8), None), console=console)
    text = console.export_text()
    for part in (
        "4 steps (1 skipped: not finite), ",
        " images/s, ",
        "% of the time waiting for data; weights: ",
        str(tmp_path / "last.safetensors"),
    ):
        assert part in text


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    config = small_config("mitnet", "validation.every=0", "run.seed=1")
    run(config, tmp_path, max_steps=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match="exists and is not empty; resume the run it holds, overwrite it"):
        run(config, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "epoch-00001.pt").write_bytes(b"of the old run")
    run(small_config("mitnet", "validation.every=0", "run.seed=2"), tmp_path, overwrite=True, max_steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "epoch-00001.pt").exists()
    assert not (tmp_path / "log.csv").exists()  # one step, and a row every two
    assert load_checkpoint(tmp_path / "last.pt")["config"]["run"]["seed"] == 2
    with pytest.raises(RunFolderError, match="either resumed or overwritten"):
        run(None, tmp_path, resume=True, overwrite=True)


def test_resume_needs_a_run(tmp_path):
    config = small_config("mitnet")
    with pytest.raises(RunFolderError, match="there is no run to resume"):
        run(config, tmp_path / "nothing", resume=True)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        run(config, tmp_path / "nothing", resume=tmp_path / "missing.pt")
    with pytest.raises(ConfigError, match="only a resumed run can do without"):
        run(None, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_works(tmp_path):
    config = small_config("mitnet", "validation.every=0", "run.epochs=1")
    run(config, tmp_path, max_steps=1)
    run(config, tmp_path, max_steps=2, resume=True)
    last = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(last[:-100])
    with pytest.raises(CheckpointError, match=r"last\.pt: cut off.*newest good .*previous\.pt \(step 1\)"):
        run(config, tmp_path, resume=True)
    run(config, tmp_path, max_steps=2, resume=tmp_path / "previous.pt")
    assert (tmp_path / "last.pt").read_bytes() == last


def test_a_checkpoint_can_be_continued_in_a_folder_of_its_own_only(tmp_path):
    config = small_config("mitnet", "validation.every=0", "run.epochs=1")
    for name in ("a", "b"):
        run(config, tmp_path / name, max_steps=2)
    result = run(config, tmp_path / "c", resume=tmp_path / "a" / "last.pt")
    assert (result.finished, result.step) == (True, 4)
    assert [row["step"] for row in rows(tmp_path / "c")] == ["4"]
    with pytest.raises(RunFolderError, match="holds another run than the checkpoint"):
        run(config, tmp_path / "b", resume=tmp_path / "a" / "last.pt")


def test_a_resumed_run_keeps_what_its_result_depends_on(tmp_path):
    base = ("validation.every=0", "run.epochs=1")
    run(small_config("mitnet", *base), tmp_path, max_steps=1)
    changed = small_config("mitnet", *base, "optimizer.lr=1e-3", "data.batch=4", "output.log_every=7")
    with pytest.raises(ConfigError) as error:
        run(changed, tmp_path, resume=True)
    assert str(error.value).splitlines() == [
        "a resumed run cannot change",
        "data.batch: 2 in the checkpoint, 4 now",
        "optimizer.lr: 0.0002 in the checkpoint, 0.001 now",
    ]
    with pytest.raises(ConfigError, match="has 6 samples, the run to resume was trained on 8"):
        run(None, tmp_path, Samples(6), resume=True)
    longer = small_config("mitnet", *base, "run.epochs=2", "output.log_every=4")
    assert run(longer, tmp_path, resume=True).step == 8
    assert "epochs: 2" in (tmp_path / "config.yaml").read_text()


def test_a_cosine_cannot_be_made_longer(tmp_path):
    run(small_config("dcmpnet", "validation.every=0", "run.epochs=2"), tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"run\.epochs: 2 in the checkpoint, 3 now"):
        run(small_config("dcmpnet", "validation.every=0", "run.epochs=3"), tmp_path, resume=True)


def test_resuming_a_finished_run_does_nothing(uninterrupted):
    before = (uninterrupted["mitnet"] / "last.pt").read_bytes()
    result = run(None, uninterrupted["mitnet"], resume=True)
    assert (result.finished, result.step) == (True, 12)
    assert (uninterrupted["mitnet"] / "last.pt").read_bytes() == before


class Wrong(Samples):
    """Items with one entry changed."""

    def __init__(self, name, value):
        super().__init__(8)
        self.name = name
        self.value = value

    def __getitem__(self, index):
        item = {**super().__getitem__(index), self.name: self.value}
        return {name: value for name, value in item.items() if value is not None}


ZEROS = torch.zeros(3, PATCH, PATCH)


@pytest.mark.parametrize(
    ("system", "overrides", "samples", "message"),
    [
        ("dcmpnet", (), Samples(8, depth=False), "an item has hazy, clear, name, but no depth .data.depth=none"),
        ("mitnet", (), Wrong("clear", None), "the training set: an item has hazy, name, depth, but no clear"),
        (
            "mitnet",
            (),
            Samples(8, side=40),
            r"hazy of an item is torch.float32 \[3, 40, 40\], expected .*\[3, 32, 32\]",
        ),
        ("mitnet", (), Wrong("hazy", ZEROS.double()), "hazy of an item is torch.float64"),
        ("mitnet", (), Wrong("hazy", ZEROS.numpy()), "hazy of an item is ndarray"),
        ("mitnet", (), Wrong("clear", 255 + ZEROS), r"clear of its first item goes from 255 to 255, expected \[0, 1\]"),
        ("mitnet", (), Wrong("hazy", math.nan * ZEROS), "hazy of its first item goes from nan to nan"),
        ("dcmpnet", (), Wrong("depth", ZEROS), r"depth of an item is torch.float32 \[3, 32, 32\], expected .*\[1, 32"),
        ("mitnet", (), Samples(1), "needs 2 samples, the training set has 1"),
        ("mitnet", ("run.steps_per_epoch=5",), Samples(8), "needs 10 samples, the training set has 8"),
        ("mitnet", ("validation.protocol=full",), Samples(8), "validation.protocol: got 'full', allowed are full-rgb"),
        ("dcmpnet", ("loss.contrastive_weight=1", "loss.vgg_weights=/no/vgg.pth"), Samples(8), "/no/vgg.pth"),
        ("mitnet", ("run.weights=/no/weights.pt",), Samples(8), "/no/weights.pt"),
        pytest.param(
            "mitnet",
            (f"run.device=cuda:{torch.cuda.device_count()}",),
            Samples(8),
            f"run.device: got cuda:{torch.cuda.device_count()}, but PyTorch sees {torch.cuda.device_count()} GPUs",
            id="device",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_written(system, overrides, samples, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(small_config(system, *overrides), tmp_path / "run", samples)
    assert not (tmp_path / "run").exists()


def test_the_validation_set_is_checked_before_anything_is_written(tmp_path):
    for validation, message in (
        (Samples(2, side=9), "full-rgb|mitnet-crop16"),
        (Samples(0), "the validation set is empty"),
        (Wrong("clear", None), "the validation set: an item has hazy, name, depth, but no clear"),
    ):
        with pytest.raises(ValueError, match=message):
            run(small_config("mitnet"), tmp_path / "run", datasets=(Samples(8), validation))
        assert not (tmp_path / "run").exists()


def test_folders_that_are_not_set_are_asked_for(tmp_path):
    for system, overrides, message in (
        ("mitnet", (), r"data\.root: not set"),
        ("dcmpnet", (f"data.root={tmp_path}",), r"data\.depth: not set; .* or none"),
        ("mitnet", (f"data.root={tmp_path / 'missing'}",), "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_config(system, *overrides), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


@pytest.fixture
def images(tmp_path):
    """A set on disk: four training pairs, one test pair, and depth maps."""
    samples = Samples(5, side=48)
    for index in range(5):
        split = "test" if index == 4 else "train"
        for folder, name in (("hazy", "hazy"), ("GT", "clear")):
            (tmp_path / "set" / split / folder).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "set" / split / folder / f"{index}.png", samples[index][name])
    return tmp_path / "set"


def test_training_on_a_folder(images, tmp_path):
    overrides = (f"data.root={images}", "data.repeat=3", "data.workers=1")
    result = train(small_config("mitnet", "run.epochs=1", *overrides), tmp_path / "run", progress=False)
    assert (result.finished, result.step, result.scores["images"]) == (True, 6, 1)
    assert read_card(result.weights)["data"] == "set"


def test_training_images_are_never_scored_unnoticed(images, tmp_path):
    flat = images / "train"  # without splits: the whole of it is training and test set alike
    for root, overrides, message in (
        (flat, (), "no test split, its images are those of training; name another folder"),
        (images, (f"data.validation_root={tmp_path / 'missing'}",), r"(?s)validation: .*missing.*validation\.every=0"),
    ):
        config = small_config("mitnet", f"data.root={root}", *overrides)
        with pytest.raises(ConfigError, match=message):
            train(config, tmp_path / "run", progress=False)
    config = small_config("mitnet", f"data.root={flat}", f"data.validation_root={images}", "run.epochs=1")
    assert train(config, tmp_path / "run", progress=False).scores["images"] == 1


def test_a_resumed_run_needs_nothing_typed_again(images, tmp_path):
    flat = images / "train"
    overrides = (f"data.root={flat}", f"data.validation_root={images}", "run.epochs=2")
    train(small_config("mitnet", *overrides), tmp_path / "run", progress=False, max_steps=1)
    changes = load_changes("mitnet-its", ["data.workers=1"])
    result = train(None, tmp_path / "run", resume=True, changes=changes, progress=False)
    assert (result.finished, result.scores["images"]) == (True, 1)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert (saved["workers"], saved["root"], saved["validation_root"]) == (1, str(flat), str(images))
    for changes, message in (
        ({"preset": "dcmpnet-its"}, "preset: 'mitnet-its' in the checkpoint, 'dcmpnet-its' now"),
        ({"optimizer": {"lr": 1.0}}, r"optimizer\.lr: 0.0002 in the checkpoint, 1.0 now"),
        ({"optimizer": {"rate": 1.0}}, r"optimizer\.rate: no such field"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(None, tmp_path / "run", resume=True, changes=changes, progress=False)
    with pytest.raises(ConfigError, match="changes: they are made to the configuration of a resumed run"):
        train(small_config("mitnet"), tmp_path / "other", changes={"run": {"epochs": 3}}, progress=False)


def test_curves_are_written_for_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    config = small_config("mitnet", "run.epochs=1", "output.tensorboard=true")
    result = run(config, tmp_path, max_steps=2)
    run(config, tmp_path, resume=True)
    folder = str(tmp_path / "tensorboard")
    assert [entry for entry in written if entry in ((folder, 1), (folder, 3), "closed")] == [
        (folder, 1),
        "closed",
        (folder, 3),
        "closed",
    ]
    logged = {(name, step): value for name, value, step in (entry for entry in written if len(entry) == 3)}
    for row in rows(tmp_path):
        assert logged["train/total", int(row["step"])] == pytest.approx(float(row["total"]), rel=1e-6)
    (validated,) = rows(tmp_path, "validation.csv")
    assert logged["validation/psnr", 4] == pytest.approx(float(validated["psnr"]), rel=1e-6)
    assert result.step == 2


def test_tensorboard_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"output\.tensorboard: needs the package tensorboard \(pip install"):
        run(small_config("mitnet", "output.tensorboard=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
