"""The guides: commands parse, cheap blocks run, names and links exist, quoted messages are those of the code."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import mitnet_fast
from mitnet_fast.cli import app
from mitnet_fast.models import MITNet
from mitnet_fast.training import PRESETS, load_config
from mitnet_fast.weights import save_weights

ROOT = Path(mitnet_fast.__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*GUIDES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
WHOLE_PACKAGES = ("ops", "modules", "models", "losses", "data", "training")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Info string and content of every fenced block."""
    return [(match["info"], match["body"]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[list[str]]:
    """Words of every ``mitnet-fast`` command in blocks and in `code`, without comments."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    lines = [line for _, body in blocks(page) for line in body.splitlines()] + [
        " ".join(code.split()) for code in inline
    ]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(("mitnet-fast ", "torchrun "))]
    return [each[each.index("mitnet_fast") + 1 :] if each[0] == "torchrun" else each[1:] for each in words]


def parse(words: list[str]) -> dict[str, object]:
    """Parameters of a command line as the command would get them; a wrong one raises."""
    command, names = typer.main.get_command(app), []
    while hasattr(command, "commands"):
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(" ".join(names), list(words)).params


ALL_COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guides' words stand for, small."""
    generator = np.random.default_rng(0)

    def image(path: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (72, 80, 3)).astype(np.uint8)).save(tmp_path / path)

    for split, names in (("train", "abcdef"), ("test", "g")):
        for name in names:
            for folder in ("GT", "hazy"):
                image(f"ITS/{split}/{folder}/{name}.png")
    image("photo.jpg")
    image("photos/one.png")
    image("photos/below/two.png")
    image("demo/photographs/test/hazy/one.png")
    torch.manual_seed(0)
    for file in ("weights.safetensors", "demo/mitnet-demo.safetensors"):
        save_weights(tmp_path / file, MITNet(width=2, depth=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any("run" in info for info, _ in blocks(page))], ids=str)
def test_blocks_that_are_marked_run(page: Path, sandbox: Path) -> None:
    for info, body in blocks(page):
        kind, *options = info.split() or [""]
        for option in options:
            if option.startswith("file="):
                Path(option.removeprefix("file=")).write_text(body, encoding="utf-8")
        if "run" not in options:
            continue
        if kind == "python":
            exec(compile(body, f"{page.name}: {body.splitlines()[0]}", "exec"), {"__name__": "guide"})
            continue
        assert kind == "sh"
        for line in body.splitlines():
            program, *words = shlex.split(line)
            assert program == "mitnet-fast", line
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (line, result.output, result.exception)


def test_what_the_guides_promise_is_there_afterwards(sandbox: Path) -> None:
    test_blocks_that_are_marked_run(ROOT / "docs" / "dehaze.md", sandbox)
    assert sorted(path.name for path in (sandbox / "dehazed").rglob("*.*")) == [
        "one.png",
        "one_clear.png",
        "photo.jpg",
        "two_clear.png",
    ]
    assert Image.open(sandbox / "restored.png").size == (80, 72)
    test_blocks_that_are_marked_run(ROOT / "docs" / "train.md", sandbox)
    table = (ROOT / "docs" / "train.md").read_text(encoding="utf-8").partition("### What a run leaves")[2]
    for name in re.findall(r"`([a-z]+\.[a-z]+)`", table.partition("Ctrl-C")[0]):
        assert (sandbox / "runs" / "try" / name).is_file(), name


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=[f"{page}: {' '.join(w)}" for page, w in ALL_COMMANDS])
def test_commands_parse(page: str, words: list[str]) -> None:
    if words[-1] == "…" or "PRESET" in words:
        words = ["mitnet-its" if word == "PRESET" else word for word in words if word != "…"]
    parameters = parse(words)
    overrides = parameters.get("override") or []
    if parameters.get("preset") in PRESETS:
        load_config(parameters["preset"], overrides)
    else:
        assert not overrides


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for override in re.findall(r"(?:-s |`)(?!section\.field)([a-z_]+\.\w+=[^\s`]+)", text):
        of_dcmpnet = override.startswith(("data.depth", "loss.vgg", "loss.contrastive"))
        load_config("dcmpnet-its" if of_dcmpnet else "mitnet-its", [override])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    for file in re.findall(r"`((?:mitnet_fast|benchmarks|tests|csrc|triton_kernels)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file


def test_commands_without_a_guide() -> None:
    group = typer.main.get_command(app)
    named = {words[0] for _, words in ALL_COMMANDS}
    assert set(group.commands) - named <= {"demo"}  # `make demo`
    assert {words[1] for _, words in ALL_COMMANDS if words[0] == "data"} == set(group.commands["data"].commands)


def test_quoted_messages_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mitnet_fast").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)
    text = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = [phrase for bold in re.findall(r"\*\*(.+?)\*\*", text) for phrase in re.findall('"([^"]+)"', bold)]
    assert len(quoted) > 8
    for phrase in quoted:
        assert phrase in source, phrase


def test_the_index_has_every_public_name_and_no_other() -> None:
    sections = re.split(
        r"^## `(mitnet_fast\.\w+)`$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M
    )
    listed = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert {f"mitnet_fast.{package}" for package in WHOLE_PACKAGES} <= set(listed)
    for name, text in listed.items():
        module = importlib.import_module(name)
        rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
        names = {row[0] for row in rows}
        assert len(rows) == len(names)
        if name.rpartition(".")[2] in WHOLE_PACKAGES:
            assert names == set(module.__all__), name
        assert all(hasattr(module, each) for each in names), name
