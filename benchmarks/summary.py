"""A benchmark run as Markdown, and that Markdown in the README.

    python -m benchmarks.summary benchmarks/results/cpu README.md

replaces what stands between the two ``performance`` marks of the README, so that no figure there is
ever written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .plots import where

BEGIN, END = "<!-- performance: written by benchmarks/summary.py -->", "<!-- /performance -->"


def markdown(folder: Path, pictures: str = "") -> str:
    """Tables of what the results in a folder of :mod:`benchmarks.bench` hold.

    Args:
        folder: with ``bench.json``, ``rates.json`` and whatever else the run wrote.
        pictures: where the pictures lie, as seen from the text; the folder itself by default.
    """
    rows = json.loads((folder / "bench.json").read_text())
    rates = json.loads((folder / "rates.json").read_text())
    prefix = f"{pictures}/" if pictures else ""
    lines = [
        f"Measured on {where(rows)}: "
        "medians of one run, all implementations in turns. Limits of the machine in the same run: "
        f"copy {rates['copy_gb_per_s']:.0f} GB/s, "
        + ", ".join(
            f"{name.removeprefix('matrix_').removesuffix('_gflops')} matrix product {rate:.0f} GFLOP/s"
            for name, rate in rates.items()
            if name.startswith("matrix_")
        )
        + ".",
        "",
        f"![How many times faster than plain PyTorch]({prefix}speedups.png)",
        "",
    ]
    lines += _operators([row for row in rows if row["kind"] == "operator"])
    lines += _networks([row for row in rows if row["kind"] == "network"])
    if (folder / "work.json").exists():
        lines += _work(json.loads((folder / "work.json").read_text()))
    if (folder / "scaling.json").exists():
        lines += [f"![Seconds and memory over image size]({prefix}scaling.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _operators(rows: Sequence[dict]) -> Iterator[str]:
    if not rows:
        return
    yield "| operator, forward + backward | | ms (p20–p80) | × eager | extra MB | of copy bandwidth | of matrix rate |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for row in rows:
        if row["work"] == "forward":
            continue
        name = f"`{row['name']}` {row['case']}, {row['dtype']} {row['precision']}"
        yield _row(name, row, row["memory_mb"], _share(row["bandwidth_share"]), _share(row["matrix_rate_share"]))
    yield ""


def _networks(rows: Sequence[dict]) -> Iterator[str]:
    if not rows:
        return
    yield "| network | | ms (p20–p80) | × plain¹ | peak MB |"
    yield "|---|---|--:|--:|--:|"
    for row in rows:
        yield _row(f"{row['name']} {row['case']}, {row['work']}", row, row["memory_mb"])
    yield ""
    yield "¹ against the faster of plain PyTorch's two layouts."
    yield ""


def _row(name: str, row: dict, memory: float | None, *more: str) -> str:
    if row["median_ms"] is None:
        return "| " + " | ".join((name, row["implementation"], row["problem"], "", "", *("" for _ in more))) + " |"
    time = f"{row['median_ms']:.1f} ({row['p20_ms']:.1f}–{row['p80_ms']:.1f})"
    cells = (name, row["implementation"], time, f"{row['speedup']:.2f}", "" if memory is None else f"{memory:.0f}")
    return "| " + " | ".join((*cells, *more)) + " |"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _work(rows: Sequence[dict]) -> Iterator[str]:
    yield "| one training step, counted | | operators | GB |"
    yield "|---|---|--:|--:|"
    for row in rows:
        name = f"{row['network']} {row['shape']}, float32"
        yield f"| {name} | {row['implementation']} | {row['operators']:,} | {row['gigabytes']:.1f} |"
    yield ""
    yield (
        "Counted, not timed: every operator that is no view counts as one and moves its operands and results once, "
        "fused operators what their kernels move (`benchmarks/work.py`)."
    )
    yield ""


def insert(readme: Path, text: str) -> None:
    """Put ``text`` between the README's marks.

    Raises:
        ValueError: the file lacks the marks.
    """
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise ValueError(f"{readme}: expected each of the marks {BEGIN} and {END} once")
    before, _, rest = whole.partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of a run of benchmarks.bench")
    parser.add_argument("readme", type=Path, help="the file that is changed")
    options = parser.parse_args()
    pictures = options.folder.resolve().relative_to(options.readme.resolve().parent)
    insert(options.readme, markdown(options.folder, str(pictures)))


if __name__ == "__main__":
    main()
