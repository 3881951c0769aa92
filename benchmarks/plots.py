"""Pictures of a benchmark run as PNG and SVG: speed-ups, roofline, and inference over image size and batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from math import atan2, degrees
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

INK, FAINT, GRID = "#1f2328", "#59636e", "#d9dee3"
COLOURS = {"plain": "#9aa4af", "compile": "#d9a441", "kernel": "#1f6feb", "second kernel": "#8250df"}
NETWORK_COLOURS = ("#1f6feb", "#bc4c00")
STYLE = {"plain": (0, (3, 2)), "fused": "-", "tiles": ":"}
MARKERS = "osD^vPX*ph<>"
PICTURES = ("operators", "networks", "roofline", "scaling")


def draw(folder: Path) -> list[Path]:
    """Draw what the results in a folder of :mod:`benchmarks.bench` hold.

    Args:
        folder: with ``bench.json``, ``rates.json`` and, where networks were measured, ``scaling.json``.

    Returns:
        The files written; pictures of an earlier run are gone.
    """
    rows = json.loads((folder / "bench.json").read_text())
    rates = json.loads((folder / "rates.json").read_text())
    figures = {}
    if operators := [row for row in rows if row["kind"] == "operator" and row["median_ms"]]:
        figures["operators"] = speedups([row for row in operators if row["work"] != "forward"])
        figures["roofline"] = roofline(operators, rates)
    if networks := [row for row in rows if row["kind"] == "network" and row["median_ms"]]:
        figures["networks"] = speedups(networks)
    if (folder / "scaling.json").exists():
        figures["scaling"] = scaling(json.loads((folder / "scaling.json").read_text()))
    written = []
    for name in PICTURES:
        for suffix in ("png", "svg"):
            file = folder / f"{name}.{suffix}"
            file.unlink(missing_ok=True)
            if name in figures:
                # neither dates nor random names: the same results give the same files
                with rc_context({"svg.hashsalt": name}):
                    metadata = {"Date": None} if suffix == "svg" else None
                    figures[name].savefig(file, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)
                written.append(file)
    return written


def colour_of(implementation: str) -> str:
    """Grey for plain PyTorch, amber for compilers and other libraries, blue and violet for our kernels."""
    if implementation.startswith(("eager", "plain")):
        return COLOURS["plain"]
    if implementation.startswith(("cpp", "fused")):
        return COLOURS["kernel"]
    return COLOURS["second kernel"] if implementation == "triton" else COLOURS["compile"]


def speedups(rows: Sequence[dict]) -> Figure:
    """Bars, one group per piece of work: how many times faster than plain PyTorch, its own bars among them."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['name']}  {row['case']}\n{row['work']}, {row['dtype']}", []).append(row)
    figure = Figure(figsize=(8.5, 0.9 + 0.2 * sum(len(group) + 1 for group in groups.values())))
    axes = figure.add_subplot()
    longest = max(row["speedup"] for row in rows)
    position, ticks = 0.0, []
    for group in groups.values():
        ticks.append(position + (len(group) - 1) / 2)
        for row in group:
            axes.barh(position, row["speedup"], height=0.86, color=colour_of(row["implementation"]))
            text = f"{row['speedup']:.2f}×  {row['implementation']}"
            axes.text(
                row["speedup"] + 0.01 * longest,
                position,
                text,
                va="center",
                fontsize=7.5,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            position += 1
        position += 1
    axes.set_yticks(ticks, list(groups), fontsize=7.5, color=INK)
    axes.set_ylim(position - 1.2, -0.8)
    axes.set_xlim(0, 1.45 * longest)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1.5)
    axes.set_xlabel("times as fast as plain PyTorch, medians of one run", fontsize=8, color=FAINT)
    axes.set_title(where(rows), fontsize=8, color=FAINT, loc="left")
    _plain(axes, grid="x")
    return figure


