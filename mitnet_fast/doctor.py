"""What this machine can do: Python, PyTorch, GPUs, compilers, the compiled half, and every backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from . import __version__
from ._extension import EXTENSION, WHY_NOT
from .ops import BACKENDS
from .ops._backends import FAMILIES, BackendError, Kernels, choose, why_not
from .specs import SPECS
from .verify import KERNELS


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what follows from it."""

    subject: str
    found: str
    good: bool = True


def examine() -> list[Finding]:
    """Everything ``mitnet-fast doctor`` shows, in its order; nothing here raises."""
    return [
        Finding("mitnet_fast", __version__),
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("PyTorch", f"{torch.__version__}, built for {_built_for()}"),
        _processor(),
        *_gpus(),
        _triton(),
        _compiler("C++ compiler", ["c++", "g++", "clang++"], "needed only to build the compiled half"),
        _nvcc(),
        _extension(),
        *(_package(name, use) for name, use in OPTIONAL_PACKAGES),
    ]


OPTIONAL_PACKAGES = (
    ("tensorboard", "training curves in TensorBoard (CSV is always written)"),
    ("transformers", "depth maps from a pretrained teacher"),
)


def report(console: Console) -> None:
    """Print the findings, then which backend every operator can use."""
    table = Table("", "what", Column("found", overflow="fold"), title="This machine", title_justify="left")
    for finding in examine():
        mark = Text("✓", "green") if finding.good else Text("–", "yellow")
        table.add_row(mark, finding.subject, Text(finding.found))
    console.print(table)
    backends = Table("kernels", "backend", "tensors", "state", title="Backends of the operators", title_justify="left")
    for ability in abilities():
        style = "green" if ability.ready else "yellow"
        backends.add_row(ability.family, ability.backend, ability.device, Text(ability.state, style))
    console.print(backends)


@dataclass(frozen=True)
class Ability:
    """What one backend can do here for one kernel family on one type of tensors, or every reason why it cannot."""

    family: str
    backend: str
    device: str
    ready: bool
    state: str


def abilities() -> list[Ability]:
    """Every kernel family × backend × device type; on a type of which there is no device only that is said."""
    found = []
    for family in FAMILIES:
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                found.append(Ability(family, "any", device, False, "PyTorch sees no GPU"))
                continue
            found += [_ability(family, backend, device) for backend in BACKENDS]
    return found


def _ability(family: str, backend: str, device: str) -> Ability:
    """Of all operators of a family; where they differ, each state names its own."""
    states: dict[tuple[bool, str], list[str]] = {}
    for spec in SPECS:
        if spec.family == family:
            states.setdefault(_state(KERNELS[spec.name], backend, device), []).append(spec.name)
    said = (state if len(states) == 1 else f"{', '.join(of)}: {state}" for (_, state), of in states.items())
    return Ability(family, backend, device, any(ready for ready, _ in states), "; ".join(said))


def _state(kernels: Kernels, backend: str, device: str) -> tuple[bool, str]:
    """Whether a backend can run an operator, and in which dtypes or why not."""
    all_dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    dtypes = [dtype for dtype in all_dtypes if not why_not(kernels, backend, device, dtype)]
    if not dtypes:
        supported = next(iter(kernels.dtypes.get((backend, device), [torch.float32])))
        reasons = "; ".join(why_not(kernels, backend, device, supported))
        return False, reasons
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    try:
        taken = choose(kernels, None, device, torch.float32) == backend
    except BackendError:  # one that MITNET_FAST_BACKEND forces and that cannot run
        taken = False
    return True, names + (" (default)" if taken else "")


def _built_for() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def _processor() -> Finding:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the platform's own name stays
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("processor", f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}")


def _gpus() -> list[Finding]:
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [
            Finding(f"GPU {index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {_driver()}")
            for index, p in enumerate(properties)
        ]
    if torch.version.cuda is None:
        seen = EXTENSION.cuda_devices() if EXTENSION else []
        if seen:
            names = ", ".join(device["name"] for device in seen)
            return [Finding("GPU", f"{names} is there, but this PyTorch is built for the CPU", good=False)]
        return [Finding("GPU", f"none usable: this PyTorch is built for the CPU; {_driver()}", good=False)]
    return [Finding("GPU", f"PyTorch sees none; {_driver()}", good=False)]


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no NVIDIA driver found"
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    versions = answer.stdout.split()
    return f"driver {versions[0]}" if answer.returncode == 0 and versions else "nvidia-smi finds no GPU"


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", "not installed", good=False)
    return Finding("Triton", _version("triton"))


def _compiler(subject: str, names: list[str], use: str) -> Finding:
    path = next((shutil.which(name) for name in names if shutil.which(name)), None)
    if path is None:
        return Finding(subject, f"none found; {use}", good=False)
    return Finding(subject, f"{_first_line([path, '--version'])} ({path})")


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(found)] if (found := shutil.which("nvcc")) else []
    places += sorted(packages.glob("cu*/bin/nvcc"), reverse=True)  # the order in which setup.py looks
    path = next((str(place) for place in places if place.is_file()), None)
    if path is None:
        return Finding("nvcc", "none found; needed only to build the CUDA half", good=False)
    return Finding("nvcc", f"{_first_line([path, '--version'], -2)} ({path})")


def _first_line(command: list[str], line: int = 0) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"
    return lines[line] if len(lines) >= abs(line) and lines else "answers nothing"


def _extension() -> Finding:
    if EXTENSION is None:
        return Finding("compiled half", f"{WHY_NOT}; everything works without it, slower", good=False)
    build = EXTENSION.build_info()
    cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "CPU only"
    debug = ", debug" if build["debug"] else ""
    against = f"built against torch {build['torch']} by GCC-compatible {build['compiler']}{debug}"
    return Finding("compiled half", f"{cuda}, {against}; this processor runs its {EXTENSION.cpu_capability()} code")


def _package(name: str, use: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, f"not installed; optional: {use}", good=False)
    return Finding(name, _version(name))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a nightly under another name, or a folder on the path
        return "installed, of unknown version"
