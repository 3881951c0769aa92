"""What restoring an image costs, over its size and over the number of images at once.

    python -m benchmarks.scaling [--network MITNet] [--device cpu] [--seconds 40] [--output NAME]

Sides double from 64 pixels to 8192. An implementation for which time or memory ends drops out, and the other
goes on alone; from the largest whole image on, images are restored in tiles too. A first call, in a process of its
own, measures memory; what takes at most five seconds is then warmed up and timed at least three times, in turns with
the other implementation. Of what takes longer that first call is the only one, and its row says so: one run.

Nothing is extrapolated: memory per further pixel is that between the two largest sizes, and the image whose
restoration needs a GiB lies between the two sizes that need less and more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mitnet_fast.inference import OVERLAP, window_starts

from .measure import (
    Timing,
    environment,
    float32_precision,
    in_new_process,
    peak_memory,
    summary,
    take_turns,
    write_results,
)
from .models import IMPLEMENTATIONS, INFERENCE, NETWORKS, TILED, WARMED_SIZE, prepare, turn

SIDES = tuple(64 * 2**step for step in range(8))  # pixels
BATCHES = (1, 2, 4, 8)
REPEATED = 5.0  # seconds of a call up to which it is timed again
TURNS = 3  # of what is repeated, at the least
SECONDS_IN_TURNS = 0.5  # of each implementation, at the least
MEMORY_SHARE = 0.7  # of what the system has left, for one size
COMPARED = ("plain, channels_last", "fused, channels_last")
FUSED = COMPARED[-1]
WAYS = IMPLEMENTATIONS | TILED
BYTES_IN_TILES = 52  # of each pixel: two images, the sum of restored tiles and of their weights, the quotient
GIB = 2**30


@dataclass(frozen=True)
class Scaling:
    """Inference of one network at one size.

    Attributes:
        network: its name.
        implementation: of :data:`.models.IMPLEMENTATIONS` or :data:`.models.TILED`.
        batch: images at once.
        side: of the square images, pixels.
        dtype: of network and images.
        layout: of the maps.
        precision: of float32 products, "IEEE" or "TF32".
        seconds, p20_seconds, p80_seconds: of the batch, median and percentiles; all the same for a single call.
        runs: calls that were timed; 1 for what takes more than :data:`REPEATED` seconds.
        memory_mb: highest memory above network and images.
        device, threads, torch, triton, python, commit: where, and with what.
    """

    network: str
    implementation: str
    batch: int
    side: int
    dtype: str
    layout: str
    precision: str
    seconds: float
    p20_seconds: float
    p80_seconds: float
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
    implementation = WAYS[name]
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
        seconds: roughly, for images one at a time; what is expected to take longer than what is left is not begun.
        batches: numbers of images of 128×128 pixels.
    """
    ends = time.monotonic() + seconds
    names, whole = COMPARED, []
    for side in SIDES:
        rows = _rows(network, names, 1, side, device)
        yield from rows
        whole += rows
        names = _going_on(rows, ends - time.monotonic(), device)
        if not names:
            break
    yield from _in_tiles(network, {row.side: row for row in whole if row.implementation == FUSED}, ends, device)
    for batch in batches[1:]:
        yield from _rows(network, COMPARED, batch, SIDES[1], device)


def _in_tiles(network: str, whole: Mapping[int, Scaling], ends: float, device: str) -> Iterator[Scaling]:
    """Images from the largest whole one on, while time and memory last; ``whole`` has the whole ones by their side."""
    for name, implementation in TILED.items():
        tile = whole.get(implementation.tile)
        if tile is None:
            continue
        for side in SIDES[SIDES.index(max(whole)) :]:
            tiles = len(window_starts(side, implementation.tile, OVERLAP)) ** 2
            seconds, memory_mb = _seconds_of_all(tiles * tile.seconds), tile.memory_mb + BYTES_IN_TILES * side**2 / 1e6
            if tiles > 1 and seconds < ends - time.monotonic() and _fits(memory_mb, device):
                yield from _rows(network, [name], 1, side, device)


def _rows(network: str, names: Sequence[str], batch: int, side: int, device: str) -> list[Scaling]:
    """One size, of every implementation that fits into memory."""
    calls = once if device == "cuda" else lambda *arguments: in_new_process(once, *arguments)
    single = {}
    for name in names:
        with suppress(torch.OutOfMemoryError):
            single[name] = calls(network, name, batch, side, device)
    again = [name for name, (seconds, _) in single.items() if seconds <= REPEATED]
    timings = {name: summary([seconds]) for name, (seconds, _) in single.items() if name not in again}
    timings |= _in_turns(network, again, batch, side, device)
    return [
        Scaling(
            network=network,
            implementation=name,
            batch=batch,
            side=side,
            dtype="float32",
            layout="channels_last" if WAYS[name].layout == torch.channels_last else "contiguous",
            precision=float32_precision(device),
            seconds=timings[name].median,
            p20_seconds=timings[name].p20,
            p80_seconds=timings[name].p80,
            runs=timings[name].runs,
            memory_mb=single[name][1],
            **environment(device),
        )
        for name in names
        if name in timings
    ]


