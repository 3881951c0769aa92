"""Difference perception against its equations, computed pixel by pixel, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mitnet_fast.losses.difference_perception import (
    auxiliary_loss,
    difference_weights,
    primary_loss,
    through_frozen,
)

from .. import golden

MODES = ["difference_perception", "official"]


def maps(channels: int = 3, auxiliary: int = 2, size: tuple[int, int] = (5, 4)) -> list[torch.Tensor]:
    """Result, truth, auxiliary of the result, auxiliary of the truth."""
    shapes = [(2, channels, *size)] * 2 + [(2, auxiliary, *size)] * 2
    return [golden.uniform(name, shape) for name, shape in zip(("u*", "u", "M", "D"), shapes, strict=True)]


def softmax_by_hand(values: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] → softmax over C·H·W, summed over C: [B, 1, H, W]."""
    out = torch.zeros(values.shape[0], 1, *values.shape[2:], dtype=torch.float64)
    for image, result in zip(values.tolist(), out, strict=True):
        total = sum(math.exp(v) for channel in image for row in channel for v in row)
        for channel in image:
            result[0] += torch.tensor([[math.exp(v) / total for v in row] for row in channel], dtype=torch.float64)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_are_a_softmax_of_the_difference_with_mean_one(channels):
    result, truth = maps(channels)[:2]
    weights = difference_weights(result.requires_grad_(), truth)
    assert not weights.requires_grad
    assert golden.relative_error(weights, 20 * softmax_by_hand((result - truth).abs())) < 1e-14
    assert weights.mean((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-14)
    worst = (result - truth).detach().abs().exp().sum(1).flatten(1).argmax(1)
    assert torch.equal(weights.flatten(1).argmax(1), worst)


def test_official_weights_are_signed_unscaled_and_differentiable():
    result, truth = maps()[:2]
    weights = difference_weights(result.requires_grad_(), truth, mode="official")
    assert weights.requires_grad
    assert golden.relative_error(weights, softmax_by_hand(result - truth) + 1e-7) < 1e-14
    assert weights.sum((1, 2, 3)).tolist() == pytest.approx([1 + 20e-7] * 2, abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_half_precision_maps_are_float32(mode):
    result, truth = (value.bfloat16() for value in maps()[:2])
    weights = difference_weights(result, truth, mode=mode)
    assert weights.dtype == torch.float32
    # the difference itself is rounded to 8 bits, and a softmax passes absolute errors on as relative ones
    exact = difference_weights(result.double(), truth.double(), mode=mode)
    assert (weights.double() / exact - 1).abs().max() < 2 * 2**-8


@pytest.mark.parametrize("mode", MODES)
def test_auxiliary_loss_is_its_equation(mode):
    result, truth, of_result, of_truth = maps()
    a = {
        "difference_perception": 20 * softmax_by_hand((result - truth).abs()),
        "official": softmax_by_hand(result - truth) + 1e-7,
    }[mode]
    terms = auxiliary_loss(result, truth, of_result, of_truth, mode=mode)
    plain = sum((of_result - of_truth).abs().flatten().tolist()) / of_truth.numel()
    weighted = sum((a * of_result - a * of_truth).abs().flatten().tolist()) / of_truth.numel()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"total": plain + weighted, "auxiliary": plain, "auxiliary_weighted": weighted}, rel=1e-13
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [0.1, 0.7])
def test_primary_loss_is_its_equation(mode, weight):
    result, truth, of_result, of_truth = maps()
    e = 20 * softmax_by_hand((of_result - of_truth).abs())
    plain = sum((result - truth).abs().flatten().tolist()) / truth.numel()
    weighted = sum((e * result - e * truth).abs().flatten().tolist()) / truth.numel()
    other = sum((of_result - of_truth).abs().flatten().tolist()) / of_truth.numel()
    terms = primary_loss(result, truth, of_result, of_truth, mode=mode, auxiliary_weight=weight)
    expected = {"total": plain + weighted + weight * other, "primary": plain, "primary_weighted": weighted}
    if mode == "official":
        expected = {"total": plain + weight * other, "primary": plain}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {**expected, "auxiliary": other}, rel=1e-13
    )


def test_weights_carry_no_gradient():
    result, truth, of_result, of_truth = (value.requires_grad_() for value in maps())
    auxiliary = auxiliary_loss(result, truth, of_result, of_truth)["total"]
    gradient, none = torch.autograd.grad(auxiliary, [of_result, result], allow_unused=True)
    a = difference_weights(result, truth)
    assert golden.relative_error(gradient, ((1 + a) * (of_result - of_truth).sign()).detach() / 80) < 1e-14
    assert none is None
    primary = primary_loss(result, truth, of_result, of_truth)["total"]
    gradient, through = torch.autograd.grad(primary, [result, of_result])
    e = difference_weights(of_result, of_truth)
    assert golden.relative_error(gradient, ((1 + e) * (result - truth).sign()).detach() / 120) < 1e-14
    assert golden.relative_error(through, 0.1 * (of_result - of_truth).sign().detach() / 80) < 1e-14


