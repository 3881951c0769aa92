"""Files and words that nobody meant: whatever is in them, a result or a clear error, never a crash or a traceback.

Files of every kind that is read are damaged in all ways that hypothesis thinks of, the same ones in every run.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from mitnet_fast.cli import EXPECTED, app
from mitnet_fast.data import write_image
from mitnet_fast.inference import dehaze_files
from mitnet_fast.models import CheckpointError, DCMPNet, MITNet
from mitnet_fast.training import PRESETS, load_checkpoint
from mitnet_fast.training.checkpoint import save_checkpoint
from mitnet_fast.weights import TRAINING_CHECKPOINT, WeightsError, describe, load_weights, save_weights
from tests.networks import SMALL_DCMPNET

LARGEST = 40_000  # pixels; damaged sizes beyond are refused as the 20000×20000 ones of real files are


def budget(quick: int, whole: int):
    """The number of examples, in `make test` and in `make test-all`."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(whole, marks=pytest.mark.exhaustive)])


def reproducible(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# One step of damage: what, where (a share of the file), with which bytes.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "remove", "repeat", "cut", "number"]),
        st.one_of(st.floats(0, 1), st.floats(0, 0.05)),  # headers decide more than what follows
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, steps: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, value in steps:
        at = int(share * len(content))
        match kind:
            case "flip":
                changed = bytes(a ^ b for a, b in zip(content[at:], value, strict=False))
                content = content[:at] + changed + content[at + len(changed) :]
            case "overwrite":
                content = content[:at] + value + content[at + len(value) :]
            case "insert":
                content = content[:at] + value + content[at:]
            case "remove":
                content = content[:at] + content[at + 4 * value[0] :]
            case "repeat":
                content = content[:at] + content[max(0, at - value[0]) : at] + content[at:]
            case "cut":
                content = content[:at]
            case "number":  # sizes and offsets stand in four bytes, in either order
                extreme = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 20_000, 65_535, 65_536][value[0] % 8]
                order = "<I" if value[0] < 128 else ">I"
                content = content[:at] + struct.pack(order, extreme) + content[at + 4 :]
    return content


def with_valid_checksums(png: bytes) -> bytes:
    """A damaged PNG file whose chunks pass their check, so that what they hold is believed."""
    result, at = png[:8], 8
    while at + 12 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        body = png[at + 4 : at + 8 + length]
        result += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return result + png[at:]


def image_files() -> dict[str, bytes]:
    """Small files of every kind that is read."""
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 256, (13, 17, 3)).astype(np.uint8)
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, file_format: str, **options: object) -> None:
        stream = io.BytesIO()
        image.save(stream, file_format, **options)
        files[name] = stream.getvalue()

    colour, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112] = 6
    add("rgb.png", colour, "PNG", exif=exif)
    add("rgba.png", Image.fromarray(np.dstack([rgb, rgb[..., 0]])), "PNG")
    add("palette.png", colour.quantize(7), "PNG", transparency=2)
    add("grey.png", colour.convert("L"), "PNG")
    add("bits.png", colour.convert("1"), "PNG")
    add("animated.png", colour, "PNG", save_all=True, append_images=[colour.rotate(180)])
    add("photo.jpg", colour, "JPEG", exif=exif)
    add("progressive.jpg", colour.convert("L"), "JPEG", progressive=True)
    add("cmyk.jpg", colour.convert("CMYK"), "JPEG")
    add("plain.tif", colour, "TIFF")
    add("pages.tif", colour, "TIFF", save_all=True, append_images=[colour], compression="tiff_deflate")
    add("lzw.tif", colour.convert("CMYK"), "TIFF", compression="tiff_lzw")
    add("group4.tif", colour.convert("1"), "TIFF", compression="group4")
    add("plain.bmp", colour, "BMP")
    add("palette.bmp", colour.quantize(7), "BMP")
    add("lossless.webp", colour, "WEBP", lossless=True)
    add("animated.webp", colour, "WEBP", save_all=True, append_images=[colour.rotate(180)])
    return files