def _in_turns(network: str, names: Sequence[str], batch: int, side: int, device: str) -> dict[str, Timing]:
    """Several calls of each implementation; where they do not fit into memory together, each by itself."""
    if not names:
        return {}
    try:
        return take_turns(
            {name: turn(network, INFERENCE, WAYS[name], batch, side, device) for name in names},
            device,
            seconds=SECONDS_IN_TURNS,
            least=TURNS,
        )
    except torch.OutOfMemoryError:
        alone = [[name] for name in names] if len(names) > 1 else []
    # only now, when the exception holds nothing any more
    return {name: timing for one in alone for name, timing in _in_turns(network, one, batch, side, device).items()}


def _going_on(rows: Sequence[Scaling], left: float, device: str) -> tuple[str, ...]:
    """The implementations whose next size fits into memory and into the seconds left, the faster one first."""
    chosen = []
    for row in sorted(rows, key=lambda row: row.seconds):  # the next size has four times the pixels
        if not _fits(4 * row.memory_mb, device):
            continue
        left -= _seconds_of_all(4 * row.seconds)
        if left < 0:
            break
        chosen.append(row.implementation)
    return tuple(name for name in COMPARED if name in chosen)


def _seconds_of_all(call: float) -> float:
    """What all calls of a size take: the one that measures memory; of what is repeated, a warm-up and the turns too."""
    return call if call > REPEATED else 2 * call + max(TURNS * call, SECONDS_IN_TURNS)


def _fits(memory_mb: float, device: str) -> bool:
    """Whether so much is there: a GPU says itself when its memory ends, a system stops processes."""
    return device == "cuda" or memory_mb <= MEMORY_SHARE * _available_mb()


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024 / 1e6


def _memory_of_sizes(rows: Sequence[dict], network: str, implementation: str) -> list[tuple[int, float]]:
    """Pixels of each single image, ascending, and the bytes above network and image that restoring it needs."""
    return sorted(
        (row["side"] ** 2, 1e6 * row["memory_mb"])
        for row in rows
        if (row["network"], row["implementation"], row["batch"]) == (network, implementation, 1)
    )


def bytes_per_further_pixel(rows: Sequence[dict], network: str, implementation: str) -> float | None:
    """Memory that a further pixel needs, between the two largest images; None with fewer than two sizes."""
    sizes = _memory_of_sizes(rows, network, implementation)
    if len(sizes) < 2:
        return None
    (few, little), (many, much) = sizes[-2:]
    return (much - little) / (many - few)


def largest_side_per_gib(rows: Sequence[dict], network: str, implementation: str) -> int | None:
    """Side of the square image whose restoration needs a GiB above network and image, pixels.

    On the straight line between the first two neighbouring sizes that need less and more than that; None
    where no two do.
    """
    for (few, little), (many, much) in pairwise(_memory_of_sizes(rows, network, implementation)):
        if little <= GIB <= much:
            return int((few + (many - few) * (GIB - little) / (much - little)) ** 0.5)
    return None


def image_per_gib(rows: Sequence[dict], network: str, implementation: str) -> str:
    """The same in words: "964²", "more than 512²" where none measured needs a GiB, "" where all need more."""
    side = largest_side_per_gib(rows, network, implementation)
    if side is not None:
        return f"{side:,}²"
    sizes = _memory_of_sizes(rows, network, implementation)
    return f"more than {sizes[-1][0] ** 0.5:,.0f}²" if sizes and sizes[-1][1] < GIB else ""


def show(rows: Sequence[dict], console: Console) -> None:
    """Print one table per network."""
    columns = ("implementation", "images", "seconds", "p20–p80", "runs", "peak MB")
    for network in dict.fromkeys(row["network"] for row in rows):
        table = Table(*columns, title=f"{network}, inference over size, {rows[0]['dtype']} {rows[0]['precision']}")
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            if row["network"] != network:
                continue
            images = f"{row['batch']} × {row['side']}²" if row["batch"] > 1 else f"{row['side']}²"
            spread = f"{row['p20_seconds']:.3f}–{row['p80_seconds']:.3f}" if row["runs"] > 1 else "one call"
            times = (f"{row['seconds']:.3f}", spread, str(row["runs"]))
            table.add_row(row["implementation"], images, *times, f"{row['memory_mb']:.0f}")
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
        for name in (*COMPARED, *TILED):
            value = bytes_per_further_pixel(rows, network, name)
            if value is not None:
                image = image_per_gib(rows, network, name) or "no image measured"
                text = f"{network}, {name}: {value:.0f} bytes per further pixel, {image} in a GiB"
                console.print(text, soft_wrap=True)
    if options.output:
        write_results(measured, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
