"""Every operator × backend × dtype × layout × shape that can run here, against float64.

Inputs, truth and tolerance come from :mod:`mitnet_fast.specs`. Memory that a kernel is given to
write to is poisoned with NaN first, so an element that nobody wrote is an error and never luck. Every
call of a kernel is made twice, and its bits must be the same.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from .ops import BACKENDS, _amplitude_phase, _dynamic_filter, _feature_mixing, _window_attention
from .ops._backends import FAMILIES, Kernels, why_not
from .specs import SPECS, Case, Comparison, OpSpec, compare

KERNELS: dict[str, Kernels] = {  # of every operator
    "dynamic_filter": _dynamic_filter.KERNELS,
    "predicted_dynamic_filter": _dynamic_filter.KERNELS,
    "amplitude_phase_conv": _amplitude_phase.KERNELS,
    "window_attention": _window_attention.KERNELS,
    **_feature_mixing.KERNELS,
}


@dataclass(frozen=True)
class Check:
    """One tensor of one call.

    Attributes:
        operator: the public function.
        backend: what ran it.
        device: type of the device.
        case: the call, written out.
        dtype: of the call; "tf32" for float32 with products in TF32.
        tensor: ``y`` or ``grad_<argument>``.
        error: relative L2 distance to float64.
        ratio: error relative to that of plain PyTorch in the same dtype.
        allowed: the error that the tolerance rule allows.
        passed: whether the error is within it, and the same call again gave the same bits.
        problem: what was raised instead of a result, that the bits were not the same, or None.
    """

    operator: str
    backend: str
    device: str
    case: str
    dtype: str
    tensor: str
    error: float
    ratio: float
    allowed: float
    passed: bool
    problem: str | None = None


@dataclass(frozen=True)
class Verification:
    """All checks of one run, and what could not run with the reasons."""

    checks: tuple[Check, ...]
    not_run: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether anything was checked and nothing failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def render(self) -> Table:
        """One row for each operator, backend and dtype: the largest error, the largest share of what is allowed,
        and the median ratio to the error of plain PyTorch."""
        names = (Column(name, no_wrap=True) for name in ("operator", "backend", "dtype"))
        numbers = (Column(name, justify="right", no_wrap=True) for name in ("calls", "error", "share", "ratio"))
        # no lines between columns: every name fits into 80 characters
        table = Table(*names, *numbers, "", box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
        groups: dict[tuple[str, str, str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.operator, check.backend, check.device, check.dtype), []).append(check)
        for (operator, backend, device, dtype), checks in groups.items():
            failed = sum(not check.passed for check in checks)
            finite = [check.ratio for check in checks if check.ratio < float("inf")]
            share = max(check.error / check.allowed if check.allowed else float(check.error > 0) for check in checks)
            table.add_row(
                operator,
                f"{backend} {device}",
                dtype,
                str(len({check.case for check in checks})),
                f"{max(check.error for check in checks):.1e}",
                f"{share:.0%}",
                f"{statistics.median(finite):.2f}" if finite else "–",
                f"[red]{failed} ✗[/]" if failed else "[green]✓[/]",
            )
        return table

    def write_json(self, path: str | Path) -> None:
        """Write every check and the reasons for what did not run."""
        content = {"passed": self.passed, "not_run": self.not_run, "checks": [asdict(check) for check in self.checks]}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def verify(
    family: str | None = None,
    backend: str | None = None,
    *,
    random_cases: int = 0,
    devices: Sequence[str] | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every operator on every backend that can run here.

    Args:
        family: one kernel family; None for all.
        backend: one backend; None for all compiled ones.
        random_cases: cases of the seeded random sweep, on top of the fixed ones.
        devices: device types; None for the CPU and, where there is one, the GPU.
        seconds: after which no call is begun; those left are among what could not run.
        progress: called with the number of calls done and of all.

    Raises:
        ValueError: no such family or backend.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family: got {family!r}, allowed are {', '.join(FAMILIES)}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(BACKENDS)}")
    devices = devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    not_run: dict[str, str] = {}
    calls = list(_calls(family, backend, devices, random_cases, not_run))
    checks: list[Check] = []
    begun = time.monotonic()
    with poisoned_memory(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"var_mean\(\): degrees of freedom")  # plain PyTorch's, of an empty batch
        for index, (spec, case, name, device) in enumerate(calls):
            if seconds is not None and time.monotonic() - begun > seconds:
                not_run[f"the last {len(calls) - index} of {len(calls)} calls"] = f"{seconds:g} s are over"
                break
            checks += check_call(spec, case, name, device)
            if progress:
                progress(index + 1, len(calls))
    return Verification(tuple(checks), not_run)


def check_call(spec: OpSpec, case: Case, backend: str, device: str) -> list[Check]:
    """All tensors of one call, made twice by a kernel; a call that raises is one failed check."""
    names = spec.name, backend, device, str(case), case.arithmetic
    try:
        # libraries behind plain PyTorch round as their arguments happen to lie in memory
        comparisons = compare(spec, case, backend, device, twice=backend != "reference")
    except Exception as error:  # a kernel that raises has failed; the others are still checked
        problem = f"{type(error).__name__}: {error}"
        return [Check(*names, "y", float("inf"), float("inf"), 0.0, False, problem)]
    return [Check(*names, c.tensor, c.error, c.ratio, c.allowed, c.passed, _problem(c)) for c in comparisons]


def _problem(comparison: Comparison) -> str | None:
    return None if comparison.repeated else f"{comparison.tensor}: the same call gave other bits the second time"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN while the context is open."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _calls(
    family: str | None, backend: str | None, devices: Sequence[str], random_cases: int, not_run: dict[str, str]
) -> Iterator[tuple[OpSpec, Case, str, str]]:
    compiled = [name for name in BACKENDS if name != "reference"]
    for spec in SPECS:
        if family is not None and spec.family != family:
            continue
        kernels = KERNELS[spec.name]
        for name in [backend] if backend else compiled:
            for device in devices:
                dtypes = sorted(_dtypes(kernels, name, device), key=str)
                runnable = [dtype for dtype in dtypes if not why_not(kernels, name, device, dtype)]
                if not runnable:
                    reasons = why_not(kernels, name, device, dtypes[0] if dtypes else torch.float32)
                    not_run[f"{spec.name} on {name}, {device}"] = "; ".join(reasons)
                    continue
                for case in spec.cases:
                    for variant in spec.dtypes_and_layouts(case, runnable):
                        yield spec, variant, name, device
                        if device == "cuda" and variant.dtype == torch.float32 and spec.multiplies:
                            yield spec, replace(variant, tf32=True), name, device
                for seed in range(random_cases):
                    yield spec, spec.random_case(seed, runnable), name, device


def _dtypes(kernels: Kernels, backend: str, device: str) -> frozenset[torch.dtype]:
    if backend == "reference":  # in which the operator computes; maps of others it converts
        return frozenset().union(*kernels.dtypes.values())
    return kernels.dtypes.get((backend, device), frozenset())
