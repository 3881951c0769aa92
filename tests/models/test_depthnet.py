"""DepthNet against the published values; checkpoints, image sizes, errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mitnet_fast.models.depthnet import DepthNet
from mitnet_fast.models.official import DEPTHNET_NAMES, CheckpointError, official_name

from .. import golden
from .rounding import disturbed_as_by_float32

PUBLISHED = {"even": ("dcmpnet_depth_float64", 0, (1, 3, 64, 80)), "odd": ("dcmpnet_depth_50x70", 13, (1, 3, 50, 70))}
SMALL = {"widths": [4, 5, 6], "growth": 3}


def small() -> DepthNet:
    torch.manual_seed(0)
    return DepthNet(**SMALL)


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_values(case):
    name, salt, shape = PUBLISHED[case]
    network = DepthNet.from_official(golden.official_state("dcmpnet_depth", salt, 0.8)).double()
    with torch.no_grad():
        depth = network(golden.uniform("input", shape, salt))
    assert golden.relative_error(depth, golden.arrays(name)["depth"]) < 1e-6


def test_published_gradients():
    name, salt, shape = PUBLISHED["odd"]
    network = DepthNet.from_official(golden.official_state("dcmpnet_depth", salt, 0.8)).double()
    image = golden.uniform("input", shape, salt).requires_grad_()
    depth = network(image)
    (depth * golden.uniform("w", depth.shape, salt)).sum().backward()
    assert golden.relative_error(image.grad, golden.arrays(name)["grad_input"]) < 1e-6
    norms = golden.gradient_norms(f"{name}_gradient_norms")
    gradients = {official_name(own, DEPTHNET_NAMES): value.grad for own, value in network.named_parameters()}
    assert gradients.keys() == norms.keys()
    for own, norm in norms.items():
        assert gradients[own].norm().item() == pytest.approx(norm, rel=1e-6, abs=0), own


@pytest.mark.parametrize("case", PUBLISHED)
def test_float32_is_as_exact_as_float32_can_be(case):
    _, salt, shape = PUBLISHED[case]
    network = DepthNet.from_official(golden.official_state("dcmpnet_depth", salt, 0.8))
    image = golden.uniform("input", shape, salt, torch.float32)
    with torch.no_grad():
        actual = network(image)
        network.double()
        truth = network(image.double())
        with disturbed_as_by_float32(network):
            allowed = golden.relative_error(network(image.double()), truth)
    assert actual.dtype == torch.float32
    assert golden.relative_error(actual, truth) < allowed < 1e-5


def test_official_names_and_shapes_both_ways():
    state = golden.official_state("dcmpnet_depth", 0, 0.8)
    assert len(state) == 114
    returned = DepthNet.from_official({f"module.{name}": value for name, value in state.items()}).to_official()
    assert {name: tuple(value.shape) for name, value in returned.items()} == golden.keys("dcmpnet_depth")
    assert all(torch.equal(returned[name], value) for name, value in state.items())
    del state["up4.bias"]
    state["up5.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"DepthNet checkpoint; missing: up4\.bias; unknown: up5\.bias$"):
        DepthNet.from_official(state)


def test_network_is_a_chain_of_its_layers():
    network = small().double()
    layers = [*network.encoder, *network.decoder, network.to_depth]
    assert [type(layer).__name__ for layer in layers] == [
        *["DRDB", "Conv2d"] * 3,
        "DRDB",
        *["ConvTranspose2d", "DRDB"] * 2,
        "ConvTranspose2d",
        "Conv2d",
    ]
    assert network.size_multiple == 8
    x = image = golden.uniform("image", (2, 3, 13, 24))
    for layer in layers:
        x = layer(x)
    assert x.shape == (2, 1, 16, 24)
    assert torch.equal(network(image), x)


def test_configuration_rebuilds_the_network():
    network = small()
    assert json.loads(json.dumps(network.config)) == SMALL
    assert DepthNet().config == {"widths": [24, 48, 96, 128], "growth": 32}
    twin = DepthNet.from_official(network.to_official(), **SMALL)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (16, 16)])
def test_estimate_keeps_the_size_and_the_mode(size):
    network = small().train()
    network.encoder[0].eval()
    modes = [module.training for module in network.modules()]
    image = golden.tensor("image", (2, 3, *size), dtype=torch.float32)
    depth = network.estimate(image)
    assert not depth.requires_grad
    assert [module.training for module in network.modules()] == modes
    expected = network(2 * image - 1)[..., : size[0], : size[1]].detach()
    assert torch.equal(depth, expected)


def test_estimate_runs_in_evaluation_mode():
    network = small().train()
    network.encoder.append(nn.Dropout(0.5))
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(network.estimate(image), network.estimate(image))


@pytest.mark.parametrize("method", ["forward", "estimate"])
def test_bad_images_are_named(method):
    with pytest.raises(ValueError, match=r"image: expected .*\[1, 3, 16, 16\], got \[1, 1, 16, 16\]"):
        getattr(small(), method)(torch.zeros(1, 1, 16, 16))
    with pytest.raises(TypeError, match="image: dtype int64 is not supported"):
        getattr(small(), method)(torch.zeros(1, 3, 16, 16, dtype=torch.int64))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="widths: expected at least one level, got none"):
        DepthNet([])
    with pytest.raises(ValueError, match=r"widths\[1\]: expected an integer of at least 1, got 0"):
        DepthNet([3, 0])
    with pytest.raises(ValueError, match="growth: expected an integer of at least 1, got 0"):
        DepthNet(growth=0)