@budget(110, 6000)
def test_damaged_images(
    examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LARGEST)
    torch.manual_seed(0)
    model, files, out = MITNet(width=1, depth=2).eval(), image_files(), tmp_path / "out"
    for suffix in (".png", ".tif"):
        values = torch.rand(4, 9, 11)
        write_image(tmp_path / f"deep{suffix}", values[:3], values[3:], bits=16)
        files[f"deep{suffix}"] = (tmp_path / f"deep{suffix}").read_bytes()
    outcomes = {"restored": 0, "refused": 0}

    @reproducible(examples)
    @given(name=st.sampled_from(sorted(files)), steps=STEPS, believed=st.booleans())
    def check(name: str, steps: list[tuple[str, float, bytes]], believed: bool) -> None:
        content = damaged(files[name], steps)
        source = tmp_path / name
        source.write_bytes(with_valid_checksums(content) if believed and name.endswith("png") else content)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            (result,) = dehaze_files(model, source, out, overwrite=True).results
        assert [str(warning.message) for warning in warned] == []
        written = [file.name for file in out.iterdir()]
        if result.error:
            assert "Traceback" not in result.error
            assert name in result.error
            assert written == []
            outcomes["refused"] += 1
        else:
            assert written == [name]
            with Image.open(result.output) as image:
                assert image.size == (result.width, result.height)
            result.output.unlink()
            outcomes["restored"] += 1
        assert all("\n" not in note for note in result.notes)

    check()
    assert min(outcomes.values()) > examples / 50, outcomes
    assert "Traceback" not in capfd.readouterr().err  # libtiff says a word of its own


@budget(50, 1000)
def test_damaged_checkpoints(examples: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    last, values = tmp_path / "last.pt", torch.arange(20.0)
    save_checkpoint(tmp_path / "previous.pt", {"position": {"step": 3}})
    save_checkpoint(last, {"position": {"step": 4}, "values": values, "losses": [0.5, None]})
    whole, outcomes = last.read_bytes(), {"read": 0, "refused": 0}

    @reproducible(examples)
    @given(steps=STEPS)
    def check(steps: list[tuple[str, float, bytes]]) -> None:
        last.write_bytes(damaged(whole, steps))
        try:
            content, reason = load_checkpoint(last), ""
        except CheckpointError as error:
            content, reason = None, str(error)
        if content is None:
            assert reason.startswith(f"{last}: ")
            assert f"the newest good checkpoint beside it is {tmp_path / 'previous.pt'} (step 3)" in reason
        else:
            assert (content["position"], content["losses"]) == ({"step": 4}, [0.5, None])
            assert torch.equal(content["values"], values)
        outcomes["refused" if content is None else "read"] += 1

    check()
    assert min(outcomes.values()) > examples / 50, outcomes
    assert capfd.readouterr().err == ""


def json_values() -> st.SearchStrategy:
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**12), 10**12),
        st.sampled_from([0, 1, 2, 3, 20, 300]),
        st.floats(),
        st.text(max_size=5),
    )
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner))


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """A copy of nested JSON with the entry that ``path`` leads to exchanged."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        at = path[0] % len(value)
        return [replaced(entry, path[1:], new) if i == at else entry for i, entry in enumerate(value)]
    at = sorted(value)[path[0] % len(value)]
    return {key: replaced(entry, path[1:], new) if key == at else entry for key, entry in value.items()}


def loaded_or_refused(path: Path) -> tuple[torch.nn.Module | None, dict[str, Any]]:
    """What a file of weights holds, or None where it is refused with its name and a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return load_weights(path)
    except (WeightsError, CheckpointError) as error:
        reason = str(error)
    assert path.name in reason
    assert len(reason) > len(str(path)) + 10
    return None, {}


def weight_files(folder: Path) -> dict[str, bytes]:
    """Small files of every kind of weights that is read."""
    torch.manual_seed(0)
    model = MITNet(width=1, depth=2)
    save_weights(folder / "own.safetensors", model, {"demo": True})
    official = {f"module.{name}": value for name, value in model.to_official().items()}
    torch.save({"state_dict": official}, folder / "official.pt")
    torch.save(official, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    weights = {**describe(model), "state": model.state_dict()}
    torch.save({"format": TRAINING_CHECKPOINT, "weights": weights}, folder / "run.pt")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@budget(50, 2500)
def test_damaged_weights(examples: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "whole").mkdir()
    files = weight_files(tmp_path / "whole")
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load_weights(tmp_path / "whole" / "own.safetensors")[0].restore(image)

    @reproducible(examples)
    @given(name=st.sampled_from(sorted(files)), steps=STEPS)
    def check(name: str, steps: list[tuple[str, float, bytes]]) -> None:
        path = tmp_path / name
        path.write_bytes(damaged(files[name], steps))
        model, card = loaded_or_refused(path)
        if model is None:
            return
        assert card["system"] == "mitnet"
        restored = model.restore(image)
        assert restored.shape == image.shape
        if name in ("official.pt", "run.pt"):  # what is read of files with checksums is what was written
            assert torch.equal(restored, expected)
        assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())

    check()
    assert capfd.readouterr().err == ""