def roofline(rows: Sequence[dict], rates: dict[str, float]) -> Figure:
    """Operations per second over operations per byte, below the limits measured in the same run.

    A thin line joins the implementations of one case, which differ in nothing but time.
    """
    figure = Figure(figsize=(8.5, 4.6))
    axes = figure.add_subplot()
    points = [row for row in rows if row["work"] == "forward + backward"]
    intensity = [row["gigaflops"] / row["gigabytes_per_second"] for row in points]
    span = (min([0.5, *intensity]) / 1.5, max([32, *intensity]) * 1.5)
    copy = rates["copy_gb_per_s"]
    for name, rate in rates.items():
        if not name.startswith("matrix_"):
            continue
        axes.plot((span[0], rate / copy, span[1]), (span[0] * copy, rate, rate), color=INK, linewidth=1)
        label = f"{name.removeprefix('matrix_').removesuffix('_gflops')} products {rate:.0f} GFLOP/s"
        axes.text(span[1] / 1.05, rate, label, va="bottom", ha="right", fontsize=8, color=FAINT)
    markers = dict(zip(dict.fromkeys(row["name"] for row in points), itertools.cycle(MARKERS), strict=False))
    cases: dict[tuple, list[tuple[float, dict]]] = {}
    for place, row in zip(intensity, points, strict=True):
        cases.setdefault((row["name"], row["case"], row["dtype"], row["layout"]), []).append((place, row))
    for group in cases.values():
        heights = [row["gigaflops"] for _, row in group]
        axes.plot([group[0][0]] * 2, [min(heights), max(heights)], color=GRID, linewidth=1.2, zorder=1)
        for place, row in group:
            style = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(place, row["gigaflops"], markers[row["name"]], color=colour_of(row["implementation"]), **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    _readable(axes.yaxis)
    axes.set_xlim(span)
    along = axes.transData.transform([(span[0], span[0] * copy), (2 * span[0], 2 * span[0] * copy)])
    axes.annotate(
        f"copy {copy:.0f} GB/s",
        (1.3 * span[0], 1.3 * span[0] * copy),
        xytext=(0, 3),
        textcoords="offset points",
        rotation=degrees(atan2(*(along[1] - along[0])[::-1])),
        rotation_mode="anchor",
        fontsize=8,
        color=FAINT,
    )
    axes.set_xlabel("FLOP per byte that must move at least", fontsize=8, color=FAINT)
    axes.set_ylabel("GFLOP/s", fontsize=8, color=FAINT)
    axes.set_title("forward + backward; " + where(rows), fontsize=8, color=FAINT, loc="left")
    implementations = dict.fromkeys(row["implementation"] for row in points)
    _legend(axes, [("s", colour_of(name), name) for name in implementations], "upper left", 1.0)
    _legend(axes, [(marker, FAINT, name) for name, marker in markers.items()], "lower left", 0.0)
    _plain(axes, grid="both")
    return figure


def _legend(axes: Axes, entries: Iterable[tuple[str, str, str]], place: str, height: float) -> None:
    """Marker, colour and words of each entry, right of the axes."""
    handles = [
        Line2D([], [], marker=marker, color=colour, linestyle="", markersize=6, label=words)
        for marker, colour, words in entries
    ]
    beside = {"bbox_to_anchor": (1.01, height), "bbox_transform": axes.transAxes, "borderaxespad": 0}
    axes.figure.legend(handles=handles, fontsize=8, frameon=False, loc=place, **beside)


def scaling(rows: Sequence[dict]) -> Figure:
    """Seconds and memory of restoring one image over its side, and seconds per image over the batch.

    Thin bars are the 20th to the 80th percentile; a time that rests on a single call has a hollow mark.
    """
    several = [row for row in rows if row["batch"] > 1]
    panels = [
        ("seconds per image", "side", "seconds", lambda row: row["batch"] == 1),
        ("peak memory, MB", "side", "memory_mb", lambda row: row["batch"] == 1),
    ]
    if several:
        side = several[0]["side"]
        panels.append((f"seconds per image of {side}²", "batch", "seconds", lambda row: row["side"] == side))
    figure = Figure(figsize=(4 * len(panels), 3.4))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for column, (label, over, field, belongs) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), 1 + column)
        chosen = [row for row in rows if belongs(row)]
        for network, colour in zip(networks, NETWORK_COLOURS, strict=False):
            for kind, style in STYLE.items():
                line = [r for r in chosen if r["network"] == network and r["implementation"].startswith(kind)]
                if line:
                    drawn = {"color": colour, "linestyle": style, "label": f"{network}, {kind}"}
                    _with_percentiles(axes, line, over, field, **drawn)
        places = sorted({row[over] for row in chosen})
        axes.set_xscale("log", base=2)
        if over == "side":
            axes.set_yscale("log")
            _readable(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(places, [f"{place}²" if over == "side" else str(place) for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("image, pixels" if over == "side" else "images at once", fontsize=8, color=FAINT)
        axes.set_title(label, fontsize=9, color=INK, loc="left")
        _plain(axes, grid="both")
        if over == "side":
            axes.tick_params(axis="x", labelsize=7)  # so that eight sizes have room
        if column == 0:
            axes.legend(fontsize=7.5, frameon=False)
    words = f"inference, {rows[0]['dtype']} {rows[0]['precision']}; {where(rows)}"
    if any(row["runs"] == 1 for row in rows):
        words += "; hollow: a single call"
    figure.suptitle(words, fontsize=8, color=FAINT, x=0.125, y=0.99, ha="left")
    figure.subplots_adjust(wspace=0.25, top=0.86)
    return figure


def _with_percentiles(axes: Axes, rows: Sequence[dict], over: str, field: str, *, color: str, **line) -> None:
    """A line of what one image takes, and of times the percentiles and what rests on one call."""
    places = [row[over] for row in rows]
    images = [row["batch"] if field == "seconds" else 1 for row in rows]
    values = [row[field] / count for row, count in zip(rows, images, strict=True)]
    hollow = [index for index, row in enumerate(rows) if field == "seconds" and row["runs"] == 1]
    filled = [index for index in range(len(rows)) if index not in hollow]
    axes.plot(places, values, marker="o", markersize=3.5, markevery=filled, color=color, **line)
    if field == "seconds":
        low, high = ([row[f"{cut}_seconds"] / row["batch"] for row in rows] for cut in ("p20", "p80"))
        axes.vlines(places, low, high, color=color, linewidth=0.8)
    marks = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": color, "linestyle": ""}
    axes.plot([places[index] for index in hollow], [values[index] for index in hollow], **marks)


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


def _plain(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(GRID)
