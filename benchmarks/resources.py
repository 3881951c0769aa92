"""Registers, spills, shared memory and occupancy of every kernel, compiled for GPUs that need not be there.

    python -m benchmarks.resources [--architecture 90 …] [--every] [--output benchmarks/results/NAME]

Occupancy is the share of a multiprocessor's warps that its registers and shared memory let run at a
time; it says what hides latency, not how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES, help="all by default")
    parser.add_argument("--every", action="store_true", help="every representative launch, not one per kernel")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    console = Console()
    rows: list[Row] = []
    for arch in options.architecture or ARCHITECTURES:
        with console.status(f"compiling for sm_{arch}"):
            rows += triton_rows(arch, options.every)
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
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
