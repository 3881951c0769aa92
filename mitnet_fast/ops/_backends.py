"""Which implementations of an operator exist, which can run a call, and which one the call gets.

Three backends: ``reference`` (plain PyTorch, runs everywhere), ``cpp`` (the compiled extension:
C++ on CPU tensors, CUDA C++ on CUDA tensors) and ``triton`` (CUDA tensors; CPU tensors too when
``TRITON_INTERPRET=1`` was set before the import).

A backend asked for by name (argument, :func:`use_backend` or ``MITNET_FAST_BACKEND``, in this order)
either runs or raises with every reason why it cannot; one that the latter two name for all families holds
where an operator has kernels of it for the device, and plain PyTorch runs elsewhere. Otherwise the first
one that can run is taken from the preference in ``preferences.json``, which records for every order what
it rests on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .._extension import EXTENSION, WHY_NOT

BACKENDS = ("reference", "cpp", "triton")
FAMILIES = ("dynamic_filter", "amplitude_phase", "window_attention", "feature_mixing")

logger = logging.getLogger("mitnet_fast")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message holds every reason."""


@dataclass(frozen=True)
class Kernels:
    """What the compiled backends of one operator accept.

    Attributes:
        family: the kernel family, which preferences and forced backends refer to.
        dtypes: for every (backend, device type) that has kernels, their dtypes.
        limits: for a (backend, device type) whose kernels do not take every size, the most that they take.
    """

    family: str
    dtypes: dict[tuple[str, str], frozenset[torch.dtype]] = field(default_factory=dict)
    limits: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)


@cache
def triton_kernels(family: str) -> ModuleType:
    """The launchers of ``family`` in Triton, imported at first use."""
    return importlib.import_module(f"mitnet_fast.triton_kernels.{family}")


def _unavailable() -> dict[tuple[str, str], tuple[str, ...]]:
    """Reasons, by backend and device type, that hold for every call in this process."""
    reasons: dict[tuple[str, str], tuple[str, ...]] = {}
    if EXTENSION is None:
        reasons["cpp", "cpu"] = reasons["cpp", "cuda"] = (WHY_NOT,)
    elif EXTENSION.build_info()["cuda"] is None:
        reasons["cpp", "cuda"] = ("the extension is built without CUDA (no nvcc at installation)",)
    if importlib.util.find_spec("triton") is None:
        reasons["triton", "cpu"] = reasons["triton", "cuda"] = ("Triton is not installed",)
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reasons["triton", "cpu"] = ("Triton runs on CPU tensors only with TRITON_INTERPRET=1 set from the start",)
    return reasons


UNAVAILABLE = _unavailable()
PREFERENCES: dict[str, dict[str, dict[str, object]]] = json.loads(
    Path(__file__).with_name("preferences.json").read_text()
)


def _from_environment() -> dict[str, str]:
    """``MITNET_FAST_BACKEND``: a backend for all families, or ``family=backend,…``."""
    value = os.environ.get("MITNET_FAST_BACKEND", "").strip()
    if not value:
        return {}
    if "=" not in value:
        pairs = dict.fromkeys(FAMILIES, value)
    else:
        pairs = dict(entry.strip().split("=", 1) for entry in value.split(",") if "=" in entry)
    for family, backend in pairs.items():
        if family not in FAMILIES or backend not in BACKENDS:
            raise ValueError(
                f"MITNET_FAST_BACKEND: got {value!r}; allowed is one of {', '.join(BACKENDS)}, or family=backend "
                f"pairs separated by commas, families {', '.join(FAMILIES)}"
            )
    return pairs


_forced: dict[str, str] = _from_environment()
_where_there_are_kernels: set[str] = set(FAMILIES if "=" not in os.environ.get("MITNET_FAST_BACKEND", "=") else ())


@contextmanager
def use_backend(backend: str | None = None, **families: str) -> Iterator[None]:
    """Force a backend for all families, or one per family, while the context is open.

    It holds for the whole process, in which autograd runs backward passes on threads of its own.

    Args:
        backend: "reference", "cpp" or "triton" for every operator that has kernels of it for the device,
            plain PyTorch for the others; None to name families only.
        **families: ``dynamic_filter=…``, ``amplitude_phase=…``, ``window_attention=…``, ``feature_mixing=…``.

    Raises:
        ValueError: an unknown backend or family.
    """
    forced = dict.fromkeys(FAMILIES, backend) if backend is not None else {}
    forced |= families
    for family, name in forced.items():
        if family not in FAMILIES:
            raise ValueError(f"{family}: no such kernel family, allowed are {', '.join(FAMILIES)}")
        check_backend(name)
    before = dict(_forced), set(_where_there_are_kernels)
    _forced.update(forced)
    _where_there_are_kernels.update(forced)
    _where_there_are_kernels.difference_update(families)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before[0])
        _where_there_are_kernels.clear()
        _where_there_are_kernels.update(before[1])


