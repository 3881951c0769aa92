"""Training steps replayed from a CUDA graph against the same steps run eagerly, on a GPU.

    python -m benchmarks.graph_steps

Both networks at their published width: after the steps that warm a graph up, each replayed step's losses are
held against those of an eager one on the same batch. Fails where a step cannot be recorded or differs.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from mitnet_fast.training.step import WARM_UP

from .models import IMPLEMENTATIONS, NETWORKS, configuration, system_of

STEPS = 5
BATCH, SIDE = 2, 128
TOLERANCE = 0.01  # relative; cuDNN's gradients are not the same twice, and Adam enlarges what differs


def losses(network: str, step: str, device: str) -> list[dict[str, float]]:
    """Losses, terms and gradient norms of :data:`STEPS` training steps after the warm-up.

    Args:
        network: "MITNet" or "DCMPNet".
        step: how they run, ``run.step`` of the configuration.
        device: where.

    Raises:
        RuntimeError: they cannot run so.
    """
    implementation = replace(IMPLEMENTATIONS["plain"], step=step)
    generator = torch.Generator().manual_seed(1)
    with implementation.backends(device):
        system = system_of(configuration(network, implementation, BATCH, SIDE, device), device)
        batches = torch.rand(WARM_UP + STEPS, 2, BATCH, 3, SIDE, SIDE, generator=generator)
        values = [system.training_step({"hazy": hazy, "clear": clear}) for hazy, clear in batches]
    return values[WARM_UP:]


def difference(values: dict[str, float], expected: dict[str, float]) -> float:
    """The largest relative difference of any term."""
    return max(abs(values[name] - value) / max(abs(value), 1e-6) for name, value in expected.items())


def main() -> None:
    worst = 0.0
    for network in NETWORKS:
        for index, (eager, replayed) in enumerate(
            zip(losses(network, "eager", "cuda"), losses(network, "cuda_graph", "cuda"), strict=True)
        ):
            found = difference(replayed, eager)
            worst = max(worst, found)
            totals = f"total {eager['total']:.6f} eagerly, {replayed['total']:.6f} replayed"
            print(f"{network}, step {index}: {totals}; largest relative difference of any term {found:.1e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
