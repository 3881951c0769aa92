"""Bytes per pixel that restoring images takes at its peak: writes ``mitnet_fast/memory.json``, which tiles rest on.

    python -m benchmarks.memory [--device cuda]

Every figure is the highest of ``SIDES``, each measured in a process of its own; devices that are not measured keep
what the file says.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from mitnet_fast.data import write_image
from mitnet_fast.inference import dehaze_files
from mitnet_fast.models import DCMPNet, MITNet
from mitnet_fast.ops import use_backend

from .measure import environment, in_new_process, peak_memory

NETWORKS = {"mitnet": MITNet, "dcmpnet": DCMPNet}
BACKENDS = {"fused": None, "reference": "reference"}
SIDES = (256, 512)
IMAGE_SIDE = 1024
TARGET = Path(__file__).parent.parent / "mitnet_fast" / "memory.json"


class Identity(nn.Module):
    """A network that takes no memory: what is left are the files."""

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        return image


def restoring(network: str, backend: str, precision: str, side: int, device: str) -> float:
    """Bytes per pixel at the peak of ``restore``."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last).eval()
    dtype = getattr(torch, precision)

    def restore(pixels: int) -> torch.Tensor:
        image = torch.rand(1, 3, pixels, pixels, device=device)
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return model.restore(image)

    with use_backend(BACKENDS[backend]):
        restore(64)  # thread pools and libraries
        return peak_memory(lambda: restore(side), device) / side**2


def image_files() -> float:
    """Bytes per pixel at the peak of reading and writing a 16-bit image with transparency."""
    with tempfile.TemporaryDirectory() as folder:
        for side in (64, IMAGE_SIDE):
            write_image(Path(folder) / f"{side}.png", torch.rand(3, side, side), torch.rand(1, side, side), bits=16)

        def run(side: int) -> None:
            summary = dehaze_files(Identity(), Path(folder) / f"{side}.png", Path(folder) / "out")
            assert not summary.failures

        run(64)
        return peak_memory(lambda: run(IMAGE_SIDE), "cpu") / IMAGE_SIDE**2


def measure(device: str) -> dict[str, dict[str, dict[str, int]]]:
    """Network → backend → precision → bytes per pixel, rounded up to 10."""
    return {
        network: {
            backend: {
                precision: math.ceil(
                    max(in_new_process(restoring, network, backend, precision, side, device) for side in SIDES) / 10
                )
                * 10
                for precision in ("float32", "bfloat16")
            }
            for backend in BACKENDS
        }
        for network in NETWORKS
    }


def main() -> None:
    """Measure on one device and bring the file up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    content = json.loads(TARGET.read_text()) if TARGET.exists() else {"restore": {}, "source": {}}
    content["restore"][arguments.device] = measure(arguments.device)
    content["files"] = math.ceil(in_new_process(image_files) / 10) * 10
    sizes = " and ".join(f"{side}×{side}" for side in SIDES)
    about = {
        name: value for name, value in environment(arguments.device).items() if name in ("device", "threads", "torch")
    }
    content["source"][arguments.device] = {"command": f"benchmarks.memory, {sizes}", **about}
    TARGET.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
