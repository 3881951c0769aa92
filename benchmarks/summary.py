"""A benchmark run as Markdown, and that Markdown in the README.

    python -m benchmarks.summary benchmarks/results/cpu README.md

replaces what stands between the two ``performance`` marks of the README, so that no figure there is
ever written by hand. Besides what :mod:`.bench` writes, the folder may hold ``precision.json`` (of
:mod:`.precision`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mitnet_fast.inference import OVERLAP

from .models import TILE, WITH_DATA
from .plots import where
from .scaling import REPEATED, SIDES, bytes_per_further_pixel, image_per_gib
from .targets import Verdict, judge, judge_work

BEGIN, END = "<!-- performance: written by benchmarks/summary.py -->", "<!-- /performance -->"
Rows = Sequence[Mapping[str, Any]]


def markdown(folder: Path, pictures: str = "") -> str:
    """Tables of what the results in a folder of :mod:`benchmarks.bench` hold.

    Args:
        folder: with ``bench.json``, ``rates.json`` and whatever else was written there.
        pictures: where the pictures lie, as seen from the text; the folder itself by default.
    """
    found = {
        name: json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else []
        for name in ("bench", "work", "work-parts", "scaling", "precision")
    }
    rates = json.loads((folder / "rates.json").read_text())
    prefix = f"{pictures}/" if pictures else ""
    rows = found["bench"]
    lines = [
        f"Measured on {where(rows)}: medians of one run, implementations of the same work in turns, each "
        f"{min(row['runs'] for row in rows if row['runs'])} times or more. Limits of the machine in the same run: "
        f"copy {rates['copy_gb_per_s']:.0f} GB/s, "
        + ", ".join(
            f"{name.removeprefix('matrix_').removesuffix('_gflops')} matrix product {rate:.0f} GFLOP/s"
            for name, rate in rates.items()
            if name.startswith("matrix_")
        )
        + ".",
        "",
    ]
    for kind, title, table in (("network", "networks", _networks), ("operator", "operators", _operators)):
        if chosen := [row for row in rows if row["kind"] == kind]:
            lines += [f"![How many times faster than plain PyTorch: {title}]({prefix}{title}.png)", "", *table(chosen)]
    if any(row["kind"] == "operator" for row in rows):
        lines += [f"![Operations per second below the machine's limits]({prefix}roofline.png)", ""]
    lines += _work(found["work"])
    lines += _parts(found["work-parts"], judge_work(found["work"]))
    if found["scaling"]:
        lines += [f"![Seconds and memory over image size and batch]({prefix}scaling.png)", ""]
        lines += _scaling(found["scaling"])
    lines += _precision(found["precision"])
    device = "cpu" if rows[0]["threads"] else "cuda"
    lines += _targets([*judge(rows, device), *judge_work(found["work"])])
    lines += _not_measured(found, device)
    return "\n".join(lines).rstrip() + "\n"


def _networks(rows: Rows) -> Iterator[str]:
    yield "| network | | ms (p20–p80) | × plain¹ | peak MB | of matrix rate² |"
    yield "|---|---|--:|--:|--:|--:|"
    for row in rows:
        name = f"{row['name']} {row['case']}, {row['work']}, {row['dtype']} {row['precision']}"
        yield _row(name, row, row["memory_mb"], _share(row["matrix_rate_share"]))
    yield ""
    yield (
        "¹ against the faster of plain PyTorch's two layouts. A training step is forward, losses, backward and Adam; "
        '"with data" reads, decodes and augments its photographs from disk. ² by the operations of convolutions and '
        "matrix products alone."
    )
    yield ""


def _operators(rows: Rows) -> Iterator[str]:
    yield from _folded("every operator and shape")
    yield "| operator, forward + backward | | ms (p20–p80) | × eager | extra MB | of copy bandwidth | of matrix rate |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for row in rows:
        if row["work"] == "forward":
            continue
        name = f"`{row['name']}` {row['case']}, {row['dtype']} {row['precision']}, {row['layout']}"
        yield _row(name, row, row["memory_mb"], _share(row["bandwidth_share"]), _share(row["matrix_rate_share"]))
    yield ""
    yield (
        "Shares are those of the bytes that must move at least and of the formula's operations: a minimal filtering "
        "algorithm does fewer, and may come to more than 100 %."
    )
    yield from ("", "</details>", "")


def _folded(title: str) -> Iterator[str]:
    yield from ("<details>", f"<summary>{title}</summary>", "")


def _row(name: str, row: Mapping[str, Any], memory: float | None, *more: str) -> str:
    if row["median_ms"] is None:
        return "| " + " | ".join((name, row["implementation"], row["problem"], "", "", *("" for _ in more))) + " |"
    time = f"{row['median_ms']:.1f} ({row['p20_ms']:.1f}–{row['p80_ms']:.1f})"
    cells = (name, row["implementation"], time, f"{row['speedup']:.2f}", "" if memory is None else f"{memory:.0f}")
    return "| " + " | ".join((*cells, *more)) + " |"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _work(rows: Rows) -> Iterator[str]:
    if not rows:
        return
    yield "| one training step, counted | | operators | kernels | GB |"
    yield "|---|---|--:|--:|--:|"
    for row in rows:
        name = f"{row['network']} {row['shape']}, float32"
        kernels = "" if row["kernels"] is None else f"{row['kernels']:,}"
        cells = (name, row["implementation"], f"{row['operators']:,}", kernels, f"{row['gigabytes']:.1f}")
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield (
        "Counted, not timed, of a network's forward and backward without losses and Adam: every operator that is no "
        "view counts as one and moves its operands and results once, fused operators what their kernels move "
        "(`benchmarks/work.py`). Kernels are those that fused operators launch in Triton, and one for each operator of "
        "PyTorch's."
    )
    yield ""


def _parts(rows: Rows, verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not rows:
        return
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    moved = {(row["network"], row["part"], row["implementation"]): row["gigabytes"] for row in rows}
    operators = {(row["network"], row["part"]): row["operators"] for row in rows}
    yield "| what a fused step is made of | | operators |" + "".join(f" GB, {name} |" for name in implementations)
    yield "|---|---|--:|" + "--:|" * len(implementations)
    for (network, part), count in operators.items():
        amounts = (moved.get((network, part, name)) for name in implementations)
        cells = ("" if amount is None else f"{amount:.1f}" for amount in amounts)
        yield f"| {network} | {part} | {count:,} | {' | '.join(cells)} |"
    yield ""
    missed = [each for each in verdicts if each.word == "missed"]
    if missed:
        above = "; ".join(f"{each.subject} {each.result}, {each.aim} wanted" for each in missed)
        yield f"Above what was aimed at: {above}."
        yield ""
    if len(implementations) > 1:
        yield (
            "Most kernels on a CPU keep in its cache the maps that lie between the products of one operator; Triton's "
            "write them and read them again, in the backward several times: that is where its column is larger. What "
            "neither of them has a part in are the library's strided, transposed and single convolutions, and the sums "
            "of the gradients of maps that several parts read."
        )
        yield ""


def _scaling(rows: Rows) -> Iterator[str]:
    yield (
        "| inference of one image | | largest | calls³ | s per megapixel | bytes per further pixel⁴ "
        "| largest image per GiB⁴ |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|"
    one = [row for row in rows if row["batch"] == 1]
    for network, implementation in dict.fromkeys((row["network"], row["implementation"]) for row in one):
        chosen = [row for row in one if (row["network"], row["implementation"]) == (network, implementation)]
        largest = max(chosen, key=lambda row: row["side"])
        further = bytes_per_further_pixel(rows, network, implementation)
        cells = (
            f"{largest['side']}²",
            str(largest["runs"]),
            f"{1e6 * largest['seconds'] / largest['side'] ** 2:.2f}",
            "" if further is None else f"{further:,.0f}",
            image_per_gib(rows, network, implementation),
        )
        yield "| " + " | ".join((network, implementation, *cells)) + " |"
    yield ""
    first = rows[0]
    yield (
        f"{first['dtype']}, {first['precision']}; whole images up to where time or memory ends (commit "
        f"{first['commit']}). Larger ones go by tiles that overlap by {OVERLAP} pixels or more: `dehaze --tile {TILE}`."
    )
    yield ""
    yield (
        f"³ timed at the largest size: a call of more than {REPEATED:.0f} s is the only one and cold, shorter ones "
        "are warmed up and take turns, and their median counts."
    )
    yield ""
    yield (
        "⁴ memory above network and image: what a further pixel takes is that between the two largest sizes; the "
        "image that needs a GiB is interpolated between the two sizes that need less and more."
    )
    yield ""


def _precision(rows: Rows) -> Iterator[str]:
    if not rows:
        return
    yield "| demo network | computed in lower precision | | PSNR, dB | change, dB | largest change of 255 |"
    yield "|---|---|---|--:|--:|--:|"
    for row in rows:
        cells = (row["network"], row["part"], row["precision"])
        numbers = (f"{row['psnr']:.3f}", f"{row['psnr_change']:+.3f}", f"{row['largest_change']:.1f}")
        yield "| " + " | ".join((*cells, *numbers)) + " |"
    yield ""
    first = rows[0]
    yield (
        f"Mean of {first['images']} hazy photographs that the demo's training has not seen, on {first['device']} "
        f"(commit {first['commit']}); the rest of the network in float32."
    )
    yield ""


def _targets(verdicts: Sequence[Verdict]) -> Iterator[str]:
    words = [verdict.word for verdict in verdicts]
    yield from _folded(
        "targets: " + ", ".join(f"{words.count(word)} {word}" for word in ("met", "missed", "not measured"))
    )
    yield "| target | to reach | found | |"
    yield "|---|--:|--:|---|"
    for verdict in verdicts:
        yield f"| {verdict.subject} | {verdict.aim} | {verdict.result} | {verdict.word} |"
    yield from ("", "</details>", "")


def _not_measured(found: Mapping[str, Rows], device: str) -> Iterator[str]:
    networks, operators = ([row for row in found["bench"] if row["kind"] == kind] for kind in ("network", "operator"))
    of_operators = {(row["name"], row["case"], row["dtype"], row["layout"]) for row in operators}
    of_networks = {(row["name"], row["work"]) for row in networks if row["work"] != WITH_DATA}
    for row in found["bench"]:
        if row["implementation"].startswith("compile"):
            of_operators.discard((row["name"], row["case"], row["dtype"], row["layout"]))
            of_networks.discard((row["name"], row["work"]))
    kinds = sorted({f"{row['dtype']}, {row['layout']}" for row in operators})
    largest = {row["network"]: row["side"] for row in sorted(found["scaling"], key=lambda row: row["side"])}
    ended = [f"{side}² ({name})" for name, side in largest.items() if side < SIDES[-1]]
    missing = {
        "anything on a GPU (`make gpu-report` does)": device == "cpu",
        "whole networks under `torch.compile` (`--compile`, minutes)": of_networks,
        f"{len(of_operators)} operators and shapes under `torch.compile` (`--compile`)": of_operators,
        f"operators in other types and layouts than {' and '.join(kinds)} (`python -m benchmarks.ops`)": operators,
        "memory of whole networks": all(row["memory_mb"] is None for row in networks),
        f"images larger than {' and '.join(ended)}": ended,
        "images of other sizes": not largest,
        "counted work": not found["work"],
        "what lower precision costs": not found["precision"],
    }
    if any(missing.values()):
        yield f"Not measured: {'; '.join(what for what, is_missing in missing.items() if is_missing)}."


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
