"""How an operator and its backward reach the dispatcher, the same way for every family.

Each direction is one operator of the ``mitnet_fast`` library: opaque to ``torch.compile``, with a
fake kernel that says what comes out. The forward's autograd formula calls the backward operator;
the backward's raises, since second derivatives are not implemented.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("mitnet_fast", "DEF")
RUN: dict[str, Callable] = {}  # what runs behind an operator's name, for whoever wants to see what it launches


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Define ``schema`` with one implementation for every device and the fake kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    RUN[name] = run
    torch.library.register_fake(f"mitnet_fast::{name}", fake, lib=LIBRARY)


def differentiate(name: str, setup_context: Callable, backward: Callable, instead: str = "backend='reference'") -> None:
    """Register the gradient of ``name`` and a clear error, which says what to use instead, for that of its backward."""
    torch.library.register_autograd(f"mitnet_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)

    def no_second_derivative(ctx, *gradients):
        raise RuntimeError(f"mitnet_fast::{name} has no second derivative; use {instead} for double backward")

    torch.library.register_autograd(f"mitnet_fast::{name}_backward", no_second_derivative, lib=LIBRARY)


def layout_of(tensor: torch.Tensor) -> torch.memory_format:
    """The layout in which a result that belongs to ``tensor`` is written."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def empty_for(tensor: torch.Tensor, needed: bool = True, channels: int | None = None) -> torch.Tensor:
    """An uninitialised map of the shape and layout of ``tensor``, or an empty tensor if not needed.

    A map has as many ``channels`` as are given, else those of ``tensor``.
    """
    if not needed:
        return tensor.new_empty(0)
    if channels is not None:
        shape = (tensor.shape[0], channels, *tensor.shape[2:])
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout_of(tensor))
    return torch.empty_like(tensor, memory_format=layout_of(tensor))


def in_layout_of(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient in the layout in which :func:`empty_for` promises it for ``tensor``."""
    return gradient.contiguous(memory_format=layout_of(tensor))


def or_empty(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """What a backward operator returns for a gradient that was not asked for: no elements."""
    return like.new_empty(0) if gradient is None else gradient
