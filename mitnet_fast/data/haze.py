"""Haze by the atmospheric scattering model: I = J · t + A · (1 − t) with the transmission t = exp(−β · d).

Layout: clear image J and hazy image I [..., 3, H, W] in [0, 1]; distance d [..., 1, H, W] ≥ 0 from the camera, 0 at
the camera, in the unit whose inverse β has (metres and 1/m); airlight A in [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

Range = tuple[float, float]


class HazeParameters(NamedTuple):
    """What one drawing of haze used.

    Args:
        beta: scattering coefficient, the shape of the batch.
        airlight: colour of the haze, the shape of the batch and [3].
    """

    beta: torch.Tensor
    airlight: torch.Tensor


def synthesise_haze(
    clear: torch.Tensor, depth: torch.Tensor, beta: float | torch.Tensor, airlight: float | torch.Tensor
) -> torch.Tensor:
    """Put homogeneous haze over an image whose distances are known.

    Args:
        clear: [..., 3, H, W] in [0, 1], floating point.
        depth: [..., 1, H, W], distances, finite and not negative (0 nearest).
        beta: scattering coefficient, finite and not negative, a number or a tensor of the batch's shape.
        airlight: colour of the haze in [0, 1], a number, [3], or the batch's shape and 3.

    Returns:
        The hazy image, like ``clear``.

    Raises:
        ValueError: wrong shapes or values outside these ranges; disparity-like maps (1 nearest) are no distances,
            `depth_from_disparity` makes them ones.
        TypeError: ``clear`` or ``depth`` is not floating point.

    Source: Narasimhan and Nayar, "Vision and the atmosphere", IJCV 2002; Li et al., RESIDE, TIP 2019, eq. 1.
    """
    batch = _check_images(clear, depth)
    beta = torch.as_tensor(beta, dtype=clear.dtype, device=clear.device)
    airlight = torch.as_tensor(airlight, dtype=clear.dtype, device=clear.device)
    _check_values("beta", beta, 0, math.inf)
    _check_values("airlight", airlight, 0, 1)
    if beta.shape not in (torch.Size(), batch):
        raise ValueError(f"beta: expected a number or shape {list(batch)}, got {list(beta.shape)}")
    if airlight.shape not in (torch.Size(), torch.Size((3,)), torch.Size((*batch, 3))):
        raise ValueError(f"airlight: expected a number, [3] or shape {[*batch, 3]}, got {list(airlight.shape)}")
    transmission = torch.exp(-beta[..., None, None, None] * depth)
    airlight = airlight[..., None, None]
    return clear * transmission + airlight * (1 - transmission)


def sample_haze(
    clear: torch.Tensor,
    depth: torch.Tensor,
    *,
    beta: Range = (0.6, 1.8),
    airlight: Range = (0.7, 1.0),
    per_channel: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, HazeParameters]:
    """Put haze of random density and brightness over images, drawn for each image of a batch.

    Args:
        clear: [..., 3, H, W] in [0, 1], floating point.
        depth: [..., 1, H, W], distances, finite and not negative.
        beta: lowest and highest scattering coefficient; the default is that of RESIDE's indoor set.
        airlight: lowest and highest brightness of the haze, in [0, 1].
        per_channel: draw each colour channel of the airlight by itself instead of a grey one.
        generator: source of randomness, on the CPU; the same state gives the same haze on every device.

    Returns:
        The hazy images and the parameters drawn.

    Raises:
        ValueError: as `synthesise_haze`, or a range whose ends are exchanged or outside what is allowed.
        TypeError: as `synthesise_haze`.
    """
    batch = _check_images(clear, depth)
    betas = _uniform("beta", beta, math.inf, batch, generator)
    if per_channel:
        airlights = _uniform("airlight", airlight, 1, (*batch, 3), generator)
    else:
        airlights = _uniform("airlight", airlight, 1, batch, generator)[..., None].expand(*batch, 3)
    parameters = HazeParameters(betas.to(clear), airlights.to(clear))
    return synthesise_haze(clear, depth, *parameters), parameters


def depth_from_disparity(disparity: torch.Tensor, *, near: float = 1.0, far: float = 10.0) -> torch.Tensor:
    """Distances from a disparity-like map, whose 1 is at ``near`` and whose 0 is at ``far``: 1/Z is linear between.

    Args:
        disparity: any shape, in [0, 1], 1 nearest, as depth networks give it.
        near: least distance, positive.
        far: greatest distance, at least ``near``, finite.

    Returns:
        Distances in the unit of ``near`` and ``far``, same shape.

    Raises:
        ValueError: values outside these ranges.
    """
    if not 0 < near <= far < math.inf:
        raise ValueError(f"near and far: expected 0 < near ≤ far < ∞, got near={near}, far={far}")
    _check_values("disparity", disparity, 0, 1)
    return 1 / (1 / far + disparity * (1 / near - 1 / far))


def _check_images(clear: torch.Tensor, depth: torch.Tensor) -> torch.Size:
    """Raise unless image and distances belong together; returns the batch's shape."""
    for name, value, channels in (("clear", clear, 3), ("depth", depth, 1)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {value.dtype}")
        if value.ndim < 3 or value.shape[-3] != channels or value.numel() == 0:
            raise ValueError(f"{name}: expected [..., {channels}, H, W], got {list(value.shape)}")
    expected = torch.Size((*clear.shape[:-3], 1, *clear.shape[-2:]))
    if depth.shape != expected:
        raise ValueError(f"depth: expected {list(expected)} for clear {list(clear.shape)}, got {list(depth.shape)}")
    _check_values("clear", clear, 0, 1)
    _check_values("depth", depth, 0, math.inf)
    return clear.shape[:-3]


def _check_values(name: str, value: torch.Tensor, low: float, high: float) -> None:
    if not bool(((value >= low) & (value <= high) & torch.isfinite(value)).all()):
        allowed = f"in [{low}, {high}]" if high < math.inf else f"finite and at least {low}"
        raise ValueError(f"{name}: expected values {allowed}, got {float(value.min())} to {float(value.max())}")


def _uniform(
    name: str, bounds: Range, limit: float, shape: tuple[int, ...], generator: torch.Generator | None
) -> torch.Tensor:
    low, high = bounds
    if not (0 <= low <= high <= limit and high < math.inf):
        allowed = f"0 ≤ low ≤ high ≤ {limit}" if limit < math.inf else "0 ≤ low ≤ high"
        raise ValueError(f"{name}: expected a range with {allowed}, got ({low}, {high})")
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)
