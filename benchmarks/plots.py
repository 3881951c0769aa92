"""Pictures of a benchmark run: speed-ups, roofline, and inference over image size, as PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

INK, FAINT, GRID = "#1f2328", "#59636e", "#d9dee3"
COLOURS = {"plain": "#9aa4af", "compile": "#d9a441", "kernel": "#1f6feb", "second kernel": "#8250df"}
NETWORK_COLOURS = ("#1f6feb", "#bc4c00")
STYLE = {"plain": (0, (3, 2)), "fused": "-"}


def draw(folder: Path) -> list[Path]:
    """Draw what the results in a folder of :mod:`benchmarks.bench` hold.

    Args:
        folder: with ``bench.json``, ``rates.json`` and, where networks were measured, ``scaling.json``.

    Returns:
        The files written.
    """
    rows = json.loads((folder / "bench.json").read_text())
    rates = json.loads((folder / "rates.json").read_text())
    figures = {"speedups": speedups(rows)}
    if any(row["kind"] == "operator" and row["median_ms"] for row in rows):
        figures["roofline"] = roofline(rows, rates)
    if (folder / "scaling.json").exists():
        figures["scaling"] = scaling(json.loads((folder / "scaling.json").read_text()))
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=150, bbox_inches="tight", facecolor="white")
    return written


def colour_of(implementation: str) -> str:
    """Grey for plain PyTorch, amber for compilers and other libraries, blue and violet for our kernels."""
    if implementation.startswith(("eager", "plain")):
        return COLOURS["plain"]
    if implementation.startswith(("cpp", "fused")):
        return COLOURS["kernel"]
    return COLOURS["second kernel"] if implementation == "triton" else COLOURS["compile"]


def speedups(rows: Sequence[dict]) -> Figure:
    """Bars: how many times faster than plain PyTorch, forward + backward, training step and inference."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["work"] != "forward" and row["speedup"]:
            groups.setdefault(f"{row['name']}, {row['work']}\n{row['case']}", []).append(row)
    height = sum(len(group) + 1.2 for group in groups.values())
    figure = Figure(figsize=(8.5, 0.8 + 0.24 * height))
    axes = figure.add_subplot()
    position, ticks = 0.0, []
    longest = max(row["speedup"] for group in groups.values() for row in group)
    for group in groups.values():
        ticks.append(position + (len(group) - 1) / 2)
        for row in group:
            axes.barh(position, row["speedup"], height=0.82, color=colour_of(row["implementation"]))
            axes.text(
                row["speedup"] + 0.01 * longest,
                position,
                f"{row['speedup']:.1f}×  {row['implementation']}",
                va="center",
                fontsize=8,
                color=INK,
            )
            position += 1
        position += 1.2
    axes.set_yticks(ticks, list(groups), fontsize=8, color=INK)
    axes.set_ylim(position - 1.2, -1)
    axes.set_xlim(0, 1.3 * longest)
    axes.axvline(1, color=FAINT, linewidth=0.8)
    axes.set_xlabel("times as fast as plain PyTorch on the same machine, medians", fontsize=9, color=FAINT)
    axes.set_title(where(rows), fontsize=9, color=FAINT, loc="left")
    _plain(axes, grid="x")
    return figure


def roofline(rows: Sequence[dict], rates: dict[str, float]) -> Figure:
    """Operations per second over operations per byte, below the limits measured in the same run."""
    figure = Figure(figsize=(7, 4.6))
    axes = figure.add_subplot()
    points = [row for row in rows if row["gigaflops"] and row["work"] == "forward + backward"]
    intensities = [row["gigaflops"] / row["gigabytes_per_second"] for row in points]
    span = (min([0.5, *intensities]) / 2, max([32, *intensities]) * 2)
    for name, rate in rates.items():
        if not name.startswith("matrix_"):
            continue
        ridge = rate / rates["copy_gb_per_s"]
        axes.plot((span[0], ridge, span[1]), (span[0] * rates["copy_gb_per_s"], rate, rate), color=INK, linewidth=1)
        label = f"{name.removeprefix('matrix_').removesuffix('_gflops')} {rate:.0f} GFLOP/s"
        axes.text(span[1], rate, label, va="bottom", ha="right", fontsize=8, color=FAINT)
    axes.annotate(
        f"copy {rates['copy_gb_per_s']:.0f} GB/s",
        (span[0], span[0] * rates["copy_gb_per_s"]),
        xytext=(4, 22),
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )
    markers = dict(zip(dict.fromkeys(row["name"] for row in points), "osD^vP", strict=False))
    labelled = set()
    for row, intensity in zip(points, intensities, strict=True):
        kind = (row["name"], colour_of(row["implementation"]))
        label = None if kind in labelled else f"{row['name']}, {row['implementation']}"
        labelled.add(kind)
        axes.plot(
            intensity,
            row["gigaflops"],
            markers[row["name"]],
            color=kind[1],
            label=label,
            markersize=6,
            markeredgecolor="white",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    _readable(axes.yaxis)
    axes.set_xlim(span)
    axes.set_xlabel("FLOP per byte that must move at least", fontsize=9, color=FAINT)
    axes.set_ylabel("GFLOP/s", fontsize=9, color=FAINT)
    axes.set_title("forward + backward; " + where(rows), fontsize=9, color=FAINT, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _plain(axes, grid="both")
    return figure


def scaling(rows: Sequence[dict]) -> Figure:
    """Seconds and memory of restoring one image, over its side."""
    figure = Figure(figsize=(9, 3.6))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for column, (field, label) in enumerate((("seconds", "seconds per image"), ("memory_mb", "peak memory, MB"))):
        axes = figure.add_subplot(1, 2, 1 + column)
        for network, colour in zip(networks, NETWORK_COLOURS, strict=False):
            for implementation, style in STYLE.items():
                chosen = [row for row in rows if (row["network"], row["implementation"]) == (network, implementation)]
                axes.plot(
                    [row["side"] for row in chosen],
                    [row[field] for row in chosen],
                    linestyle=style,
                    marker="o",
                    markersize=3.5,
                    color=colour,
                    label=f"{network}, {implementation}",
                )
        sides = sorted({row["side"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _readable(axes.yaxis)
        axes.set_xticks(sides, [f"{side}²" for side in sides])
        axes.set_xlabel("image, pixels", fontsize=9, color=FAINT)
        axes.set_title(label, fontsize=9, color=INK, loc="left")
        _plain(axes, grid="both")
        if column == 0:
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle("inference of one image; " + where(rows), fontsize=9, color=FAINT, x=0.12, ha="left")
    figure.subplots_adjust(wspace=0.25, top=0.86)
    return figure


def where(rows: Sequence[dict]) -> str:
    """Device, threads, version and commit of a run's rows."""
    first = rows[0]
    threads = {"": "", "1": ", one thread"}.get(first["threads"], f", {first['threads']} threads")
    return f"{first['device']}{threads}, torch {first['torch']}, commit {first['commit']}"


def _readable(axis) -> None:
    """Ticks of a logarithmic axis: 1, 2 and 5 of every decade, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _plain(axes, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(GRID)
