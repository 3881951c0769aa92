"""Everything in one run: operators and whole networks, time, memory and work, as tables, files and pictures.

    mitnet-fast bench [--quick] [--compile] [--output bench]

Writes into the output folder

    bench.csv, bench.json   one row per piece of work and implementation, one schema (:class:`.measure.Result`)
    rates.json              copy bandwidth and matrix rate of this machine, measured in the same run
    work.csv, work.json     operators and bytes of a training step, counted
    work-parts.csv, .json   what the fused networks' steps are made of
    scaling.csv, .json      inference from small images to large ones, and of several at once
    operators, networks, roofline, scaling   as .png and .svg
    summary.md              all of it as tables, held against the targets

The first case of an operator of every family (:data:`COMPILED`) is held against torch.compile as well, all
cases and whole networks with ``--compile``. ``--quick`` measures small cases for a short time; it leaves out
torch.compile, what networks need of memory, image sizes and work.

What fails its check has no speed. Rates and rows come from one process on one machine; where they are
shared with others' work, the ratios hold and the percentiles show how much to trust them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from mitnet_fast.ops._backends import FAMILIES
from mitnet_fast.specs import SPECS, Case

from . import models, ops, plots, scaling, summary, work
from .measure import Result, environment, machine_rates, with_limits, write_results

DEVICES = ("cpu", "cuda")
QUICK_SECONDS, SECONDS = 0.2, 0.6  # per implementation and piece of work
SCALING_SECONDS = 30.0  # per network, for images one at a time
BATCHES = (1, 4)  # images at once
COMPILED = ("predicted_dynamic_filter", "amplitude_phase_conv", "window_attention", "pointwise_mlp")  # one a family


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
        quick: the first case of every operator at half its height and width, networks on one small image, short
            timings; neither torch.compile nor memory of networks nor image sizes nor counted work.
        compiled: torch.compile of all plain forms as a baseline, which takes minutes for whole networks.
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
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, allowed are {', '.join(DEVICES)}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, expected a folder")
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    seconds = QUICK_SECONDS if quick else SECONDS
    batch, size = (1, 64) if quick else (8, 256) if device == "cuda" else (2, 128)
    specs = [spec for spec in SPECS if spec.family in families]
    cases = [
        (spec, case)
        for spec in specs
        for case in ([_halved(spec.benchmark_cases[0])] if quick else spec.benchmark_cases)
    ]
    pieces = [(network, piece) for network in networks for piece in models.WORK]
    results: list[Result] = []
    sizes: list[scaling.Scaling] = []
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # what its compiler says of plain PyTorch
        whole = () if quick else networks
        total = 1 + len(cases) + len(pieces) + 2 * len(whole)
        task = progress.add_task("this machine's rates", total=total)

        def begin(what: str) -> None:
            progress.update(task, advance=1, description=what)

        rates = machine_rates(device)
        for spec, case in cases:
            begin(spec.name)
            is_main = spec.name in COMPILED and case is spec.benchmark_cases[0]
            rows = ops.benchmark(spec, case, device, seconds, compiled or (is_main and not quick))
            results += [with_limits(row, rates) for row in rows]
        for network, piece in pieces:
            begin(f"{network}, {piece}")
            rows = models.measure(network, piece, batch, size, device, seconds, compiled=compiled, quick=quick)
            results += [with_limits(row, rates) for row in rows]
        for network in whole:
            begin(f"{network}, image sizes")
            sizes += scaling.measure(network, device, SCALING_SECONDS, batches=BATCHES)
        counted, parts = [], []
        for network in whole:
            begin(f"{network}, work")
            counted += work.rows(network)
            parts += work.parts(network)
    ops.show([row for row in results if row.kind == "operator"], console)
    models.show([row for row in results if row.kind == "network"], console)
    if whole:
        scaling.show([asdict(row) for row in sizes], console)
        work.show(counted, console)
    (output / "rates.json").write_text(json.dumps(rates | environment(device), indent=1) + "\n")
    tables = {"bench": results, "work": counted, "work-parts": parts, "scaling": sizes}
    for name, rows in tables.items():
        for stale in output.glob(f"{name}.*"):
            stale.unlink()
        if rows:
            write_results(rows, output / name)
    plots.draw(output)
    (output / "summary.md").write_text(summary.markdown(output))
    names = ", ".join(name for name, rows in tables.items() if rows)
    console.print(f"written: {names} (.csv, .json), plots and summary.md in {output}", soft_wrap=True)
    return results


def _halved(case: Case) -> Case:
    """The case at half its height and width."""
    return replace(case, sizes=case.sizes | {side: case.sizes[side] // 2 for side in ("height", "width")})
