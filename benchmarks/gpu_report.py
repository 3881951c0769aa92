"""Everything that only a GPU can say, in one command: ``make gpu-report OUT=folder``.

    python -m benchmarks.gpu_report OUT [--part NAME …] [--minutes 8]

Parts, each with a time limit of its own; one that fails leaves the others standing. First, one after
another, what is measured:

    rates         copy bandwidth and matrix rates of this GPU, which the benchmarks are held against
    graph         training steps of both networks replayed from CUDA graphs, against the same steps run eagerly
    operators-…   speed and memory of a family's operators against eager and torch.compile
    network-…     training steps of MITNet and DCMPNet, in bfloat16 and with data as well
    inference     of MITNet and DCMPNet, and over image size and batch: the largest image per GiB
    demo          a small network trained on this GPU, which precision needs
    precision     its PSNR in TF32, bfloat16 and float16, part by part
    work          operators and bytes of a training step, counted

then, side by side, what is right or wrong:

    machine       doctor's findings
    tests-…       the operators' and Triton kernels' tests on the GPU
    verify-…      every operator × dtype × layout × shape of a backend against float64
    sanitizer-…   compute-sanitizer's memcheck, racecheck, initcheck and synccheck on a small set of calls

Writes OUT/summary.md, with every target of :mod:`.targets` as met, missed or not measured, pictures, and for
each part a log and its CSV or JSON. Downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mitnet_fast.ops._backends import why_not
from mitnet_fast.specs import SPECS, outputs_and_gradients
from mitnet_fast.verify import KERNELS

from . import plots, summary
from .measure import Result, environment, machine_rates, with_limits, write_results

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MEASURED = 0.65  # of the time at most, what is left is for the checks


@dataclass(frozen=True)
class Part:
    """One command of the report.

    Attributes:
        name: of the part and its log.
        command: run as it is.
        seconds: time limit.
        alone: whether nothing else may run meanwhile.
        environment: variables beside those of this process.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    alone: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def kernels_on_gpus() -> dict[str, dict[str, frozenset[torch.dtype]]]:
    """Dtypes of a family's kernels for GPUs by backend, of any of its operators; families without any are left out."""
    found: dict[str, dict[str, frozenset[torch.dtype]]] = {}
    for spec in SPECS:
        for (backend, device), dtypes in KERNELS[spec.name].dtypes.items():
            if device == "cuda":
                backends = found.setdefault(spec.family, {})
                backends[backend] = backends.get(backend, frozenset()) | dtypes
    return found


def parts(folder: Path) -> Iterator[Part]:
    """All parts in their order; those whose tool is missing say so in their log and fail."""
    python = sys.executable
    families = kernels_on_gpus()
    yield Part("rates", (python, "-m", "benchmarks.gpu_report", str(folder), "--rates"), 30, alone=True)
    yield Part("graph", (python, "-m", "benchmarks.graph_steps"), 90, alone=True)
    operators = (python, "-m", "benchmarks.ops", "--device", "cuda", "--batch", "8", "--seconds", "0.3")
    # three shapes, with and without a shift; the hot one of each of many operators
    cases = {"window_attention": ("--cases", "6"), "feature_mixing": ("--cases", "1")}
    half = ("--dtype", "bfloat16", "--layout", "channels_last")
    for family in families:
        output = ("--output", str(folder / f"operators-{family}"))
        words = ("--family", family, *cases.get(family, ("--cases", "3")), "--compile")
        yield Part(f"operators-{family}", (*operators, *words, *output), 90, alone=True)
    networks = (python, "-m", "benchmarks.models", "--device", "cuda", "--batch", "8", "--size", "256")
    for network in ("MITNet", "DCMPNet"):
        words = ("--network", network, "--work", "training step", "--seconds", "1")
        output = ("--output", str(folder / f"network-{network}"))
        yield Part(f"network-{network}", (*networks, *words, *output), 60, alone=True)
    for family in (family for family in families if torch.bfloat16 in frozenset().union(*families[family].values())):
        output = ("--output", str(folder / f"operators-{family}-bfloat16"))
        words = ("--family", family, *cases.get(family, ("--cases", "3")), "--compile", *half)
        yield Part(f"operators-{family}-bfloat16", (*operators, *words, *output), 75, alone=True)
    words = ("--work", "inference", "--seconds", "0.5", "--output", str(folder / "network-inference"))
    yield Part("inference", (*networks, *words), 40, alone=True)
    words = ("--device", "cuda", "--seconds", "10", "--output", str(folder / "scaling"))
    yield Part("inference-sizes", (python, "-m", "benchmarks.scaling", *words), 45, alone=True)
    demo = folder / "demo"
    yield Part("demo", (python, "-m", "mitnet_fast", "demo", "--output", str(demo)), 75, alone=True)
    words = (str(demo / "mitnet-demo.safetensors"), "--device", "cuda", "--output", str(folder / "precision"))
    yield Part("precision", (python, "-m", "benchmarks.precision", *words), 40, alone=True)
    for network in ("MITNet", "DCMPNet"):
        for name, words in (
            ("bfloat16", ("--work", "training step", "--dtype", "bfloat16")),
            ("with-data", ("--work", "training step with data")),
        ):
            output = ("--network", network, "--seconds", "1", "--output", str(folder / f"network-{network}-{name}"))
            yield Part(f"network-{network}-{name}", (*networks, *words, *output), 45, alone=True)
    work = (python, "-m", "benchmarks.work", "--output", str(folder / "work"))
    yield Part("work", work, 60, alone=True)

    yield Part("machine", (python, "-m", "mitnet_fast", "doctor"), 60)
    pytest = (python, "-m", "pytest", "-q", "-n", "4", "--maxfail", "20", "-m", "not exhaustive")
    # every case is in verify, and Triton would compile for every random one
    words = ("-k", "cuda and not every_case and (cpp or not random)")
    yield Part("tests-operators", (*pytest, *words, "tests/ops/test_kernels.py"), 200)
    yield Part("tests-triton", (*pytest, "tests/triton_kernels"), 200)
    for family, backends in families.items():
        for backend in backends:
            words = ("--family", family, "--backend", backend, "--seconds", "120")
            output = ("--json", str(folder / f"verify-{family}-{backend}.json"))
            yield Part(f"verify-{family}-{backend}", (python, "-m", "mitnet_fast", "verify", *words, *output), 200)
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    # every tensor in memory of its own: what lies between two is then out of bounds
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZER_TOOLS:
        calls = (python, "-m", "benchmarks.gpu_report", str(folder), "--calls-for-sanitizer")
        command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *calls)
        yield Part(f"sanitizer-{tool}", command, 200, environment=uncached)


