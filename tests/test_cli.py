"""The command line as users type it: right words work, wrong words are one line and an exit code."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mitnet_fast import __version__
from mitnet_fast.cli import app

COMMANDS = ["doctor", "demo", "train", "dehaze", "evaluate", "verify", "data"]


def run(*words):
    return CliRunner().invoke(app, list(words))


def run_process(*words):
    return subprocess.run([sys.executable, "-m", "mitnet_fast", *words], capture_output=True, text=True)


def test_version():
    assert run("--version").output.strip() == f"mitnet-fast {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    answer = run(command, "--help")
    assert answer.exit_code == 0
    assert "Usage:" in answer.output
    assert command in run("--help").output


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


def test_a_device_that_is_not_there(tmp_path):
    answer = run_process("dehaze", "a.png", "-w", "missing.pt", "-o", str(tmp_path / "out"), "--device", "mps:x")
    assert answer.returncode == 2
    assert "device: got 'mps:x'" in answer.stderr
