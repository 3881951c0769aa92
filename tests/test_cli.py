"""The command line as users type it: right words work, wrong words are one line and an exit code."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
import yaml
from typer.testing import CliRunner

from mitnet_fast import __version__
from mitnet_fast.cli import app
from mitnet_fast.models import DepthNet
from mitnet_fast.weights import save_weights

COMMANDS = [["data", "check"], ["data", "depth"], *([name] for name in typer.main.get_command(app).commands)]


def run(*words):
    return CliRunner().invoke(app, list(words))


def run_process(*words, **environment):
    command = [sys.executable, "-m", "mitnet_fast", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_version():
    assert run("--version").output.strip() == f"mitnet-fast {__version__}"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_every_option_explains_itself(command):
    answer = run(*command, "--help")
    assert answer.exit_code == 0
    assert "Usage:" in answer.output
    assert command[-1] in run(*command[:-1], "--help").output
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    assert found.help
    assert not [parameter.name for parameter in found.params if not parameter.help]


def test_doctor_says_what_is_here():
    answer = run("doctor")
    assert answer.exit_code == 0
    for word in ("Python", "PyTorch", "processor", "GPU", "Triton", "compiler", "nvcc", "compiled half", "reference"):
        assert word in answer.output


def test_training_configuration_is_shown_whole():
    answer = run("train", "mitnet-its", "--show", "-s", "run.epochs=3", "--data", "somewhere")
    assert answer.exit_code == 0, answer.output
    assert "epochs: 3" in answer.output
    assert "somewhere" in answer.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "mitnet-itss"], "did you mean mitnet-its"),
        (["train", "mitnet-its", "-s", "run.epoch=3"], "run.epoch: no such field"),
        (["train", "mitnet-its", "-s", "run.epochs=many"], "run.epochs: got 'many'"),
        (["train", "mitnet-its", "--data", "missing", "--run", "run"], "missing"),
        (["dehaze", "missing.png", "-w", "missing.pt", "-o", "out"], "missing.pt"),
        (["evaluate", "missing", "-w", "missing.pt"], "missing"),
        (["data", "check", "missing"], "missing"),
        (["train", "--resume", "--show", "--run", "run"], "config.yaml"),
        (["train", "mitnet-its", "--checkpoint", "run/previous.pt"], "--resume"),
        (["verify", "--family", "filters"], "family: got 'filters'"),
        (["verify", "--backend", "gpu"], "backend: got 'gpu'"),
        (["demo", "--system", "other", "-o", "out"], "other"),
    ],
)
def test_wrong_words_are_one_clear_error_without_a_traceback(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run_process(*words)
    assert answer.returncode == 2, answer
    assert message in answer.stderr.replace("\n", "")
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "presets are"),
        (["train", "--resume"], "--run"),
        (["dehaze", "a.png", "-o", "out"], "--weights"),
        (["evaluate"], "folder"),
        (["unknown"], "unknown"),
    ],
)
def test_missing_words_are_named(words, message):
    answer = run(*words)
    assert answer.exit_code == 2
    assert message.lower() in answer.output.lower()


@pytest.mark.parametrize("device", ["mps:x", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device, tmp_path):
    answer = run_process("dehaze", "a.png", "-w", "missing.pt", "-o", str(tmp_path / "out"), "--device", device)
    assert answer.returncode == 2
    assert f"device: got '{device}'" in answer.stderr


@pytest.mark.parametrize("folder", ["2024", "[red]x[/red]", "null", "a: b #c", "long " * 30 + "name"])
def test_shown_configuration_can_be_read_again_whatever_the_folder_is_called(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run("train", "mitnet-its", "--show", "--data", folder)
    assert answer.exit_code == 0, answer.output
    assert yaml.safe_load(answer.output)["data"]["root"] == str(tmp_path / folder)


@pytest.fixture
def started(monkeypatch):
    """What the training was started with, instead of starting it."""
    calls = []

    def train(config, folder, *, resume, changes, **options):
        calls.append((config and config.preset, str(folder), resume and str(resume), changes))
        return SimpleNamespace(finished=True)

    monkeypatch.setattr("mitnet_fast.training.train", train)
    return calls


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["mitnet-its"], ("mitnet-its", "runs/mitnet-its", False, None)),
        (["mitnet-its", "--resume"], (None, "runs/mitnet-its", "True", {"preset": "mitnet-its"})),
        (["--resume", "--run", "kept"], (None, "kept", "True", {})),
        (["--resume", "kept", "-s", "data.workers=2"], (None, "kept", "True", {"data": {"workers": 2}})),
        (["--resume", "kept", "--checkpoint", "kept/previous.pt"], (None, "kept", "kept/previous.pt", {})),
        (["own.yaml", "--resume"], (None, "runs/own", "True", {"system": "mitnet", "run": {"epochs": 9}})),
    ],
)
def test_what_a_run_is_resumed_from(words, call, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "mitnet-its").mkdir()  # a preset's name stays a preset
    (tmp_path / "own.yaml").write_text("{system: mitnet, run: {epochs: 9}}")
    answer = run("train", *words)
    assert answer.exit_code == 0, answer.output
    assert started == [call]


def test_a_run_folder_given_twice(tmp_path):
    answer = run("train", "--resume", str(tmp_path), "--run", "other")
    assert answer.exit_code == 2
    assert "given twice" in answer.output


def test_weights_of_a_depth_network_restore_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights("[/red] depth.safetensors", DepthNet((4, 4, 8, 8), 4), {"data": "[/red]"})
    (tmp_path / "a.png").touch()
    answer = run_process("dehaze", "a.png", "-w", "[/red] depth.safetensors", "-o", "out")
    assert answer.returncode == 2
    assert "data [/red]" in answer.stdout
    assert "model: DepthNet restores no images" in answer.stderr
    assert not (tmp_path / "out").exists()


def test_output_that_the_terminal_cannot_encode():
    answer = run_process("doctor", PYTHONIOENCODING="ascii:strict")
    assert answer.returncode == 0, answer.stderr
    assert "PyTorch" in answer.stdout