def calls_for_sanitizer() -> None:
    """Every operator on every GPU backend in every dtype: small calls, since each runs very slowly."""
    for spec in SPECS:
        # an odd size, and one for which there are transforms of our own
        cases = spec.typical, replace(spec.typical, sizes=spec.typical.sizes | {"height": 16, "width": 8})
        kernels = KERNELS[spec.name]
        for (backend, device), dtypes in kernels.dtypes.items():
            runnable = [dtype for dtype in sorted(dtypes, key=str) if not why_not(kernels, backend, device, dtype)]
            for dtype in runnable if device == "cuda" else ():
                for case, layout in zip(cases, ("contiguous", "channels_last"), strict=True):
                    variant = replace(case, dtype=dtype, layout=layout)
                    tensors = spec.inputs(variant, device)
                    gradient = spec.gradient(variant, spec.run(variant, tensors, backend))
                    outputs_and_gradients(spec, variant, tensors, gradient, backend)
    torch.cuda.synchronize()


def run_part(part: Part, folder: Path, deadline: float) -> dict[str, object]:
    """Run one part within its limit and what is left until the deadline; its output goes to NAME.log."""
    seconds = min(part.seconds, deadline - time.monotonic())
    if seconds <= 5:
        return {"part": part.name, "result": "not run: no time left", "seconds": 0.0}
    begun = time.monotonic()
    with open(folder / f"{part.name}.log", "w") as log:
        try:
            result = _run(part, log, seconds)
        except OSError as error:
            result = f"could not start: {error}"
    return {"part": part.name, "result": result, "seconds": round(time.monotonic() - begun, 1)}


def _run(part: Part, log: object, seconds: float) -> str:
    process = subprocess.Popen(
        part.command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | part.environment, start_new_session=True
    )
    try:
        code = process.wait(seconds)
        return "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_summary(folder: Path, results: list[dict[str, object]], measured: Sequence[str] = ()) -> None:
    """The parts' results, where they were measured, the rates, and what was measured, as Markdown and JSON."""
    where = environment("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in where.items() if value), ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {entry['part']} | {entry['result']} | {entry['seconds']} |" for entry in results]
    rates = folder / "rates.json"
    if rates.exists():
        lines += ["", "| measured limit | |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in json.loads(rates.read_text()).items()]
    (folder / "summary.md").write_text("\n".join([*lines, "", *measured]) + "\n")
    (folder / "summary.json").write_text(json.dumps({"environment": where, "parts": results}, indent=1) + "\n")


def _measured(folder: Path) -> Iterator[str]:
    """The benchmarks' tables and pictures, once there are limits to hold them against."""
    files = [*sorted(folder.glob("operators-*.json")), *sorted(folder.glob("network-*.json"))]
    if not files or not (folder / "rates.json").exists():
        return
    rates = json.loads((folder / "rates.json").read_text())
    rows = [Result(**row) for file in files for row in json.loads(file.read_text())]
    write_results([with_limits(row, rates) for row in rows], folder / "bench")
    plots.draw(folder)
    yield summary.markdown(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the report goes; made if missing")
    parser.add_argument("--part", action="append", help="only parts whose name starts so; as often as needed")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of the whole report")
    parser.add_argument("--rates", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--calls-for-sanitizer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calls_for_sanitizer:
        calls_for_sanitizer()
        return
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.rates:
        (folder / "rates.json").write_text(json.dumps(machine_rates("cuda"), indent=1) + "\n")
        return
    wanted = [part for part in parts(folder) if not options.part or part.name.startswith(tuple(options.part))]
    if not wanted:
        parser.error(f"--part: got {options.part}, allowed are {', '.join(part.name for part in parts(folder))}")
    begun, seconds = time.monotonic(), 60 * options.minutes
    results: list[dict[str, object]] = []

    def keep(result: dict[str, object]) -> None:
        results.append(result)
        print(f"{result['part']}: {result['result']} ({result['seconds']} s)", flush=True)
        write_summary(folder, results)

    checks = [part for part in wanted if not part.alone]
    for part in wanted:
        if part.alone:
            print(f"{part.name} …", flush=True)
            keep(run_part(part, folder, begun + (MEASURED if checks else 1) * seconds))
    with ThreadPoolExecutor(len(checks) or 1) as pool:
        for finished in as_completed(pool.submit(run_part, part, folder, begun + seconds) for part in checks):
            keep(finished.result())
    write_summary(folder, results, list(_measured(folder)))
    print((folder / "summary.md").read_text())
    sys.exit(any(entry["result"] != "passed" for entry in results))


if __name__ == "__main__":
    main()
