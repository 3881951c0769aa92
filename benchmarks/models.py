"""Time and memory of whole networks, the library's choice of kernels against plain PyTorch.

    python -m benchmarks.models [--network MITNet] [--size 128] [--batch 2] [--compile] [--output NAME]

Both networks at their published width; a training step is forward, loss and backward without the
optimizer (for DCMPNet the L1 loss alone, since its other losses run networks of their own), inference
is ``restore``. Plain PyTorch runs in NCHW and in channels_last, and speed-ups are given over the faster
of the two; ``--compile`` adds torch.compile of it, which takes minutes. All of them take turns in one
process, memory is measured in processes of their own. What does not give the plain network's numbers
has no speed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from mitnet_fast import ops
from mitnet_fast.losses import MITNetLoss
from mitnet_fast.models import DCMPNet, DCMPNetOutput, MITNet
from mitnet_fast.specs import relative_error

from .measure import environment, peak_memory, take_turns, write_results

WORK = ("training step", "inference")
CHECKED_SIZE = 64  # pixels, side of the images on which results are compared
CHECKED_SEEDS = 3  # problems; one may hold a phase at ±π that rounding flips, the median does not


@dataclass(frozen=True)
class Implementation:
    """A way to run a network.

    Attributes:
        backends: a context in which the network runs.
        layout: memory format of its weights and images.
        compiled: whether torch.compile takes the network first.
    """

    backends: Callable[[], AbstractContextManager]
    layout: torch.memory_format = torch.contiguous_format
    compiled: bool = False


def _plain() -> AbstractContextManager:
    return ops.use_backend("reference")


PLAIN = ("plain", "plain, channels_last")
IMPLEMENTATIONS = {
    "plain": Implementation(_plain),
    "plain, channels_last": Implementation(_plain, torch.channels_last),
    "fused": Implementation(nullcontext),
    "fused, channels_last": Implementation(nullcontext, torch.channels_last),
}
COMPILED = {"compile": Implementation(_plain, compiled=True)}


@dataclass(frozen=True)
class Row:
    """One measured piece of work in one implementation."""

    network: str
    work: str
    implementation: str
    shape: str
    dtype: str
    correct: bool
    problem: str | None
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    runs: int
    speedup_over_plain: float | None
    peak_memory_mb: float | None
    precision: str
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


class ImageLoss(nn.Module):
    """The L1 distance to the truth."""

    def forward(self, output: DCMPNetOutput, hazy: torch.Tensor, clear: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss as "total", as the systems' own losses return it."""
        return {"total": F.l1_loss(output.restored, clear)}


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MITNet": MITNet, "DCMPNet": DCMPNet}
LOSSES: dict[str, Callable[[], nn.Module]] = {"MITNet": MITNetLoss, "DCMPNet": ImageLoss}


def prepare(
    network: str, work: str, implementation: Implementation, batch: int, size: int, device: str
) -> Callable[[], object]:
    """A function that does the work once; networks and images are the same in every implementation."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=implementation.layout)
    hazy, clear = (
        torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=implementation.layout)
        for _ in range(2)
    )
    run = torch.compile(model) if implementation.compiled else model
    if work == "inference":
        model.eval()
        if implementation.compiled:
            return torch.no_grad()(lambda: run(hazy))
        return lambda: model.restore(hazy)
    loss = LOSSES[network]().to(device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss.zero_grad(set_to_none=True)
        loss(run(hazy), hazy, clear)["total"].backward()

    return step


def turn(
    network: str, work: str, implementation: Implementation, batch: int, size: int, device: str
) -> Callable[[int], None]:
    """The prepared work under the implementation's backends, as :func:`take_turns` calls it."""
    call = prepare(network, work, implementation, batch, size, device)

    def run(_: int) -> None:
        with implementation.backends():
            call()

    return run


def is_correct(network: str, implementation: Implementation, device: str) -> bool:
    """Whether restored images are as near to those in float64 as plain PyTorch's, in the median."""
    errors, plain_errors = [], []
    for seed in range(CHECKED_SEEDS):
        torch.manual_seed(seed)
        model = NETWORKS[network]().to(device).eval()
        image = torch.rand(1, 3, CHECKED_SIZE, CHECKED_SIZE, device=device)
        with _plain():
            plain = model.restore(image)
            truth = model.double().restore(image.double())
        model = model.float().to(memory_format=implementation.layout)
        with implementation.backends():
            restored = model.restore(image.contiguous(memory_format=implementation.layout))
        errors.append(relative_error(restored, truth))
        plain_errors.append(relative_error(plain, truth))
    rounding = 8 * torch.finfo(torch.float32).eps
    return statistics.median(errors) <= max(4 * statistics.median(plain_errors), rounding)