def check_backend(backend: str | None) -> None:
    """Raise for a backend that does not exist.

    Raises:
        ValueError: names what came and what is allowed.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, allowed are None and {', '.join(map(repr, BACKENDS))}")


def why_not(
    kernels: Kernels, backend: str, device_type: str, dtype: torch.dtype, sizes: Mapping[str, int] | None = None
) -> list[str]:
    """Every reason why ``backend`` cannot run a call; an empty list means that it can.

    Args:
        kernels: of the operator.
        backend: one of :data:`BACKENDS`.
        device_type: of the call's tensors.
        dtype: of the call's tensors.
        sizes: of the call, by the names in ``kernels.limits``; None asks about no call in particular.
    """
    if backend == "reference":
        return []
    dtypes = kernels.dtypes.get((backend, device_type))
    if dtypes is None:
        if not any(name == backend for name, _ in kernels.dtypes):
            return [f"{backend} has no kernels of this {kernels.family} operator"]
        return [f"{backend} has no kernels of this {kernels.family} operator for {device_type} tensors"]
    reasons = list(UNAVAILABLE.get((backend, device_type), ()))
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        reasons.append("torch.func transforms reach through plain PyTorch only")
    if dtype not in dtypes:
        allowed = ", ".join(sorted(str(entry).removeprefix("torch.") for entry in dtypes))
        name = str(dtype).removeprefix("torch.")
        reasons.append(f"dtype {name} is not supported by {backend} on {device_type}, allowed: {allowed}")
    for name, most in kernels.limits.get((backend, device_type), {}).items():
        if sizes and sizes[name] > most:
            reasons.append(f"{name} {sizes[name]} is more than {backend} takes on {device_type}: at most {most}")
    return reasons


def choose(
    kernels: Kernels,
    backend: str | None,
    device_type: str,
    dtype: torch.dtype,
    sizes: Mapping[str, int] | None = None,
) -> str:
    """The backend that runs a call; arguments as in :func:`why_not`.

    Raises:
        BackendError: a backend asked for by name cannot run it.
        ValueError: there is no such backend.
    """
    check_backend(backend)
    forced = backend or _forced.get(kernels.family)
    named_for_all = backend is None and kernels.family in _where_there_are_kernels
    if named_for_all and forced is not None and (forced, device_type) not in kernels.dtypes:
        return "reference"
    if forced is not None:
        reasons = why_not(kernels, forced, device_type, dtype, sizes)
        if reasons:
            raise BackendError(f"backend {forced!r} cannot run this call: {'; '.join(reasons)}")
        return forced
    for candidate in preference(kernels.family, device_type):
        if not why_not(kernels, candidate, device_type, dtype, sizes):
            if not torch.compiler.is_compiling():
                _say_what_is_missing()
                _log(kernels.family, candidate, device_type, dtype)
            return candidate
    return "reference"


def preference(family: str, device_type: str) -> tuple[str, ...]:
    """Backends in the order in which they are tried."""
    entry = PREFERENCES[family].get(device_type)
    return tuple(entry["order"]) if entry else ("reference",)


@cache
def _say_what_is_missing() -> None:
    """Once in a process: without the compiled half everything works, slower."""
    if EXTENSION is None:
        logger.warning("mitnet_fast: %s; plain PyTorch runs instead, slower", WHY_NOT)


@cache
def _log(family: str, backend: str, device_type: str, dtype: torch.dtype) -> None:
    """One debug line for every kind of call."""
    logger.debug("%s on %s %s runs on backend %s", family, device_type, str(dtype).removeprefix("torch."), backend)


def convolution_tf32(tensor: torch.Tensor) -> bool:
    """Whether a product that replaces a convolution may use TF32: float32 on CUDA, as torch is set."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


def matmul_tf32(tensor: torch.Tensor) -> bool:
    """Whether a matrix product may use TF32: float32 on CUDA, as torch is set."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
