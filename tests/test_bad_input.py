"""Bad files and words on the command line: each a clear line and an exit code, the other files restored."""

from __future__ import annotations

import os
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mitnet_fast.cli import EXPECTED, app
from mitnet_fast.data import PairedImages
from mitnet_fast.data.depth import DepthMap, read_depth
from mitnet_fast.data.images import ImageError
from mitnet_fast.models import MITNet
from mitnet_fast.weights import save_weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights, a good image, and the command's width set so that no line is broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mitnet_fast.cli.console._width", 400)
    torch.manual_seed(0)
    save_weights("w.safetensors", MITNet(width=1, depth=2), {"demo": True})
    Path("in").mkdir()
    Image.fromarray(picture()).save("in/good.png")
    return tmp_path


def picture(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def dehaze(*words: str) -> tuple[int, str]:
    return command("dehaze", *words, "-w", "w.safetensors", "-o", "out", "--device", "cpu")


def command(*words: str) -> tuple[int, str]:
    """Exit code and what is said, as the command line shows it."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.output
    assert isinstance(result.exception, EXPECTED), result.exception
    return 2, f"{result.output}error: {result.exception}"


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def outputs() -> list[str]:
    return sorted(os.listdir("out")) if os.path.exists("out") else []


def png_header(width: int, height: int) -> bytes:
    """A PNG file of that size, with no more than a row of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3 * width + 1)))


def test_every_kind_of_bad_file_is_one_clear_line(folder: Path) -> None:
    whole = Path("in/good.png").read_bytes()
    Image.fromarray(picture()).save("in/photo.jpg")
    jpeg = Path("in/photo.jpg").read_bytes()
    bad = {
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"no image at all", "not an image; PNG, JPEG, TIFF, BMP and WebP can be read"),
        "huge.png": (png_header(20_000, 20_000), "too large, refused before decoding"),
        "animated.gif.png": (b"GIF89a" + bytes(20), "not an image"),
    }
    for name, (content, _) in bad.items():
        Path("in", name).write_bytes(content)
    code, said = dehaze("in")
    assert code == 1
    assert "2 of 8 files" in said
    assert "Traceback" not in said
    for name, (_, words) in bad.items():
        (line,) = (line for line in said.splitlines() if f"in/{name} " in line)
        assert words in line
    assert outputs() == ["good.png", "photo.jpg"]


