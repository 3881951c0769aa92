"""How far a float32 network may be from its float64 twin: a model of rounding errors.

A sum of K products in float32 is off by about √K·u of its size, u = 2⁻²⁴, since the roundings walk at
random (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). So the
float64 network is run once more with normal noise of √K·u times the rms on the output of every
elementary module, K the number of products in one of its outputs: what that does to the result is
what float32 may do to it, all sensitivities of the network included.

Gradients are compared in float64 only: where a ReLU's input is within rounding of 0, a float32
gradient differs by all of that path, however exact every operation is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

UNIT_ROUNDOFF = 2.0**-24


def products(module: nn.Module) -> float:
    """Products that are summed for one output of an elementary module."""
    if isinstance(module, nn.ConvTranspose2d):
        return module.weight[:, 0].numel() / (module.stride[0] * module.stride[1])
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return module.weight[0].numel()
    return 1


@contextmanager
def disturbed_as_by_float32(network: nn.Module) -> Iterator[None]:
    """Disturb the outputs of all elementary modules of a float64 network as float32 may."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        return output + UNIT_ROUNDOFF * products(module) ** 0.5 * output.square().mean().sqrt() * noise

    handles = [module.register_forward_hook(disturb) for module in network.modules() if not list(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
