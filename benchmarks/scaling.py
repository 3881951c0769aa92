"""What restoring an image costs, over its size and over the number of images at once.

    python -m benchmarks.scaling [--network MITNet] [--device cpu] [--seconds 40] [--output NAME]

Sides double from 64 pixels to 8192 until time or memory ends; nothing is extrapolated. A size that takes
less than a second is timed in turns with the other implementation, one that takes longer once, in the
process of its own that measures its memory. Bytes per pixel are those between the two largest sizes: what
every further pixel of an image needs, and with them the largest image that fits into a GiB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .measure import environment, in_new_process, peak_memory, take_turns, write_results
from .models import IMPLEMENTATIONS, INFERENCE, NETWORKS, WARMED_SIZE, prepare, turn

SMALLEST, LARGEST = 64, 8192  # sides, pixels
BATCHES = (1, 2, 4, 8)
IN_TURNS = 1.0  # seconds of a call up to which it is timed in turns
COMPARED = ("plain, channels_last", "fused, channels_last")
GIB = 2**30


@dataclass(frozen=True)
class Scaling:
    """Inference of one network at one size.

    Attributes:
        network: its name.
        implementation: of :data:`.models.IMPLEMENTATIONS`.
        batch: images at once.
        side: of the square images, pixels.
        seconds: of the batch.
        runs: calls that were timed; the median counts.
        memory_mb: highest memory above network and images.
        device, threads, torch, triton, python, commit: where, and with what.
    """

    network: str
    implementation: str
    batch: int
    side: int
    seconds: float
    runs: int
    memory_mb: float
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


def once(network: str, name: str, batch: int, side: int, device: str) -> tuple[float, float]:
    """Seconds and megabytes above network and images of one call, after a small one that loads libraries."""
    implementation = IMPLEMENTATIONS[name]
    with implementation.backends(device):
        prepare(network, INFERENCE, implementation, 1, WARMED_SIZE, device)()
        call = prepare(network, INFERENCE, implementation, batch, side, device)
        seconds = []

        def timed() -> object:
            begun = time.perf_counter()
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            return result

        peak = peak_memory(timed, device)
        return seconds[0], peak / 1e6


def measure(network: str, device: str, seconds: float, *, batches: Sequence[int] = BATCHES) -> Iterator[Scaling]:
    """Inference at doubling sizes, then of several images at once, until time or memory ends.

    Args:
        network: "MITNet" or "DCMPNet".
        device: "cpu" or "cuda".
        seconds: for images one at a time; a size that would take longer than what is left is not begun.
        batches: numbers of images of 128×128 pixels.
    """
    ends = time.monotonic() + seconds
    expected = 0.0
    for step in range((LARGEST // SMALLEST).bit_length()):
        side = SMALLEST * 2**step
        if expected and time.monotonic() + expected > ends:
            break
        begun = time.monotonic()
        try:
            rows = list(_rows(network, 1, side, device))
        except torch.OutOfMemoryError:
            break
        yield from rows
        # four times the pixels, and the same preparations again
        expected = time.monotonic() - begun + 4 * sum(row.seconds for row in rows)
        if device == "cpu" and 4 * max(row.memory_mb for row in rows) > 0.7 * _available_mb():
            break
    for batch in batches[1:]:
        yield from _rows(network, batch, 2 * SMALLEST, device)


def _rows(network: str, batch: int, side: int, device: str) -> Iterator[Scaling]:
    """Both implementations at one size."""
    calls = once if device == "cuda" else lambda *arguments: in_new_process(once, *arguments)
    single = {name: calls(network, name, batch, side, device) for name in COMPARED}
    timings = {}
    if max(seconds for seconds, _ in single.values()) < IN_TURNS:
        turns = {name: turn(network, INFERENCE, IMPLEMENTATIONS[name], batch, side, device) for name in COMPARED}
        timings = take_turns(turns, device, seconds=0.5, least=3)
    for name, (seconds, memory_mb) in single.items():
        timing = timings.get(name)
        yield Scaling(
            network,
            name,
            batch,
            side,
            timing.median if timing else seconds,
            timing.runs if timing else 1,
            memory_mb,
            **environment(device),
        )


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 1e3


def bytes_per_pixel(rows: Sequence[dict], network: str, implementation: str) -> float | None:
    """Memory that a further pixel needs, between the two largest images; None with fewer than two sizes."""
    sizes = sorted(
        (row["side"] ** 2, 1e6 * row["memory_mb"])
        for row in rows
        if (row["network"], row["implementation"], row["batch"]) == (network, implementation, 1)
    )
    if len(sizes) < 2:
        return None
    (few, little), (many, much) = sizes[-2:]
    return (much - little) / (many - few)


def largest_side_per_gib(bytes_of_a_pixel: float) -> int:
    """Side of the largest square image whose restoration needs a GiB above network and image, pixels."""
    return int((GIB / bytes_of_a_pixel) ** 0.5)


def show(rows: Sequence[dict], console: Console) -> None:
    """Print one table."""
    table = Table("network", "implementation", "images", "seconds", "runs", "peak MB", title="inference over size")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        images = f"{row['batch']} × {row['side']}²" if row["batch"] > 1 else f"{row['side']}²"
        cells = (row["network"], row["implementation"], images)
        table.add_row(*cells, f"{row['seconds']:.3f}", str(row["runs"]), f"{row['memory_mb']:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), help="one network; both by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each network's images one at a time")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    console = Console()
    networks = tuple(NETWORKS) if options.network is None else (options.network,)
    measured = [row for network in networks for row in measure(network, options.device, options.seconds)]
    rows = [asdict(row) for row in measured]
    show(rows, console)
    for network in networks:
        for name in COMPARED:
            value = bytes_per_pixel(rows, network, name)
            if value is not None:
                side = largest_side_per_gib(value)
                console.print(f"{network}, {name}: {value:.0f} bytes per pixel, {side}² pixels per GiB")
    if options.output:
        write_results(measured, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
