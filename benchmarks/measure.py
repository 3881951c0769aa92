"""How time and memory are measured, and what every result says about where it comes from.

Time: implementations of one call take turns, so that a machine whose load changes slows all of them
alike, and rotate through copies of the inputs, so that none finds those that the one before it has just
used. What is reported is the median with the 20th and 80th percentile.

Memory: the highest resident size during one call in a process of its own (CPU) or the allocator's
peak (GPU), above what was there before. Such a process is forked from one that has imported everything
and computed nothing (:mod:`.forker`).
"""

from __future__ import annotations

import csv
import ctypes
import functools
import gc
import json
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LONG = 0.3  # seconds from which on a call needs no second warm-up
TURNS = 5  # of each implementation, at the least


@dataclass(frozen=True)
class Result:
    """One implementation of one piece of work; None where something was not or cannot be measured.

    Attributes:
        kind: "operator" or "network".
        name: of the operator or network.
        work: "forward" or "forward + backward" of an operator; of a network see :mod:`.models`.
        case: shapes and options.
        dtype: of the tensors.
        layout: of the maps.
        precision: of float32 products, "IEEE" or "TF32".
        implementation: what ran.
        problem: why there is no time; None where there is one.
        median_ms, p20_ms, p80_ms: time of a call.
        runs: calls that were timed.
        speedup: over plain PyTorch (networks: the faster of its layouts).
        gigabytes_per_second: bytes that must move at least, over the median; of operators.
        bandwidth_share: of the copy bandwidth measured in the same run.
        gigaflops: floating-point operations of the formula, over the median; of networks those of their
            convolutions and matrix products.
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
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    runs: int


def take_turns(
    calls: Mapping[str, Callable[[int], object]], device: str, *, seconds: float = 2.0, least: int = TURNS
) -> dict[str, Timing]:
    """Time several implementations of the same work, one call of each in turn.

    Args:
        calls: by name; each is given a number that chooses its copy of the inputs, one lower than what the
            call before it in the same turn was given.
        device: "cpu" or "cuda"; on the latter each call is timed by events.
        seconds: roughly how long each implementation runs in all.
        least: turns at the least.
    """
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():  # warm-up: compilation, caches, thread pools
        for turn in range(2):
            durations[name] = [_time(call, turn, device)]
            if durations[name][0] > LONG:
                break
    slowest = max(values[0] for values in durations.values())
    turns = max(least, min(200, int(seconds / max(slowest, 1e-6))))
    durations = {name: [] for name in calls}
    for turn in range(turns):
        for place, (name, call) in enumerate(calls.items()):
            durations[name].append(_time(call, turn - place, device))
    return {name: summary(values) for name, values in durations.items()}


def times_of(timing: Timing | None) -> dict[str, float | int | None]:
    """The fields of :class:`Result` that hold a timing; None stands for one that there is not."""
    if timing is None:
        return {"median_ms": None, "p20_ms": None, "p80_ms": None, "runs": 0}
    milliseconds = {f"{name}_ms": 1e3 * getattr(timing, name) for name in ("median", "p20", "p80")}
    return {**milliseconds, "runs": timing.runs}


def _time(call: Callable[[int], object], turn: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call(turn)
    return time.perf_counter() - begun


def summary(seconds: Sequence[float]) -> Timing:
    """Median and percentiles of several calls' times; of one, that time."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return Timing(statistics.median(seconds), cuts[0], cuts[-1], len(seconds))


def in_new_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a process of its own, see :mod:`.forker`.

    Args:
        function: of a module, found by its name there.
        arguments: for it; they are pickled, and so is the result.

    Raises:
        RuntimeError: it failed there, or the process did.
    """
    module = function.__module__
    if module == "__main__":  # run by python -m
        module = sys.modules[module].__spec__.name
    forker = _forker()
    pickle.dump((module, function.__name__, arguments), forker.stdin)
    forker.stdin.flush()
    result, error = pickle.load(forker.stdout)
    if error is not None:
        raise RuntimeError(f"{module}.{function.__name__}: {error}")
    return result


@functools.cache
def _forker() -> subprocess.Popen:
    command = [sys.executable, "-m", f"{__package__}.forker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # ends when its input does


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that one call needs at its peak above what is there before, its results included.

    On the CPU call this once per process: memory that an earlier call gave back may still be resident.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        raise OSError("peak memory on the CPU is read from /proc, which only Linux has")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from now
    before = _status("VmRSS")
    results = call()
    peak = _status("VmHWM")
    del results
    return peak - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def machine_rates(device: str) -> dict[str, float]:
    """Limits of this machine that speeds are held against.

    Returns:
        ``copy_gb_per_s``: gigabytes per second, read and written; ``matrix_…_gflops``: of a matrix
        product in float32 (IEEE), on a GPU also tf32, bfloat16 and float16.
    """
    large = device == "cuda"
    source = torch.ones(2**28 if large else 2**27, device=device)  # more than any cache
    target = torch.empty_like(source)
    copy = take_turns({"copy": lambda turn: target.copy_(source)}, device, seconds=0.5)["copy"]
    rates = {"copy_gb_per_s": 2 * source.numel() * source.element_size() / copy.median / 1e9}
    size = 8192 if large else 1024
    kinds = {"float32": (torch.float32, "ieee")}
    if large:
        kinds |= {"tf32": (torch.float32, "tf32")}
        kinds |= {str(dtype).removeprefix("torch."): (dtype, "ieee") for dtype in (torch.bfloat16, torch.float16)}
    before = torch.backends.cuda.matmul.fp32_precision
    for name, (dtype, precision) in kinds.items():
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.fp32_precision = precision
        product = take_turns({"mm": lambda turn, a=left, b=right: a @ b}, device, seconds=0.5)["mm"]
        rates[f"matrix_{name}_gflops"] = 2 * size**3 / product.median / 1e9
    torch.backends.cuda.matmul.fp32_precision = before
    return rates


def float32_precision(device: str, *, matrix_products: bool = False) -> str:
    """ "TF32" or "IEEE", as PyTorch is set for the convolutions or the matrix products of float32 on a device."""
    setting = torch.backends.cuda.matmul if matrix_products else torch.backends.cudnn.conv
    return "TF32" if device == "cuda" and setting.fp32_precision == "tf32" else "IEEE"


def with_limits(row: Result, rates: Mapping[str, float]) -> Result:
    """A row with its shares of the limits that were measured in the same run, see :func:`machine_rates`."""
    rate = rates.get(f"matrix_{row.dtype if row.precision == 'IEEE' else 'tf32'}_gflops")
    return replace(
        row,
        bandwidth_share=row.gigabytes_per_second and row.gigabytes_per_second / rates["copy_gb_per_s"],
        matrix_rate_share=row.gigaflops and rate and row.gigaflops / rate,
    )


def environment(device: str) -> dict[str, str]:
    """Device, versions and commit, which every row of a result carries."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of this project's own repository; an installed copy may lie in somebody else's."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def write_results(rows: Sequence[object], stem: Path) -> None:
    """Write dataclass instances, one a row, as ``stem``.csv and ``stem``.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    entries = [asdict(row) for row in rows]
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)
    stem.with_suffix(".json").write_text(json.dumps(entries, indent=1) + "\n")
