"""How much memory is free, what restoring takes, and what becomes of images that do not fit."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.measure import in_new_process
from benchmarks.memory import restoring
from mitnet_fast import memory
from mitnet_fast._extension import EXTENSION
from mitnet_fast.data import PairedImages
from mitnet_fast.evaluation import evaluate
from mitnet_fast.inference import dehaze_files
from mitnet_fast.models import DCMPNet, DepthNet, DepthSharingDCMPNet, MITNet
from mitnet_fast.ops import use_backend

CPU = torch.device("cpu")
FIGURES = memory.MEASURED["restore"]["cpu"]
GB = 10**9


class Counted(MITNet):
    """A network whose estimate is that of MITNet, and which inverts and remembers what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(image.shape[-2:]))
        return 1 - image


def system(root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Lay out /proc and /sys/fs/cgroup below ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "PROC", root / "proc")
    monkeypatch.setattr(memory, "CGROUPS", root / "cgroup")


MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_000_000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "cgroup/user/job/memory.max": "max\n",
                "cgroup/user/job/memory.current": "1\n",
                "cgroup/user/memory.max": f"{5 * GB}\n",
                "cgroup/user/memory.current": f"{3 * GB}\n",
                "cgroup/user/memory.stat": f"anon 1\ninactive_file {GB}\n",
            },
            3 * GB,
        ),
        (  # in a container the group's own folder is the root
            {
                "proc/self/cgroup": "12:pids:/docker/4711\n9:memory:/docker/4711\n",
                "cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
                "cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
                "cgroup/memory/memory.stat": "cache 0\n",
            },
            GB,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": "1000\n",
                "cgroup/memory.current": "2000\n",
                "cgroup/memory.stat": "",
            },
            0,
        ),
        ({"proc/self/cgroup": "no control groups\n\n"}, 8_000_000 * 1024),
    ],
    ids=["meminfo", "version 2", "version 1", "over its limit", "unreadable"],
)
def test_the_least_that_is_left(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(tmp_path, monkeypatch, {"proc/meminfo": MEMINFO, **files})
    assert memory.free_bytes(CPU) == expected


def test_limit_of_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(tmp_path, monkeypatch, {"proc/meminfo": MEMINFO, "proc/self/statm": "1000 900 800 1 0 1 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda kind: {resource.RLIMIT_AS: (5 * GB, 5 * GB)}[kind])
    assert memory.free_bytes(CPU) == 5 * GB - 1000 * resource.getpagesize()


def test_systems_that_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(tmp_path, monkeypatch, {})
    assert memory.free_bytes(CPU) is None
    assert memory.free_bytes(torch.device("meta")) is None


def test_this_machine_tells() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 0 < memory.free_bytes(CPU) < total


def test_bytes_per_pixel_grow_with_the_widths() -> None:
    def estimate(model: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float | None:
        with use_backend("reference"):
            return memory.bytes_per_pixel(model, torch.device(device), dtype)

    with torch.device("meta"):
        mitnet, dcmpnet = FIGURES["mitnet"]["reference"], FIGURES["dcmpnet"]["reference"]
        assert estimate(MITNet()) == mitnet["float32"]
        assert estimate(MITNet(width=40), torch.float16) == 2 * mitnet["bfloat16"]
        assert estimate(MITNet(), device="cuda") == mitnet["float32"]
        assert estimate(DCMPNet(prior_widths=(64, 128, 256, 512, 1536))) == 3 * dcmpnet["float32"]
        assert estimate(DepthSharingDCMPNet(DCMPNet(share_depth=True), DepthNet())) == dcmpnet["float32"]
        assert estimate(DepthNet()) is None
    for network in FIGURES.values():
        assert network["fused"]["float32"] <= network["reference"]["float32"]
    assert memory.MEASURED["source"]["cpu"]["command"].startswith("benchmarks.memory")


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", *(["fused"] if EXTENSION else [])])
@pytest.mark.parametrize("network", FIGURES)
def test_restoring_takes_no_more_than_planned(network: str, backend: str, precision: str) -> None:
    found = in_new_process(restoring, network, backend, precision, 384, "cpu")
    assert 0.4 < found / FIGURES[network][backend][precision] < 1 / memory.SHARE


def test_largest_tile() -> None:
    assert memory.largest_tile(2000, int(1000**2 * 2000 / 0.8)) == 960
    assert memory.largest_tile(2000, int(128**2 * 2000 / 0.8) + 1) == 128
    with pytest.raises(MemoryError, match="40 MB of memory are free, tiles of 128 pixels need 41 MB"):
        memory.largest_tile(2000, 40 * 10**6)


def picture(path: Path, height: int, width: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def free_for(model: nn.Module, side: int, height: int, width: int) -> int:
    """Free memory in which a tile of ``side`` pixels just fits beside an image of that size."""
    return (
        int(side**2 * memory.bytes_per_pixel(model, CPU, torch.float32) / memory.SHARE)
        + 1
        + (memory.MEASURED["files"] * height * width)
    )


def test_an_image_that_does_not_fit_has_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("GT", "hazy"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "large.png", 64, 96)
        picture(tmp_path / folder / "small.png", 32, 40)
    model = Counted()
    free = int(60 * 90 * memory.bytes_per_pixel(model, CPU, torch.float32) / memory.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    large, small = evaluate(model, PairedImages(tmp_path)).images
    assert large.error.startswith("restoring 96×64 pixels as a whole needs ")
    assert large.error.endswith(f", {memory.in_words(free)} are free")
    assert (small.error, model.seen) == ("", [(32, 40), (32, 32)])


def test_an_image_that_does_not_fit_is_tiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = Counted(), tmp_path / "a.png"
    pixels = picture(source, 300, 500)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_for(model, 192, 300, 500))
    (result,) = dehaze_files(model, source, tmp_path / "out").results
    assert (result.error, result.deviation) == ("", None)
    assert result.notes == ("does not fit into memory as a whole: restored in tiles of 192 pixels",)
    assert set(model.seen) == {(192, 192)}
    assert np.array_equal(np.array(Image.open(tmp_path / "out/a.png")), 255 - pixels)
    (whole,) = dehaze_files(model, source, tmp_path / "whole", tile=None).results  # as told
    assert (whole.error, whole.notes, model.seen[-1]) == ("", (), (300, 500))
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_for(model, 500, 300, 500))
    (fits,) = dehaze_files(model, source, tmp_path / "fits").results
    assert (fits.error, fits.notes, model.seen[-1]) == ("", (), (300, 500))


@pytest.mark.parametrize(("tile", "compared"), [("auto", 96), (100, 100), (250, 96)])
def test_tiles_are_compared_on_what_fits(
    tile: int | str, compared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brighter(Counted):
        """Adds a tenth of the number of pixels that it sees over those of the sample, in levels."""

        def restore(self, image: torch.Tensor) -> torch.Tensor:
            super().restore(image)
            return 0.5 * image + 0.1 * image.shape[-1] * image.shape[-2] / 192**2

    model, source = Brighter(), tmp_path / "a.png"
    picture(source, 300, 500)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_for(model, 192, 300, 500))
    (result,) = dehaze_files(model, source, tmp_path / "out", tile=tile, overlap=8, compare=True).results
    note = f"compared in tiles of {compared} pixels on the middle 192×192, which fits into memory"
    assert result.notes[-1] == note
    assert model.seen[-1] == (192, 192)
    expected = 0.1 * (1 - compared**2 / 192**2) * 255
    assert result.deviation.mean == pytest.approx(expected, abs=1e-3)


def test_what_fits_in_no_way_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = Counted(), tmp_path / "a.png"
    picture(source, 300, 500)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_for(model, 100, 300, 500))
    (result,) = dehaze_files(model, source, tmp_path / "out").results
    assert " of memory are free, tiles of 128 pixels need " in result.error
    assert dehaze_files(model, source, tmp_path / "told", tile=None).failures == ()  # as told
    assert model.seen == [(300, 500)]
    model.seen.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_for(model, 128, 300, 500))
    (result,) = dehaze_files(model, source, tmp_path / "out", overlap=128).results
    assert result.error == "tiles of 128 pixels fit, which is not above the overlap of 128"
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**6)
    monkeypatch.setattr("mitnet_fast.inference.read_image", None)  # it is refused before it is decoded
    (result,) = dehaze_files(model, source, tmp_path / "out").results
    needed = memory.in_words(500 * 300 * memory.MEASURED["files"])
    assert result.error == f"500×300 pixels need {needed} to be read and written, 1 MB are free"
    assert model.seen == []
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fits", [500, 300, 130, 120])
def test_memory_that_ends_before_the_estimate(fits: int, tmp_path: Path) -> None:
    class Device(Counted):
        def restore(self, image: torch.Tensor) -> torch.Tensor:
            if max(image.shape[-2:]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().restore(image)

    model, source = Device(), tmp_path / "a.png"
    pixels = picture(source, 300, 530)
    (result,) = dehaze_files(model, source, tmp_path / "out").results
    if fits == 120:
        assert result.error == "out of memory; smaller tiles need less: CUDA out of memory"
        return
    tile = 128 if fits == 130 else 256
    assert result.notes == (f"does not fit into memory as a whole: restored in tiles of {tile} pixels",)
    assert {max(size) for size in model.seen} == {tile}
    assert np.array_equal(np.array(Image.open(result.output)), 255 - pixels)
    (told,) = dehaze_files(model, source, tmp_path / "told", tile=None).results
    assert "out of memory" in told.error


def test_a_network_without_an_estimate_is_never_tiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(nn.Module):
        def restore(self, image: torch.Tensor) -> torch.Tensor:
            return image

    picture(tmp_path / "a.png", 300, 500)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**9)
    (result,) = dehaze_files(Unknown(), tmp_path / "a.png", tmp_path / "out").results
    assert (result.error, result.notes) == ("", ())
