"""Time and memory of a whole training step and of inference, kernels against plain PyTorch.

    python -m benchmarks.models [--size 128] [--batch 2] [--seconds 20] [--output benchmarks/results/NAME]

A training step is forward, loss and backward of MITNet at its published width, without the
optimizer. "reference" forces plain PyTorch for every operator, "default" leaves the choice to the
library; both run in turns in one process, memory is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mitnet_fast import ops
from mitnet_fast.losses import MITNetLoss
from mitnet_fast.models import MITNet

from .measure import environment, peak_memory, take_turns, write_results

WORK = ("training step", "inference")
CHOICES: dict[str, Callable[[], AbstractContextManager]] = {
    "reference": lambda: ops.use_backend("reference"),
    "default": nullcontext,
}


@dataclass(frozen=True)
class Row:
    """One measured piece of work on one choice of backends."""

    network: str
    work: str
    backend: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    speedup_over_reference: float
    peak_memory_mb: float
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


def prepare(work: str, batch: int, size: int, device: str) -> Callable[[], object]:
    """A function that does the work once on MITNet and the images that it was made with."""
    torch.manual_seed(0)
    network = MITNet().to(device)
    hazy, clear = (torch.rand(batch, 3, size, size, device=device) for _ in range(2))
    if work == "inference":
        return lambda: network.restore(hazy)
    loss = MITNetLoss().to(device)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        loss.zero_grad(set_to_none=True)
        loss(network(hazy), hazy, clear)["total"].backward()

    return step


def memory(work: str, choice: str, batch: int, size: int, device: str) -> float:
    """Megabytes above network and images at the peak of one piece of work."""
    prepare(work, 1, 32, device)()  # thread pools and libraries
    call = prepare(work, batch, size, device)
    with CHOICES[choice]():
        return peak_memory(call, device) / 1e6


def measure(work: str, batch: int, size: int, device: str, seconds: float) -> list[Row]:
    """All choices of backends for one piece of work, in turns."""
    call = prepare(work, batch, size, device)

    def under(choice: str) -> Callable[[int], object]:
        def run(_: int) -> None:
            with CHOICES[choice]():
                call()

        return run

    timings = take_turns({choice: under(choice) for choice in CHOICES}, device, seconds=seconds)
    rows = []
    for choice, timing in timings.items():
        words = ["--memory-of", work, choice, str(batch), str(size), device]
        command = [sys.executable, "-m", "benchmarks.models", *words]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(
            Row(
                network="MITNet",
                work=work,
                backend=choice,
                shape=f"[{batch}, 3, {size}, {size}]",
                median_ms=timing.median * 1e3,
                p20_ms=timing.p20 * 1e3,
                p80_ms=timing.p80 * 1e3,
                runs=timing.runs,
                speedup_over_reference=timings["reference"].median / timing.median,
                peak_memory_mb=float(printed.splitlines()[-1]),
                **environment(device),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the images, a multiple of 8")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each choice and piece of work")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        work, choice, batch, size, device = options.memory_of
        print(memory(work, choice, int(batch), int(size), device))
        return
    console = Console()
    rows = []
    for work in WORK:
        with console.status(work):
            rows += measure(work, options.batch, options.size, options.device, options.seconds)
    table = Table("work", "backends", "ms", "p20–p80", "× reference", "peak MB", title=f"MITNet, {rows[0].shape}")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.work,
            row.backend,
            f"{row.median_ms:.0f}",
            f"{row.p20_ms:.0f}–{row.p80_ms:.0f}",
            f"{row.speedup_over_reference:.2f}",
            f"{row.peak_memory_mb:.0f}",
        )
    console.print(table)
    if options.output:
        write_results(rows, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