@budget(20, 500)
@pytest.mark.parametrize("kind", ["mitnet", "dcmpnet"])
def test_cards_that_say_anything(kind: str, examples: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MITNet(width=1, depth=2) if kind == "mitnet" else DCMPNet(**SMALL_DCMPNET)
    card, path = {"format": 1, **describe(model)}, tmp_path / "w.safetensors"
    state = {name: value.contiguous() for name, value in model.state_dict().items()}

    @reproducible(examples)
    @given(where=st.lists(st.integers(0, 9), min_size=1, max_size=3), new=json_values(), in_config=st.booleans())
    def check(where: list[int], new: Any, in_config: bool) -> None:
        changed = {**card, "config": replaced(card["config"], where, new)} if in_config else replaced(card, where, new)
        path.write_bytes(save(state, metadata={"mitnet_fast": json.dumps(changed)}))
        loaded, said = loaded_or_refused(path)
        if loaded is not None:
            assert loaded.config == said["config"] == json.loads(json.dumps(loaded.config))
            assert loaded.state_dict().keys() == state.keys()

    check()


def answer(*words: str) -> int:
    """The exit code of a command; no exception but those that are shown in one line."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        if not isinstance(result.exception, EXPECTED):
            raise result.exception
        assert str(result.exception)
        return 2
    return result.exit_code


@budget(20, 500)
def test_configurations_that_say_anything(examples: int, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["train", "mitnet-its", "--show"]).output.encode()
    names = [line.split(":")[0].strip() for line in shown.decode().splitlines()]
    word = st.one_of(st.sampled_from(names), st.text(max_size=6))
    path = tmp_path / "config.yaml"

    @reproducible(examples)
    @given(
        preset=st.sampled_from([*PRESETS, str(path), str(tmp_path)]),
        steps=STEPS,
        sections=st.lists(st.tuples(word, word, st.text(max_size=8) | json_values().map(json.dumps)), max_size=3),
    )
    def check(preset: str, steps: list[tuple[str, float, bytes]], sections: list[tuple[str, str, str]]) -> None:
        path.write_bytes(damaged(shown, steps))
        overrides = [part for a, b, value in sections for part in ("-s", f"{a}.{b}={value}")]
        assert answer("train", preset, "--show", *overrides) in (0, 2)

    check()


@budget(10, 500)
def test_options_that_say_anything(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights("w.safetensors", MITNet(width=1, depth=2))
    Image.fromarray(np.zeros((70, 80, 3), np.uint8)).save("a.png")
    whole = Path("a.png").read_bytes()
    text = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=8)
    options = st.fixed_dictionaries(
        {},
        optional={
            "--tile": st.sampled_from(["auto", "none", "64", "72"]) | text | st.integers().map(str),
            "--overlap": st.integers(-2, 80).map(str) | text,
            "--suffix": text,
            "--extension": st.sampled_from([".png", "JPG", "tiff"]) | text,
            "--device": st.sampled_from(["cpu", "auto"]) | text,
        },
    )

    @reproducible(examples)
    @given(options=options, compare=st.booleans())
    def check(options: dict[str, str], compare: bool) -> None:
        words = [word for option in options.items() for word in option] + ["--compare"] * compare
        code = answer("dehaze", "a.png", "-w", "w.safetensors", "-o", "out", "--overwrite", *words)
        assert code in (0, 1, 2)
        written = list(Path("out").iterdir()) if Path("out").exists() else []
        assert len(written) == (code == 0)
        for file in written:
            with Image.open(file) as image:
                assert image.size == (80, 70)
            file.unlink()
        assert Path("a.png").read_bytes() == whole

    check()