def test_official_weights_pull_on_the_result():
    result, truth, of_result, of_truth = maps()
    result.requires_grad_()
    gradient = torch.autograd.grad(auxiliary_loss(result, truth, of_result, of_truth, mode="official")["total"], result)
    softmax = torch.softmax((result - truth).flatten(1), 1).view_as(result)
    expected = (softmax.sum(1, keepdim=True) * (of_result - of_truth).abs()).mean()
    assert golden.relative_error(gradient[0], torch.autograd.grad(expected, result)[0]) < 1e-13
    assert gradient[0].norm() > 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()


def test_a_frozen_network_passes_gradients_but_keeps_none():
    net = network().eval()
    x = golden.uniform("x", (2, 3, 6, 6)).requires_grad_()
    frozen = through_frozen(net, x)
    assert torch.equal(frozen, net(x))
    (gradient,) = torch.autograd.grad(frozen.square().sum(), x)
    (usual,) = torch.autograd.grad(net(x).square().sum(), x)
    assert torch.equal(gradient, usual)
    through_frozen(net, x).sum().backward()
    assert all(value.grad is None and value.requires_grad for value in net.parameters())


def test_a_network_in_data_parallel_training_is_unwrapped():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(network().eval(), find_unused_parameters=True)
        x = golden.uniform("x", (2, 3, 6, 6)).requires_grad_()
        # seen by the reducer, the second call would count all parameters as unused, and the backward pass fail
        (net(x).sum() + 2 * through_frozen(net, x).sum()).backward()
        expected = network().eval()
        y = x.detach().clone().requires_grad_()
        (expected(y).sum() + 2 * through_frozen(expected, y).sum()).backward()
        assert golden.relative_error(x.grad, y.grad) < 1e-14
        for ours, plain in zip(net.parameters(), expected.parameters(), strict=True):
            assert golden.relative_error(ours.grad, plain.grad) < 1e-14
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("primary", "auxiliary"), [("restoration", "edges"), ("depth", "segmentation")])
def test_the_recipe_trains_each_network_by_its_own_loss(primary, auxiliary):
    """The lines of the module's docstring, for tasks with other channels than dehazing has."""
    torch.manual_seed(0)
    channels, out = {"restoration": 3, "depth": 1}[primary], {"edges": 1, "segmentation": 5}[auxiliary]
    first = nn.Conv2d(3, channels, 3, padding=1).double()
    network = nn.Conv2d(channels, out, 3, padding=1).double()
    image, truth = golden.uniform("image", (2, 3, 6, 6)), golden.uniform("truth", (2, channels, 6, 6))
    target = golden.uniform("target", (2, out, 6, 6))

    result = first(image)
    aux = auxiliary_loss(result.detach(), truth, network(result.detach()), target)
    main = primary_loss(result, truth, through_frozen(network, result), target)
    of_first = torch.autograd.grad(main["total"], list(first.parameters()), retain_graph=True)
    of_network = torch.autograd.grad(aux["total"], list(network.parameters()), retain_graph=True)
    (aux["total"] + main["total"]).backward()
    for net, gradients in ((first, of_first), (network, of_network)):
        for value, gradient in zip(net.parameters(), gradients, strict=True):
            assert golden.relative_error(value.grad, gradient) < 1e-14


@pytest.mark.parametrize("loss", [auxiliary_loss, primary_loss])
@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 3, 5, 3), r"result: expected shape of truth = \[2, 3, 5, 4\], got \[2, 3, 5, 3\]"),
        (1, (1, 3, 5, 4), r"result: expected shape of truth = \[1, 3, 5, 4\], got \[2, 3, 5, 4\]"),
        (
            2,
            (2, 1, 5, 4),
            r"auxiliary_of_result: expected shape of auxiliary_of_truth = \[2, 2, 5, 4\], got \[2, 1, 5, 4\]",
        ),
        (3, (2, 2, 16, 16), r"auxiliary_of_result: .* = \[2, 2, 16, 16\], got \[2, 2, 5, 4\]"),
    ],
)
def test_bad_shapes_are_named(loss, index, shape, message):
    arguments = maps()
    arguments[index] = torch.zeros(shape).double()
    with pytest.raises(ValueError, match=message):
        loss(*arguments)


@pytest.mark.parametrize("loss", [auxiliary_loss, primary_loss])
def test_auxiliary_maps_of_another_size_are_named(loss):
    result, truth = maps()[:2]
    with pytest.raises(ValueError, match=r"auxiliary_of_truth: expected .*\[2, 2, 5, 4\], got \[2, 2, 16, 16\]"):
        loss(result, truth, torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16))


@pytest.mark.parametrize("loss", [auxiliary_loss, primary_loss, lambda *x, mode: difference_weights(*x[:2], mode=mode)])
def test_unknown_modes_are_named(loss):
    with pytest.raises(ValueError, match="mode: expected 'difference_perception' or 'official', got 'paper'"):
        loss(*maps(), mode="paper")
