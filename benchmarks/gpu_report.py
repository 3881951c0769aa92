"""Everything that only a GPU can say, in one command: ``make gpu-report OUT=folder``.

    python -m benchmarks.gpu_report OUT [--part NAME …] [--minutes 9]

Parts, each with a time limit of its own; one that fails leaves the others standing:

    machine     doctor's findings and nvidia-smi
    tests       the operators' and Triton kernels' tests on the GPU
    verify      every operator × backend × dtype × layout × shape against float64
    rates       copy bandwidth and matrix rates of this GPU, which the benchmarks are held against
    operators   speed and memory of the operators against eager and torch.compile
    resources   registers, spills, shared memory and occupancy of every kernel
    sanitizer   compute-sanitizer's memcheck, racecheck, initcheck and synccheck on a small set of calls

Writes OUT/summary.md, and for each part a log and its CSV or JSON. Downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import environment, machine_rates

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Part:
    """One command of the report.

    Attributes:
        name: of the part and its log.
        command: run with this interpreter, or as it is where it starts with a program's path.
        seconds: time limit.
    """

    name: str
    command: tuple[str, ...]
    seconds: int


def parts(folder: Path) -> Iterator[Part]:
    """All parts in their order; those whose tool is missing say so in their log and fail."""
    python = sys.executable
    yield Part("machine", (python, "-m", "mitnet_fast", "doctor"), 30)
    tests = ("tests/ops", "tests/triton_kernels", "tests/test_extension.py")
    yield Part("tests", (python, "-m", "pytest", "-q", "-m", "not exhaustive", "-x", "--maxfail=20", *tests), 150)
    yield Part("verify", (python, "-m", "mitnet_fast", "verify", "--json", str(folder / "verify.json")), 90)
    yield Part("rates", (python, "-m", "benchmarks.gpu_report", str(folder), "--rates"), 30)
    for dtype in ("float32", "bfloat16"):
        for layout in ("contiguous", "channels_last"):
            stem = folder / f"operators-{dtype}-{layout}"
            words = ("--device", "cuda", "--dtype", dtype, "--layout", layout, "--batch", "8", "--seconds", "0.3")
            compiled = ("--compile",) if layout == "contiguous" else ()
            command = (python, "-m", "benchmarks.ops", *words, *compiled, "--output", str(stem))
            yield Part(f"operators-{dtype}-{layout}", command, 100)
    yield Part("resources", (python, "-m", "benchmarks.resources"), 90)
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    for tool in SANITIZER_TOOLS:
        check = (python, "-m", "benchmarks.gpu_report", str(folder), "--calls-for-sanitizer")
        yield Part(f"sanitizer-{tool}", (sanitizer, "--tool", tool, "--error-exitcode", "1", *check), 60)


def calls_for_sanitizer() -> None:
    """Every operator on every GPU backend, odd sizes, each dtype and layout once: small, since it runs very slowly."""
    from mitnet_fast.ops._backends import why_not
    from mitnet_fast.specs import SPECS, outputs_and_gradients
    from mitnet_fast.verify import KERNELS

    for spec in SPECS:
        for (backend, device), dtypes in KERNELS[spec.family].dtypes.items():
            if device != "cuda":
                continue
            for dtype in sorted(dtypes, key=str):
                if why_not(KERNELS[spec.family], backend, device, dtype):
                    continue
                for case in spec.cases[3:5]:
                    for variant in list(spec.dtypes_and_layouts(case, [dtype]))[:2]:
                        tensors = spec.inputs(variant, device)
                        gradient = spec.gradient(variant, spec.run(variant, tensors, backend))
                        outputs_and_gradients(spec, variant, tensors, gradient, backend)
    torch.cuda.synchronize()


def run_part(part: Part, folder: Path, deadline: float) -> dict[str, object]:
    """Run one part within its limit and what is left of the whole; its output goes to NAME.log."""
    seconds = min(part.seconds, deadline - time.monotonic())
    if seconds <= 5:
        return {"part": part.name, "result": "not run: no time left", "seconds": 0.0}
    begun = time.monotonic()
    with open(folder / f"{part.name}.log", "w") as log:
        try:
            code = subprocess.run(part.command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
        except OSError as error:
            result = f"could not start: {error}"
    return {"part": part.name, "result": result, "seconds": round(time.monotonic() - begun, 1)}


def write_summary(folder: Path, results: list[dict[str, object]]) -> None:
    """The parts' results, where they were measured, and the rates, as Markdown and JSON."""
    where = environment("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in where.items() if value), ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {entry['part']} | {entry['result']} | {entry['seconds']} |" for entry in results]
    rates = folder / "rates.json"
    if rates.exists():
        lines += ["", "| measured limit | |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in json.loads(rates.read_text()).items()]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"environment": where, "parts": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the report goes; made if missing")
    parser.add_argument("--part", action="append", help="only parts whose name starts so; as often as needed")
    parser.add_argument("--minutes", type=float, default=8.5, help="limit of the whole report")
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
    deadline = time.monotonic() + 60 * options.minutes
    results = []
    for part in wanted:
        print(f"{part.name} …", flush=True)
        results.append(run_part(part, folder, deadline))
        print(f"{part.name}: {results[-1]['result']} ({results[-1]['seconds']} s)", flush=True)
        write_summary(folder, results)
    print((folder / "summary.md").read_text())
    sys.exit(any(entry["result"] != "passed" for entry in results))


if __name__ == "__main__":
    main()
