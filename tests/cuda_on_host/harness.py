"""Builds CUDA sources with the C++ compiler and calls them in a process of their own."""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"

COMMON_FLAGS = (
    "-std=c++20", "-fPIC", "-g1", "-fvisibility=hidden", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern",
    "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-unused-variable", "-Wno-unused-function",
)  # fmt: skip
PLAIN_FLAGS = ("-O1",)
SANITIZED_FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
RUNTIME_SOURCES = ("fiber.cpp", "block.cpp", "runtime.cpp")


class KernelFault(RuntimeError):
    """A kernel did what it must not; the message says what and where."""


class Order(enum.IntEnum):
    """The order in which threads, and blocks, get their turn."""

    FORWARD = 0
    REVERSE = 1
    RANDOM = 2


@dataclass(frozen=True)
class Buffer:
    """A pointer argument: the memory that a tensor spans, from its first to its last element.

    Attributes:
        memory: one-dimensional, C-contiguous; written back after the call.
        offset: bytes from an address that is a multiple of 256 to where ``memory`` goes.
    """

    memory: np.ndarray
    offset: int = 0


Argument = int | float | np.ndarray | Buffer | None


class HostKernels:
    """Functions that launch CUDA kernels, compiled for this machine's processor.

    A function is declared ``extern "C" __attribute__((visibility("default"))) const char* f(…)``: its
    arguments are int64_t, double or pointers, its result is null or an error message. Sources are
    compiled once per content; calls run in a process that this object starts, so that a fault cannot
    take the tests along.

    Args:
        *units: the sources, .cpp and .cu.
        sanitize: compile with AddressSanitizer and UndefinedBehaviorSanitizer.
        replace: for files by their path in csrc, or the name of a unit from elsewhere: pairs of text
            to be replaced, which must occur, and its replacement. For planting faults.
        workers: threads of the operating system that share a kernel's blocks.
        timeout: seconds after which a call is ended as hanging.
    """

    def __init__(
        self,
        *units: Path,
        sanitize: bool = False,
        replace: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        workers: int = 2,
        timeout: float = 300,
    ) -> None:
        self._library = build(units, sanitize, replace or {})
        self._sanitize = sanitize
        self._workers = workers
        self._timeout = timeout
        self._process: subprocess.Popen | None = None
        self._log: tempfile._TemporaryFileWrapper | None = None

    def __enter__(self) -> HostKernels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __call__(self, function: str, *arguments: Argument, order: Order = Order.FORWARD, seed: int = 0) -> None:
        """Call a function; arrays and buffers among the arguments are written back.

        Raises:
            KernelFault: what the kernel, its launcher or a sanitizer reported.
        """
        packed = [Buffer(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in arguments]
        process = self._started()
        watchdog = threading.Timer(self._timeout, process.kill)
        watchdog.start()
        try:
            pickle.dump((function, packed, int(order), seed, self._workers), process.stdin)
            process.stdin.flush()
            error, memories = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            timed_out = not watchdog.is_alive()
            raise KernelFault(self._last_words(timed_out)) from None
        finally:
            watchdog.cancel()
        if error is not None:
            raise KernelFault(error)
        for argument, memory in zip(arguments, memories, strict=True):
            if memory is not None:
                target = argument.memory if isinstance(argument, Buffer) else argument
                target[...] = memory.reshape(target.shape)

    def _started(self) -> subprocess.Popen:
        if self._process is None:
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            if self._sanitize:
                environment |= {
                    "LD_PRELOAD": sanitizer_libraries(),
                    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
                    "UBSAN_OPTIONS": "print_stacktrace=1",
                }
            self._log = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process runs
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(self._library)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
            )
        return self._process

    def _last_words(self, timed_out: bool) -> str:
        self._process.kill()
        status = self._process.wait()
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace").strip()
        self.close()
        if timed_out:
            return f"no result within {self._timeout:.0f} s\n{printed}"
        return printed or f"the process ended with status {status}"


