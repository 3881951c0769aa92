"""Argument checks shared by the public operators: every message names argument, value and rule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, *shapes: str) -> None:
    """Raise unless ``value`` is a floating-point tensor of as many dimensions as one of ``shapes``.

    Args:
        name: the argument's name.
        value: what came.
        shapes: allowed shapes as the docstring writes them, such as ``"[B, C, H, W]"``.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {' or '.join(shapes)}, got {type(value).__name__}")
    if value.dim() not in {shape.count(",") + 1 for shape in shapes}:
        raise ValueError(f"{name}: expected shape {' or '.join(shapes)}, got {list(value.shape)}")
    if value.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: dtype {str(value.dtype).removeprefix('torch.')} is not supported, allowed: {allowed}")


def check_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise unless ``value`` has the ``expected`` shape, whose ``meaning`` goes into the message."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {list(expected)}, got {list(value.shape)}")


def check_image_size(name: str, value: torch.Tensor) -> None:
    """Raise unless the last two dimensions hold at least one pixel (an empty batch is fine)."""
    if value.shape[-1] < 1 or value.shape[-2] < 1 or (value.dim() == 4 and value.shape[1] < 1):
        raise ValueError(f"{name}: needs at least one channel and one pixel, got shape {list(value.shape)}")


def check_one_device(**tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors given are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")


def check_one_dtype(**tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors given have one dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise TypeError(f"all tensors must have one dtype outside autocast, got {listed}")


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast is casting to on the tensor's device, None where it is off."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which operators on the tensor's device compute in the dtype they are given."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def cast_like_convolution(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Cast as autocast casts the operands of ``conv2d``: everything but float64, only where it is on."""
    first = next(tensor for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(first)
    if dtype is None:
        return list(tensors)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
