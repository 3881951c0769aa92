"""Registers, spills, shared memory and occupancy of every kernel, compiled for GPUs that need not be there.

    python -m benchmarks.resources [--architecture 90 …] [--every] [--output benchmarks/results/NAME]

Occupancy is the share of a multiprocessor's warps that its registers and shared memory let run at a
time; it says what hides latency, not how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .measure import write_results

ARCHITECTURES = (80, 90, 100)
# per multiprocessor, from NVIDIA's tables of compute capabilities
WARPS = 64
BLOCKS = 32
REGISTERS = 65536
REGISTERS_PER_WARP_UNIT = 256
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED_PER_BLOCK = 1024
CSRC = Path(__file__).parent.parent / "csrc"
NVCC_FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "-O3", "-DNDEBUG", f"-I{CSRC}")
# MITNet's first level, of 256×256 pixels
LEVEL = "AmplitudePhaseShape{{DataType::float32, 8, 20, 20, 20, 256, 256, {0}, 0.2, {1}, true}}"


@dataclass(frozen=True)
class SharedMemory:
    """What a family's kernels get of it at their launch: C++ of their template arguments, and where it is declared."""

    headers: tuple[str, ...]
    expressions: dict[str, str]


SHARED = {
    "dynamic_filter": SharedMemory(
        ("dynamic_filter/dynamic_filter_kernels.cuh", "dynamic_filter/predicted_dynamic_filter_kernels.cuh"),
        {
            "predicted_forward_kernel": "{0}::forward_shared * sizeof({0}::Element)",
            "predicted_backward_kernel": "{0}::backward_shared * sizeof({0}::Element)",
            "filter_kernel": "GivenSizes<{0}>::shared * sizeof({1})",
            "grad_filters_kernel": "GivenSizes<{0}>::shared * sizeof({1})",
        },
    ),
    "amplitude_phase": SharedMemory(
        ("amplitude_phase/spectral_kernels.cuh", "amplitude_phase/image_kernels.cuh"),
        {
            "spectral_forward_kernel": f"bins_of_forward({LEVEL}).bytes",
            "spectral_backward_kernel": f"bins_of_backward({LEVEL}, true).bytes",
            "columns_kernel": f"forward_column({LEVEL}, true).bytes",
            "backward_columns_kernel": f"backward_column({LEVEL}, true).bytes",
            "rows_kernel": "row_bytes({{8, 8}})",
            "inverse_rows_kernel": "row_bytes({{8, 8}})",
            "spectrum_kernel": "spectrum_bytes({{8, 8}}, 20)",
        },
    ),
    "window_attention": SharedMemory(
        ("window_attention/window_attention_cuda.cuh",),
        {
            "window_attention_forward_kernel": "forward_bytes<{0}, {1}>(8)",
            "window_attention_backward_kernel": "backward_bytes<{0}, {1}>(8)",
            "large_window_attention_backward_kernel": "large_backward_bytes<{0}, {1}>(16)",
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one architecture."""

    language: str
    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    compiler: str


def occupancy(arch: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of the multiprocessor's warps that can run at a time.

    Args:
        arch: 80, 90 or 100.
        registers: per thread.
        shared_bytes: per block.
        warps: per block.
    """
    per_warp = -(-registers * 32 // REGISTERS_PER_WARP_UNIT) * REGISTERS_PER_WARP_UNIT
    by_registers = REGISTERS // (per_warp * warps) if registers else BLOCKS
    by_shared = SHARED_BYTES[arch] // (shared_bytes + SHARED_RESERVED_PER_BLOCK)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared) * warps / WARPS


def triton_rows(arch: int, every: bool) -> Iterator[Row]:
    """The Triton kernels, compiled in a process that does not interpret them."""
    command = [sys.executable, "-m", "mitnet_fast.triton_kernels.ahead_of_time", "--architecture", str(arch)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [*command, *(["--every"] if every else [])], capture_output=True, text=True, env=environment, check=True
    ).stdout
    for line in printed.splitlines():
        found = json.loads(line)
        numbers = found["registers"], found["shared_bytes"], found["num_warps"]
        yield Row(
            "Triton",
            found["kernel"],
            f"sm_{arch}",
            found["registers"],
            found["spills"],
            found["shared_bytes"],
            found["num_warps"],
            occupancy(arch, *numbers),
            f"Triton {version('triton')}",
        )


def find_nvcc() -> str | None:
    """The CUDA compiler in CUDA_HOME or on PATH."""
    candidate = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(candidate) if candidate.is_file() else shutil.which("nvcc")


def cuda_rows(arch: int, sources: Sequence[Path]) -> Iterator[Row]:
    """The kernels of CUDA sources, as ptxas compiles them, the sources side by side.

    Args:
        arch: 80, 90 or 100.
        sources: of any family, whose name is that of a part of their path.

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: a source does not compile.
    """
    if find_nvcc() is None:
        raise FileNotFoundError("nvcc: neither in CUDA_HOME nor on PATH")
    printed = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    compiler = f"nvcc {re.search(r'V([0-9.]+)', printed)[1]}"
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    families = {source: next(family for family in SHARED if family in source.parts) for source in sources}
    with ThreadPoolExecutor(jobs) as pool:
        kernels: dict[str, dict[str, tuple[int, int, int, int]]] = {}
        for family, found in zip(families.values(), pool.map(partial(_compiled, arch), families), strict=True):
            kernels.setdefault(family, {}).update(found)  # some kernels are in several sources
        asked = pool.map(lambda family: dynamic_shared(arch, SHARED[family], list(kernels[family])), kernels)
        dynamic = {kernel: size for sizes in asked for kernel, size in sizes.items()}
    for kernel, (registers, spilled, static, warps) in (item for found in kernels.values() for item in found.items()):
        shared = static + dynamic.get(kernel, 0)
        share = occupancy(arch, registers, shared, warps)
        yield Row("CUDA", kernel, f"sm_{arch}", registers, spilled, shared, warps, share, compiler)


def _compiled(arch: int, source: Path) -> dict[str, tuple[int, int, int, int]]:
    """Registers, bytes on the stack, static shared memory and warps of a source's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [find_nvcc(), *NVCC_FLAGS, "-keep", f"-keep-dir={folder}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        compiled = subprocess.run(
            [*command, str(source), "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True, check=True
        )
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
    threads = {name: int(n) for name, n in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)}
    found: dict[str, tuple[int, int, int, int]] = {}
    for report in compiled.stderr.split("Compiling entry function '")[1:]:
        name = report.partition("'")[0]
        numbers = (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes smem")
        registers, stack, shared = (int((re.search(n, report) or [0, 0])[1]) for n in numbers)
        found[name] = registers, stack, shared, threads[name] // 32
    return dict(zip(demangled(list(found)), found.values(), strict=True)) if found else {}


def demangled(names: list[str]) -> list[str]:
    """Kernels as C++ has them, without namespace and parameters."""
    printed = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |mitnet_fast::|\(.*", "", line) for line in printed.splitlines()]


def template_arguments(kernel: str) -> list[str]:
    """Those of a kernel's name, ["A<1, 2>", "3"] of "kernel<A<1, 2>, 3>"."""
    arguments = kernel.partition("<")[2].rpartition(">")[0]
    return [found.strip() for found in re.findall(r"(?:[^,<]|<.*>)+", arguments)]


def dynamic_shared(arch: int, family: SharedMemory, kernels: list[str]) -> dict[str, int]:
    """Bytes of shared memory that the launchers ask for, by kernel, without those that ask for none."""
    lines = [f'#include "{header}"' for header in family.headers]
    lines += ["#include <cstdio>", "using namespace mitnet_fast;", "int main() {"]
    for kernel in kernels:
        expression = family.expressions.get(kernel.partition("<")[0])
        if expression:
            expression = expression.format(*template_arguments(kernel))
            lines.append(f'  std::printf("%d %s\\n", static_cast<int>({expression}), "{kernel}");')
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "shared.cu"
        program.write_text("\n".join([*lines, "}", ""]))
        command = [find_nvcc(), *NVCC_FLAGS, f"-arch=sm_{arch}", str(program), "-o", str(program.with_suffix(""))]
        subprocess.run(command, capture_output=True, check=True)
        printed = subprocess.run([program.with_suffix("")], capture_output=True, text=True, check=True).stdout
    sizes = (line.split(" ", 1) for line in printed.splitlines())
    return {kernel: int(size) for size, kernel in sizes}


def cuda_sources(every: bool) -> list[Path]:
    """The families' sources: all of them, or without what networks run neither in bfloat16 nor in TF32."""
    sources = [source for family in SHARED for source in sorted((CSRC / family).glob("*.cu"))]
    return [source for source in sources if every or not source.stem.endswith(("_float16", "_ieee"))]


def write_table(rows: Sequence[Row], path: Path) -> None:
    """One Markdown line per kernel, architectures side by side."""
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    found = {(row.language, row.kernel, row.architecture): row for row in rows}
    lines = [
        f"Compiled by {' and '.join(dict.fromkeys(row.compiler for row in rows))}, not run: registers of a thread, "
        "bytes that it spills, KB of shared memory and warps of a block, and the share of a multiprocessor's warps "
        "that registers and shared memory let run at a time.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for language, kernel in dict.fromkeys((row.language, row.kernel) for row in rows):
        cells = []
        for architecture in architectures:
            row = found.get((language, kernel, architecture))
            cells.append(
                f"{row.registers} regs, {row.spilled_bytes} B spilled, {row.shared_bytes / 1024:.1f} KB, "
                f"{row.warps} warps, {row.occupancy:.0%}"
                if row
                else ""
            )
        lines.append(f"| {language}: `{kernel}` | {' | '.join(cells)} |")
    path.write_text("\n".join([*lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES, help="all by default")
    parser.add_argument("--every", action="store_true", help="every representative launch, not one per kernel")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv, OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    console = Console()
    rows: list[Row] = []
    for arch in options.architecture or ARCHITECTURES:
        with console.status(f"compiling for sm_{arch}"):
            rows += triton_rows(arch, options.every)
            if find_nvcc():
                rows += cuda_rows(arch, cuda_sources(options.every))
    for arch in dict.fromkeys(row.architecture for row in rows):
        table = Table("kernel", "regs", "spilled", "shared", "warps", "occupancy", title=f"{arch}, bytes")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in (row for row in rows if row.architecture == arch):
            spilled = f"[red]{row.spilled_bytes}[/]" if row.spilled_bytes else "0"
            numbers = str(row.registers), spilled, str(row.shared_bytes), str(row.warps), f"{row.occupancy:.0%}"
            table.add_row(f"{row.language}: {row.kernel}", *numbers)
        console.print(table)
    if options.output:
        write_results(rows, options.output)
        write_table(rows, options.output.with_suffix(".md"))
        console.print(f"written: {options.output}.csv, {options.output}.json, {options.output}.md")


if __name__ == "__main__":
    main()