@functools.cache
def compiler() -> str:
    """The C++ compiler, GCC for its sanitizers' libraries."""
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("the CUDA host harness needs g++ on PATH")
    return found


@functools.cache
def sanitizer_libraries() -> str:
    """What has to be in a process from its start: AddressSanitizer, and the C++ library that it intercepts."""
    paths = (
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    )
    return " ".join(str(Path(path.strip()).resolve()) for path in paths)


def rewrite(source: str) -> str:
    """CUDA C++ as C++ for what macros cannot express: declarations of shared memory.

    ``extern __shared__ T name[];`` becomes a pointer to the block's dynamic shared memory, and
    ``__shared__ declaration;`` a reference to a member of a struct that every block has its own of.
    """
    source = re.sub(
        r"\bextern\s+__shared__\s+(?:(?:__align__|alignas)\(\w+\)\s+)?([\w:\s]+?)\s+(\w+)\[\];",
        r"\1* const \2 = ::cuda_on_host::dynamic_shared<\1>();",
        source,
    )
    return re.sub(
        r"\b__shared__\s+([^;]*?\b(\w+)\s*(?:\[[^;]*\])?)\s*;",
        r"struct \2_in_shared_memory { \1; }; auto& \2 = "
        r"::cuda_on_host::shared_variable<\2_in_shared_memory>().\2;",
        source,
    )


def build(units: Sequence[Path], sanitize: bool, replace: Mapping[str, Sequence[tuple[str, str]]]) -> Path:
    """The shared library made from ``units``; what an earlier call has compiled is not compiled again."""
    runtime = {f"harness/{path.relative_to(HERE)}": path.read_text() for path in _files(HERE / "include")}
    runtime |= {f"harness/{name}": (HERE / name).read_text() for name in RUNTIME_SOURCES}
    sources = runtime | _sources(units, replace)
    flags = (*COMMON_FLAGS, *(SANITIZED_FLAGS if sanitize else PLAIN_FLAGS))
    digests = {f"harness/{name}": _digest(flags, name, runtime) for name in RUNTIME_SOURCES}
    digests |= {_place(unit): _digest(flags, _place(unit), sources) for unit in units}
    library = BUILD / f"{_digest(flags, '', digests)}.so"
    if library.exists():
        return library

    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        for name, text in sources.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

        def compiled(unit: str) -> Path:
            target = BUILD / f"{digests[unit]}.o"
            if not target.exists():
                made = Path(scratch) / target.name
                includes = [f"-I{scratch}/harness/include", f"-I{scratch}/csrc"]
                _run([compiler(), *flags, *includes, "-x", "c++", "-c", f"{scratch}/{unit}", "-o", str(made)])
                made.replace(target)  # whole or not at all: another process may be making the same
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, digests))
        made = Path(scratch) / library.name
        _run([compiler(), *flags, "-shared", *map(str, objects), "-o", str(made), "-lpthread"])
        made.replace(library)
    return library


def _place(unit: Path) -> str:
    """Where a source lies in the build folder."""
    return f"csrc/{unit.relative_to(CSRC)}" if unit.is_relative_to(CSRC) else f"entry/{unit.name}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sources(units: Sequence[Path], replace: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    """The units and every header that they may include, with replacements, by place in the build folder."""
    paths = {*units, *(path for path in _files(CSRC) if path.suffix in (".h", ".cuh"))}
    sources = {_place(path): path.read_text() for path in sorted(paths)}
    for name, changes in replace.items():
        place = f"csrc/{name}" if f"csrc/{name}" in sources else f"entry/{name}"
        for old, new in changes:
            if old not in sources[place]:
                raise ValueError(f"replace: {name} does not contain {old!r}")
            sources[place] = sources[place].replace(old, new)
    return {place: rewrite(text) for place, text in sources.items()}


def _digest(flags: Sequence[str], unit: str, sources: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr((flags, _compiler_version(), unit)).encode())
    for name in sorted(sources):
        digest.update(f"{name}\0{sources[name]}\0".encode())
    return digest.hexdigest()[:24]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
