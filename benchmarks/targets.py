"""What the kernels and networks are meant to reach, as data, and whether a run's results reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .work import IN_TRITON, ON_CPU

Row = Mapping[str, object]
BEST_COMPILED = ("compile",)
ANY = ("eager", "compile")
LIBRARIES = ("compile", "SDPA")
OWN = ("cpp", "triton", "fused")


@dataclass(frozen=True)
class Target:
    """A number to reach, by the library's own implementation of a piece of work.

    Attributes:
        device: "cpu" or "cuda".
        name: operator or network.
        work: as in :class:`.measure.Result`.
        cases: beginnings of the cases that it holds for; all of them count.
        quantity: "time": how many times faster than the fastest of ``against``; "memory": its memory as a
            share of theirs; "limit": share of the larger of the bandwidth's and the matrix rate's floor;
            "bandwidth": share of the bandwidth's floor alone.
        value: to reach; at most for memory, at least for all else.
        against: beginnings of the names of implementations.
        dtype: of the tensors.
        by: beginnings of the names of the library's own implementations that count, the fastest of them.
    """

    device: str
    name: str
    work: str
    cases: tuple[str, ...]
    quantity: str
    value: float
    against: tuple[str, ...] = ("eager",)
    dtype: str = "float32"
    by: tuple[str, ...] = OWN


@dataclass(frozen=True)
class WorkTarget:
    """The work of a training step to stay within, as :mod:`.work` counts it."""

    network: str
    operators: int
    gigabytes: float


@dataclass(frozen=True)
class Verdict:
    """A target in words, and what was found.

    Attributes:
        subject: whose, and of what.
        aim: what to reach.
        result: what was found, empty where nothing was.
        word: met, missed, or not measured.
    """

    subject: str
    aim: str
    result: str
    word: str


BOTH = "forward + backward"
FILTER_CASES = ("[8, 20, 256, 256]", "[8, 40, 128, 128]", "[8, 80, 64, 64]")
SPECTRAL_CASES = ("[8, 20, 256, 256]", "[8, 40, 128, 128]", "[8, 80, 64, 64]", "[8, 160, 32, 32]")
ATTENTION_CASES = ("[8, 24, 256, 256]", "[8, 48, 128, 128]", "[8, 96, 64, 64]")

TARGETS = (
    Target("cpu", "predicted_dynamic_filter", BOTH, ("[2, 20, 256, 256]",), "time", 5),
    Target("cpu", "predicted_dynamic_filter", BOTH, ("[2, 20, 256, 256]",), "time", 2, BEST_COMPILED),
    Target("cpu", "predicted_dynamic_filter", BOTH, ("[2, 20, 256, 256]",), "memory", 1 / 10),
    Target("cpu", "amplitude_phase_conv", BOTH, ("[2, 20, 256, 256]",), "time", 2),
    Target("cpu", "amplitude_phase_conv", BOTH, ("[2, 20, 256, 256]",), "memory", 1 / 3),
    Target("cpu", "window_attention", BOTH, ("[2, 24, 256, 256]",), "time", 3),
    Target("cpu", "window_attention", BOTH, ("[2, 24, 256, 256]",), "time", 1.5, ("SDPA",)),
    Target("cpu", "window_attention", BOTH, ("[2, 24, 256, 256]",), "memory", 1 / 10),
    *(
        Target("cpu", network, work, ("",), "time", value, ("plain",))
        for network in ("MITNet", "DCMPNet")
        for work, value in (("training step", 1.3), ("inference", 1.5))
    ),
    *(Target("cuda", "predicted_dynamic_filter", work, FILTER_CASES, "limit", 0.75) for work in ("forward", BOTH)),
    Target("cuda", "predicted_dynamic_filter", BOTH, FILTER_CASES[:1], "time", 10),
    Target("cuda", "predicted_dynamic_filter", BOTH, FILTER_CASES, "time", 3, BEST_COMPILED),
    *(Target("cuda", "predicted_dynamic_filter", work, FILTER_CASES, "time", 1, ANY) for work in ("forward", BOTH)),
    Target("cuda", "amplitude_phase_conv", BOTH, SPECTRAL_CASES, "time", 2.5, by=("triton",)),  # transforms by cuFFT
    Target("cuda", "amplitude_phase_conv", BOTH, SPECTRAL_CASES, "time", 4.5),
    Target("cuda", "amplitude_phase_conv", BOTH, SPECTRAL_CASES[:1], "bandwidth", 0.7),
    *(
        Target("cuda", "window_attention", BOTH, ATTENTION_CASES, quantity, value, against, dtype)
        for dtype in ("float32", "bfloat16")
        for quantity, value, against in (("time", 4, ("eager",)), ("time", 2, LIBRARIES), ("limit", 0.7, ("eager",)))
    ),
)


WORK_TARGETS = (WorkTarget("MITNet", 400, 25.0), WorkTarget("DCMPNet", 1000, 90.0))


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """Every target, those of the other kind of device as not measured.

    Args:
        rows: of :class:`.measure.Result`, all of one run.
        device: "cpu" or "cuda", where they were measured.
    """
    return [_judge(target, rows if target.device == device else ()) for target in TARGETS]


def judge_work(rows: Sequence[Row]) -> list[Verdict]:
    """The counted work of the fused networks, rows of :class:`.work.Row`, held against its targets."""
    found = {(row["network"], row["implementation"]): row for row in rows}
    verdicts = []
    for target, implementation in product(WORK_TARGETS, (ON_CPU, IN_TRITON)):
        row = found.get((target.network, implementation), {"operators": None, "gigabytes": None})
        subject = f"{target.network}, {implementation}: {{}} of a training step"
        verdicts += [
            _verdict(subject.format("operators"), row["operators"], target.operators, "{:,.0f}"),
            _verdict(subject.format("GB"), row["gigabytes"], target.gigabytes, "{:.1f}"),
        ]
    return verdicts


def _judge(target: Target, rows: Sequence[Row]) -> Verdict:
    against = " or ".join(target.against)
    words = {
        "time": f"time against {against}",
        "memory": f"memory against {against}",
        "limit": "share of the machine's limit",
        "bandwidth": "share of the copy bandwidth",
    }
    shapes = dict.fromkeys(case[: case.find("]") + 1] for case in target.cases if case)
    kind = {"cpu": "CPU", "cuda": "GPU"}[target.device] + ("" if target.dtype == "float32" else f", {target.dtype}")
    what = " ".join([target.name, " / ".join(shapes)]).strip()
    by = "" if target.by == OWN else f" by {' or '.join(target.by)}"
    subject = f"{kind}: {what}, {target.work}{by}: {words[target.quantity]}"
    form = {"time": "{:.2f}×", "memory": "{:.3f}"}.get(target.quantity, "{:.0%}")
    at_most = target.quantity == "memory"
    worst = max if at_most else min
    found = [_found(target, _of(target, rows, case)) for case in target.cases]
    return _verdict(subject, None if None in found else worst(found), target.value, form, at_most=at_most)


def _verdict(subject: str, found: float | None, aim: float, form: str, *, at_most: bool = True) -> Verdict:
    wanted = ("≤ " if at_most else "≥ ") + form.format(aim)
    if found is None:
        return Verdict(subject, wanted, "", "not measured")
    met = found <= aim if at_most else found >= aim
    return Verdict(subject, wanted, form.format(found), "met" if met else "missed")


def _of(target: Target, rows: Sequence[Row], case: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row["name"], row["work"], row["dtype"]) == (target.name, target.work, target.dtype)
        and str(row["case"]).startswith(case)
    ]


def _found(target: Target, rows: Sequence[Row]) -> float | None:
    """The worst over the rows' cases and layouts of what the target asks for; None where it was not measured."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:  # a network's layouts compete with each other, an operator's are each a case of their own
        key = (row["case"],) if row["kind"] == "network" else (row["case"], row["layout"])
        groups.setdefault(key, []).append(row)
    worst: Callable = max if target.quantity == "memory" else min
    values = [_value(target, group) for group in groups.values()]
    return worst(values) if values and None not in values else None


def _value(target: Target, rows: Sequence[Row]) -> float | None:
    field = "memory_mb" if target.quantity == "memory" else "median_ms"
    ours = [row for row in rows if str(row["implementation"]).startswith(target.by) and row[field]]
    theirs = [row for row in rows if str(row["implementation"]).startswith(target.against) and row[field]]
    if not ours:
        return None
    best = min(ours, key=lambda row: row["median_ms"])
    if target.quantity == "bandwidth":
        return best["bandwidth_share"]
    if target.quantity == "limit":
        shares = [share for share in (best["bandwidth_share"], best["matrix_rate_share"]) if share is not None]
        return max(shares, default=None)
    if not all(any(str(row["implementation"]).startswith(name) for row in theirs) for name in target.against):
        return None  # not yet held against all that it was to be held against
    if target.quantity == "memory":
        return best["memory_mb"] / min(row["memory_mb"] for row in theirs)
    return min(row["median_ms"] for row in theirs) / best["median_ms"]
