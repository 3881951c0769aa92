"""Golden values of the published networks and how tests compare with them.

Every ``.npz`` and ``.json`` file here was computed in float64 from the closed-form weights and
inputs of ``deterministic.py``; arrays are stored as float32, gradient norms in full precision
(``null``: the parameter takes no part).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from . import deterministic

FOLDER = Path(__file__).parent


def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of ``<name>.npz``."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def gradient_norms(name: str) -> dict[str, float | None]:
    """Gradient norm of every parameter, by its official name, from ``<name>.json``."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def keys(name: str) -> dict[str, tuple[int, ...]]:
    """Official parameter names and shapes from ``<name>_keys.json``."""
    stored = json.loads((FOLDER / f"{name}_keys.json").read_text())
    return {key: tuple(shape) for key, shape in stored.items()}


def uniform(name: str, shape: tuple[int, ...], salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Deterministic values in [-1, 1)."""
    return torch.from_numpy(deterministic.uniform(name, tuple(shape), salt)).to(dtype)


def tensor(name: str, shape: tuple[int, ...], salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Deterministic values in [0, 1)."""
    return torch.from_numpy(deterministic.tensor(name, tuple(shape), salt)).to(dtype)


def official_state(
    name: str, salt: int, gain: float, untouched: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A checkpoint under the official names, filled as the golden values were computed.

    ``untouched`` gives the entries that the golden values left as the network makes them
    (batch counters, relative positions).
    """
    untouched = untouched or {}
    return {
        key: untouched[key] if key in untouched else torch.from_numpy(deterministic.parameter(key, shape, salt, gain))
        for key, shape in keys(name).items()
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor | np.ndarray) -> float:
    """Relative L2 distance in float64; infinite when shapes differ or anything is not finite."""
    expected = torch.as_tensor(expected).detach().double()
    actual = actual.detach().double()
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
