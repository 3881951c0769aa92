"""Everything in one run: operators and whole networks, time, memory and work, as tables, files and pictures.

    mitnet-fast bench [--quick] [--compile] [--output bench]

Writes into the output folder

    bench.csv, bench.json   one row per piece of work and implementation, one schema
    rates.json              copy bandwidth and matrix rate of this machine, measured in the same run
    work.csv, work.json     operators and bytes of a training step, counted
    scaling.csv, .json      inference from small images to large ones
    speedups, roofline, scaling   as .png and .svg
    summary.md              all of it as tables

What fails its check has no speed. Rates and rows come from one process on one machine; where they are
shared with others' work, the ratios hold and the percentiles show how much to trust them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mitnet_fast.ops._backends import FAMILIES
from mitnet_fast.specs import SPECS

from . import models, ops, plots, summary, work
from .measure import environment, machine_rates, take_turns, write_results

QUICK_SECONDS, SECONDS = 0.3, 1.5  # per implementation and piece of work
LARGEST = {"cpu": 512, "cuda": 4096}  # side of the largest image that is restored, pixels


@dataclass(frozen=True)
class Result:
    """One implementation of one piece of work; None where something was not or cannot be measured.

    Attributes:
        kind: "operator" or "network".
        name: of the operator or network.
        work: "forward", "forward + backward", "training step" or "inference".
        case: shapes and options.
        dtype: of the tensors.
        layout: of the maps.
        precision: of float32 products, "IEEE" or "TF32".
        implementation: what ran.
        correct: whether it passed its check.
        problem: why there is no time.
        median_ms, p20_ms, p80_ms: time of a call.
        runs: calls that were timed.
        speedup: over plain PyTorch (networks: the faster of its layouts).
        gigabytes_per_second: bytes that must move at least, over the median.
        bandwidth_share: of the copy bandwidth measured in the same run.
        gigaflops: floating-point operations of the formula, over the median.
        matrix_rate_share: of the matrix rate measured in the same run.
        memory_mb: highest memory above inputs (operators: and results).
        device, threads, torch, triton, python, commit: where, and with what.
    """

    kind: str
    name: str
    work: str
    case: str
    dtype: str
    layout: str
    precision: str
    implementation: str
    correct: bool
    problem: str | None
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    runs: int
    speedup: float | None
    gigabytes_per_second: float | None
    bandwidth_share: float | None
    gigaflops: float | None
    matrix_rate_share: float | None
    memory_mb: float | None
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


@dataclass(frozen=True)
class Scaling:
    """Inference of one network at one image size."""

    network: str
    implementation: str
    side: int
    seconds: float
    memory_mb: float
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


def run(
    output: Path,
    *,
    quick: bool = False,
    compiled: bool = False,
    families: Sequence[str] = FAMILIES,
    networks: Sequence[str] = tuple(models.NETWORKS),
    device: str = "cpu",
    console: Console | None = None,
) -> list[Result]:
    """Measure, print, and write everything into a folder.

    Args:
        output: the folder, made if missing; files of an earlier run are replaced.
        quick: the first case of every operator, short timings, small images.
        compiled: torch.compile of the plain forms as a baseline, which takes minutes for whole networks.
        families: kernel families whose operators are measured.
        networks: whole networks that are measured.
        device: "cpu" or "cuda".
        console: where to print; None makes one.

    Returns:
        The rows of ``bench.csv``.

    Raises:
        ValueError: an unknown family, network or device.
    """
    for name, chosen, allowed in (("families", families, FAMILIES), ("networks", networks, tuple(models.NETWORKS))):
        if unknown := set(chosen) - set(allowed):
            raise ValueError(f"{name}: got {', '.join(sorted(unknown))}, allowed are {', '.join(allowed)}")
    if device not in LARGEST:
        raise ValueError(f"device: got {device!r}, allowed are {', '.join(LARGEST)}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, expected a folder")
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    seconds = QUICK_SECONDS if quick else SECONDS
    specs = [spec for spec in SPECS if spec.family in families]
    cases = [(spec, case) for spec in specs for case in spec.benchmark_cases[: 1 if quick else None]]
    pieces = [(network, piece) for network in networks for piece in models.WORK]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("this machine's rates", total=1 + len(cases) + len(pieces) + len(networks))
        rates = machine_rates(device)
        operator_rows, network_rows, scaling = [], [], []
        for spec, case in cases:
            progress.update(task, advance=1, description=spec.name)
            operator_rows += ops.benchmark(spec, case, device, seconds, compiled)
        for network, piece in pieces:
            progress.update(task, advance=1, description=f"{network}, {piece}")
            size = 64 if quick else 128
            network_rows += models.measure(network, piece, 1 if quick else 2, size, device, seconds, compiled)
        for network in networks:
            progress.update(task, advance=1, description=f"{network}, image sizes")
            scaling += list(_scaling(network, device, 128 if quick else LARGEST[device]))
    counted = [row for network in networks for row in work.rows(network)]
    results = [*(_of_operator(row, rates) for row in operator_rows), *map(_of_network, network_rows)]
    ops.show(operator_rows, console)
    models.show(network_rows, console)
    work.show(counted, console)
    (output / "rates.json").write_text(json.dumps(rates | environment(device), indent=1) + "\n")
    for name, rows in (("bench", results), ("work", counted), ("scaling", scaling)):
        if rows:
            write_results(rows, output / name)
    plots.draw(output)
    (output / "summary.md").write_text(summary.markdown(output))
    console.print(f"written: bench, work, scaling (.csv, .json), plots and summary.md in {output}", soft_wrap=True)
    return results


def _of_operator(row: ops.Row, rates: dict[str, float]) -> Result:
    rate = rates.get(f"matrix_{row.dtype if row.precision == 'IEEE' else 'tf32'}_gflops")
    return Result(
        kind="operator",
        name=row.operator,
        work=row.direction,
        case=row.case,
        dtype=row.dtype,
        layout=row.layout,
        precision=row.precision,
        implementation=row.implementation,
        correct=row.correct,
        problem=None if row.correct else "fails its check",
        median_ms=row.median_ms,
        p20_ms=row.p20_ms,
        p80_ms=row.p80_ms,
        runs=row.runs,
        speedup=row.speedup_over_eager,
        gigabytes_per_second=row.gigabytes_per_second,
        bandwidth_share=row.gigabytes_per_second and row.gigabytes_per_second / rates["copy_gb_per_s"],
        gigaflops=row.gigaflops,
        matrix_rate_share=row.gigaflops and rate and row.gigaflops / rate,
        memory_mb=row.extra_memory_mb,
        **_environment_of(row),
    )


def _of_network(row: models.Row) -> Result:
    return Result(
        kind="network",
        name=row.network,
        work=row.work,
        case=row.shape,
        dtype=row.dtype,
        layout="channels_last" if row.implementation.endswith("channels_last") else "contiguous",
        precision=row.precision,
        implementation=row.implementation,
        correct=row.correct,
        problem=row.problem,
        median_ms=row.median_ms,
        p20_ms=row.p20_ms,
        p80_ms=row.p80_ms,
        runs=row.runs,
        speedup=row.speedup_over_plain,
        gigabytes_per_second=None,
        bandwidth_share=None,
        gigaflops=None,
        matrix_rate_share=None,
        memory_mb=row.peak_memory_mb,
        **_environment_of(row),
    )


def _environment_of(row: ops.Row | models.Row) -> dict[str, str]:
    return {name: getattr(row, name) for name in ("device", "threads", "torch", "triton", "python", "commit")}


def _scaling(network: str, device: str, largest: int) -> Iterator[Scaling]:
    """Seconds and memory of restoring one image, sides doubling from 64 pixels."""
    sides = [64 * 2**step for step in range(int(math.log2(largest / 64)) + 1)]
    for side in sides:
        calls = {
            name: models.turn(network, "inference", models.IMPLEMENTATIONS[name], 1, side, device)
            for name in ("plain", "fused")
        }
        timings = take_turns(calls, device, seconds=0.5, least=2)
        for name, timing in timings.items():
            memory = models.memory_in_own_process(network, "inference", name, 1, side, device)
            yield Scaling(network, name, side, timing.median, memory, **environment(device))