def memory(network: str, work: str, name: str, batch: int, size: int, device: str) -> float:
    """Megabytes above network and images at the peak of one piece of work."""
    implementation = IMPLEMENTATIONS[name]
    with implementation.backends():
        prepare(network, work, implementation, 1, CHECKED_SIZE, device)()  # thread pools and libraries
        return peak_memory(prepare(network, work, implementation, batch, size, device), device) / 1e6


def memory_in_own_process(network: str, work: str, name: str, batch: int, size: int, device: str) -> float | None:
    """The same, measured where nothing else was; None for compiled networks."""
    if name in COMPILED:
        return None  # the compiler's own memory dominates
    words = ["--memory-of", network, work, name, str(batch), str(size), device]
    command = [sys.executable, "-m", __spec__.name, *words]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(
    network: str, work: str, batch: int, size: int, device: str, seconds: float, compiled: bool = False
) -> list[Row]:
    """All implementations of one piece of work, in turns."""
    chosen = IMPLEMENTATIONS | (COMPILED if compiled else {})
    calls: dict[str, Callable[[int], object]] = {}
    problems: dict[str, str] = {}
    for name, implementation in chosen.items():
        if name not in (*PLAIN, *COMPILED) and not is_correct(network, implementation, device):
            problems[name] = "fails its check"
            continue
        run = turn(network, work, implementation, batch, size, device)
        if implementation.compiled:
            try:
                run(0)
            except Exception as error:
                problems[name] = f"does not compile: {type(error).__name__}"
                continue
        calls[name] = run
    timings = take_turns(calls, device, seconds=seconds, least=3)
    fastest_plain = min(timings[name].median for name in PLAIN)
    return [
        Row(
            network=network,
            work=work,
            implementation=name,
            shape=f"[{batch}, 3, {size}, {size}]",
            dtype="float32",
            correct=name not in problems,
            problem=problems.get(name),
            median_ms=(timing := timings.get(name)) and timing.median * 1e3,
            p20_ms=timing and timing.p20 * 1e3,
            p80_ms=timing and timing.p80 * 1e3,
            runs=timing.runs if timing else 0,
            speedup_over_plain=timing and fastest_plain / timing.median,
            peak_memory_mb=timing and memory_in_own_process(network, work, name, batch, size, device),
            precision="IEEE" if device == "cpu" else torch.backends.cudnn.conv.fp32_precision.upper(),
            **environment(device),
        )
        for name in chosen
    ]


def show(rows: list[Row], console: Console) -> None:
    """Print one table per network."""
    for network, shape in dict.fromkeys((row.network, row.shape) for row in rows):
        columns = ("work", "implementation", "ms", "p20–p80", "× plain", "peak MB")
        table = Table(*columns, title=f"{network}, {shape}, float32")
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            if (row.network, row.shape) != (network, shape):
                continue
            if row.median_ms is None:
                table.add_row(row.work, row.implementation, f"[red]{row.problem}[/]")
                continue
            table.add_row(
                row.work,
                row.implementation,
                f"{row.median_ms:.0f}",
                f"{row.p20_ms:.0f}–{row.p80_ms:.0f}",
                f"{row.speedup_over_plain:.2f}",
                "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), help="one network; both by default")
    parser.add_argument("--size", type=int, default=128, help="side of the images, a multiple of 8")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each implementation and piece of work")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain networks too")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    parser.add_argument("--memory-of", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        network, work, name, batch, size, device = options.memory_of
        print(memory(network, work, name, int(batch), int(size), device))
        return
    console, rows = Console(), []
    for network in NETWORKS if options.network is None else (options.network,):
        for work in WORK:
            with console.status(f"{network}, {work}"):
                rows += measure(
                    network, work, options.batch, options.size, options.device, options.seconds, options.compile
                )
    show(rows, console)
    if options.output:
        write_results(rows, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
