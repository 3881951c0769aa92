"""Difference perception: two tasks supervise each other through the places where the other is wrong.

A primary network makes a result u* of an image whose truth is u; an auxiliary network M looks at the
result, and what it should see there is D. For dehazing u* is the restored image, M estimates depth
and D is the depth of the clear image; segmentation or edges do as well.

    primary → auxiliary    a = weights(u*, u)
                           L_aux = L1(M(u*), D) + L1(a·M(u*), a·D)
    auxiliary → primary    e = weights(M(u*), D)
                           L_primary = L1(u*, u) + L1(e·u*, e·u) + 0.1·L1(M(u*), D)
    weights(x, y)          softmax over C·H·W of |x − y|, summed over C, scaled to mean 1: [B, 1, H, W]

Weights carry no gradient. L_aux is meant for M alone and L_primary for the primary network alone: the
caller computes M(u*) from the detached result for the first, and for the second with
:func:`through_frozen`, which gives gradients to the result but not to M's weights:

    aux = auxiliary_loss(result.detach(), truth, network(result.detach()), D)
    primary = primary_loss(result, truth, through_frozen(network, result), D)
    (aux["total"] + primary["total"]).backward()      # each network gets its own gradient only

In ``mode="official"``, which repeats the published training program, a is the softmax of the signed
difference plus 1e-7, neither detached nor scaled; L_primary has no weighted term; M(u*) is computed
once and the sum of both losses trains both networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ..ops._checks import check_shape, check_tensor

MODES = ("difference_perception", "official")


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` is one of :data:`MODES`."""
    if mode not in MODES:
        raise ValueError(f"mode: expected {' or '.join(map(repr, MODES))}, got {mode!r}")


def through_frozen(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Apply a network so that gradients reach its inputs but not its parameters.

    Args:
        network: any module; one wrapped for data-parallel training is unwrapped, since it must not
            wait for gradients that do not come.
        inputs: its positional arguments.

    Returns:
        What the network returns.
    """
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return functional_call(network, {name: value.detach() for name, value in network.named_parameters()}, inputs)


def difference_weights(
    result: torch.Tensor, truth: torch.Tensor, *, mode: str = "difference_perception"
) -> torch.Tensor:
    """Where a result differs from its truth, as weights of the pixels.

    Args:
        result: [B, C, H, W].
        truth: the same shape.
        mode: "difference_perception": softmax over C·H·W of |result − truth|, summed over C, detached
            and scaled to mean 1; "official": the same of result − truth, plus 1e-7, neither detached
            nor scaled (mean 1/(H·W) + 1e-7).

    Returns:
        [B, 1, H, W], at least float32: half precision cannot hold such a softmax.

    Raises:
        ValueError: shapes do not fit, or an unknown mode.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), difference perception.
    """
    check_mode(mode)
    _check_pair("result", result, "truth", truth)
    difference = result - truth
    difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
    if mode == "difference_perception":
        difference = difference.detach().abs()
    weights = difference.flatten(1).softmax(1).view_as(difference).sum(1, keepdim=True)
    return weights * weights[0].numel() if mode == "difference_perception" else weights + 1e-7


def auxiliary_loss(
    result: torch.Tensor,
    truth: torch.Tensor,
    auxiliary_of_result: torch.Tensor,
    auxiliary_of_truth: torch.Tensor,
    *,
    mode: str = "difference_perception",
) -> dict[str, torch.Tensor]:
    """Loss of the auxiliary network: attend to where the primary one is wrong.

    Args:
        result: of the primary network, [B, C, H, W].
        truth: the same shape.
        auxiliary_of_result: what the auxiliary network makes of the result, [B, A, H, W].
        auxiliary_of_truth: what it should make of it, same shape.
        mode: see the module.

    Returns:
        "total", and its terms "auxiliary" and "auxiliary_weighted". Scalars.

    Raises:
        ValueError: shapes do not fit, or an unknown mode.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), from dehazing to depth estimation.
    """
    check_mode(mode)
    _check_pair("result", result, "truth", truth)
    _check_auxiliary(result, auxiliary_of_result, auxiliary_of_truth)
    weights = difference_weights(result, truth, mode=mode)
    terms = {
        "auxiliary": F.l1_loss(auxiliary_of_result, auxiliary_of_truth),
        "auxiliary_weighted": _weighted_l1(weights, auxiliary_of_result, auxiliary_of_truth),
    }
    return {"total": terms["auxiliary"] + terms["auxiliary_weighted"], **terms}


def primary_loss(
    result: torch.Tensor,
    truth: torch.Tensor,
    auxiliary_of_result: torch.Tensor,
    auxiliary_of_truth: torch.Tensor,
    *,
    mode: str = "difference_perception",
    auxiliary_weight: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Loss of the primary network: attend to where the auxiliary one is misled.

    Args:
        result: of the primary network, [B, C, H, W].
        truth: the same shape.
        auxiliary_of_result: what the auxiliary network makes of the result, [B, A, H, W].
        auxiliary_of_truth: what it should make of it, same shape.
        mode: see the module.
        auxiliary_weight: of the term "auxiliary" in the total.

    Returns:
        "total", and its unweighted terms "primary", "primary_weighted" (not in mode "official") and
        "auxiliary". Scalars.

    Raises:
        ValueError: shapes do not fit, or an unknown mode.

    Source: DCMPNet (CVPR 2024, arXiv 2403.01105), from depth estimation to dehazing.
    """
    check_mode(mode)
    _check_pair("result", result, "truth", truth)
    _check_auxiliary(result, auxiliary_of_result, auxiliary_of_truth)
    terms = {"primary": F.l1_loss(result, truth)}
    if mode == "difference_perception":
        weights = difference_weights(auxiliary_of_result, auxiliary_of_truth)
        terms["primary_weighted"] = _weighted_l1(weights, result, truth)
    total = sum(terms.values())
    terms["auxiliary"] = F.l1_loss(auxiliary_of_result, auxiliary_of_truth)
    return {"total": total + auxiliary_weight * terms["auxiliary"], **terms}


def _weighted_l1(weights: torch.Tensor, result: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (weights * (result - truth).abs()).mean()  # weights are positive


def _check_pair(name: str, value: torch.Tensor, reference: str, truth: torch.Tensor) -> None:
    """Raise unless both are maps [B, C, H, W] of one shape: broadcasting would hide a mistake."""
    check_tensor(reference, truth, "[B, C, H, W]")
    check_tensor(name, value, "[B, C, H, W]")
    check_shape(name, value, tuple(truth.shape), f"of {reference}")


def _check_auxiliary(result: torch.Tensor, of_result: torch.Tensor, of_truth: torch.Tensor) -> None:
    _check_pair("auxiliary_of_result", of_result, "auxiliary_of_truth", of_truth)
    expected = (result.shape[0], of_truth.shape[1], *result.shape[2:])
    check_shape("auxiliary_of_truth", of_truth, expected, "[B, A, H, W]")
