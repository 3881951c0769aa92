"""Training steps replayed from a CUDA graph against the same steps run eagerly, on a GPU.

    python -m benchmarks.graph_steps

Both networks at their published width, in every implementation that :mod:`.models` times as a CUDA graph:
after the steps that warm a graph up, each replayed step's losses are held against those of an eager one on the
same batch, with the same kernels and layout. Fails where steps cannot be recorded, cannot run or differ.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from mitnet_fast.training.step import WARM_UP

from .models import GRAPHED, NETWORKS, STEPS_DIFFER, Implementation, configuration, system_of

STEPS = 3
BATCH, SIDE = 2, 128


def losses(network: str, implementation: Implementation, device: str) -> list[dict[str, float]]:
    """Losses, terms and gradient norms of :data:`STEPS` training steps after the warm-up.

    Args:
        network: "MITNet" or "DCMPNet".
        implementation: how they run.
        device: where.

    Raises:
        RuntimeError: they cannot run so.
    """
    generator = torch.Generator().manual_seed(1)
    with implementation.backends(device):
        system = system_of(configuration(network, implementation, BATCH, SIDE, device), device)
        batches = torch.rand(WARM_UP + STEPS, 2, BATCH, 3, SIDE, SIDE, generator=generator)
        values = [system.training_step({"hazy": hazy, "clear": clear}) for hazy, clear in batches]
    return values[WARM_UP:]


def difference(values: dict[str, float], expected: dict[str, float]) -> float:
    """The largest relative difference of any term: NaN where one is NaN, infinite where the terms are not the same."""
    if values.keys() != expected.keys():
        return float("inf")
    differences = [abs(values[name] - value) / max(abs(value), 1e-6) for name, value in expected.items()]
    return torch.tensor(differences, dtype=torch.float64).max().item()  # Python's max may lose a NaN


def agree(network: str, name: str, implementation: Implementation) -> bool:
    """Whether an implementation's replayed steps are its eager ones; prints what was found."""
    try:
        eager = losses(network, replace(implementation, step="eager"), "cuda")
        replayed = losses(network, implementation, "cuda")
    except RuntimeError as error:  # such as no CUDA kernels: what else there is may still be compared
        print(f"{network}, {name}: {error}", flush=True)
        return False
    found = []
    for step, (expected, actual) in enumerate(zip(eager, replayed, strict=True)):
        found.append(difference(actual, expected))
        totals = f"total {expected['total']:.6f} eagerly, {actual['total']:.6f} replayed"
        largest = f"largest relative difference of any term {found[-1]:.1e}"
        print(f"{network}, {name}, step {step}: {totals}; {largest}", flush=True)
    return all(each <= STEPS_DIFFER for each in found)  # NaN is not


def main() -> None:
    results = [agree(network, name, each) for network in NETWORKS for name, each in GRAPHED.items()]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