def test_every_kind_of_good_file_is_restored(folder: Path) -> None:
    colour = Image.fromarray(picture())
    colour.resize((1, 1)).save("in/one.png")
    colour.convert("CMYK").save("in/cmyk.jpg")
    colour.quantize(9).save("in/palette.png", transparency=3)
    colour.save("in/animated.png", save_all=True, append_images=[colour.rotate(180)])
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save("in/deep.png")
    colour.save("in/really.png", "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save("in/turned.jpg", exif=turned)
    code, said = dehaze("in")
    assert code == 0, said
    assert "8 of 8 files" in said
    assert "these are demo weights" in said
    assert "holds 2 frames, the first is used" in said
    sizes = {name: Image.open(Path("out", name)).size for name in outputs()}
    assert sizes == {name: {"one.png": (1, 1), "turned.jpg": (20, 30)}.get(name, (30, 20)) for name in os.listdir("in")}
    assert Image.open("out/turned.jpg").getexif().get(0x0112, 1) == 1
    assert Image.open("out/palette.png").mode == "RGBA"
    assert Image.open("out/really.png").format == "PNG"


def test_an_image_of_many_pixels_is_one_line_and_no_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    code, said = dehaze("in/good.png")
    assert code == 0
    assert said.count("30×20 pixels are more than most photographs have: is it one?") == 1
    assert not [warning for warning in recwarn if "DecompressionBomb" in str(warning.category)]


def test_sets_of_images_of_many_pixels_give_no_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Headers of 95 megapixels with a row of pixels behind them, and small images read under a limit below them."""
    before = warnings.showwarning, list(warnings.filters)
    for root, content in (("large", png_header(10_000, 9500)[:-9]), ("small", Path("in/good.png").read_bytes())):
        for place in ("train/GT", "train/hazy", "test/GT", "test/hazy"):
            Path(root, place).mkdir(parents=True)
            for index in range(4):
                Path(root, place, f"{index}.png").write_bytes(content)
    code, said = command("data", "check", "large")
    assert code == 0, said
    code, said = command("evaluate", "large", "-w", "w.safetensors", "--device", "cpu")
    assert code == 1
    assert "test/hazy/3.png: cannot be read: " in said
    with pytest.raises(ImageError, match=r"hazy/3\.png: cannot be read"):
        PairedImages("large", "train", patch=8)[3]

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert command("data", "check", "small", "--decode")[0] == 0
    assert command("evaluate", "small", "-w", "w.safetensors", "--device", "cpu")[0] == 0
    assert PairedImages("small", "train", patch=8)[3]["hazy"].shape == (3, 8, 8)
    Image.fromarray(picture()[..., 0]).save("depth.png")
    assert read_depth(DepthMap("depth.png", "disparity")).shape == (1, 20, 30)
    assert [str(warning.message) for warning in recwarn] == []
    assert (warnings.showwarning, list(warnings.filters)) == before


@pytest.mark.parametrize("extension", [".png", ".jpg", ".tif", ".bmp", ".webp"])
def test_a_full_disk(extension: str, folder: Path) -> None:
    Image.fromarray(picture(2, 2)).save("in/small.bmp")
    with full_disk(1000):
        code, said = dehaze("in", "--extension", extension)
    assert code == 1
    assert "File too large" in said
    assert "1 of 2 files" in said
    assert outputs() == [f"small{extension}"]


def test_scores_are_shown_though_the_disk_is_full(folder: Path) -> None:
    for place in ("set/GT", "set/hazy"):
        Path(place).mkdir(parents=True)
        Path(place, "a.png").write_bytes(Path("in/good.png").read_bytes())
    words = ("evaluate", "set", "-w", "w.safetensors", "--device", "cpu", "--csv")
    with full_disk(100):
        code, said = command(*words, "scores.csv")
    assert (code, os.path.exists("scores.csv")) == (2, False)
    assert "│ full-rgb      │ " in said
    assert said.endswith("File too large: 'scores.csv'")
    assert sorted(os.listdir()) == ["in", "set", "w.safetensors"]
    code, said = command(*words, "nowhere/scores.csv")
    assert (code, said) == (2, "error: csv_path: there is no folder nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pipe.png"], "inputs: pipe.png is neither a file nor a folder"),
        (["link.png"], "inputs: no file or folder link.png"),
        (["in/good.png/deeper"], "inputs: no file or folder in/good.png/deeper"),
        (["in", "--tile", "63"], "expected auto, none, or pixels from 64 up, got '63'"),
        (["in", "--tile", "64", "--overlap", "64"], "0 ≤ overlap < tile, got 64 and 64"),
    ],
)
def test_inputs_that_are_none(words: list[str], message: str, folder: Path) -> None:
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("nowhere.png")
    code, said = dehaze(*words)
    assert code == 2
    assert message in " ".join(said.replace("│", " ").split())
    assert outputs() == []


def test_folders_that_cannot_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in/deeper").mkdir()
    Image.fromarray(picture()).save("in/deeper/b.png")
    Path("out").mkdir()
    Path("out/deeper").write_text("a file where a folder is expected")
    Path("out/good.png").mkdir()
    code, said = dehaze("in", "--recursive", "--overwrite")
    assert code == 1
    assert "0 of 2 files" in said
    assert "Is a directory" in said
    assert "File exists" in said or "Not a directory" in said
    assert outputs() == ["deeper", "good.png"]

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)  # the superuser may read anywhere
    code, said = dehaze("in")
    assert code == 2
    assert "Permission denied: 'in'" in said
