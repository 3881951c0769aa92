"""DCMPNet against the published values; checkpoints, any image size, sharing of depth, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mitnet_fast.models.dcmpnet import DCMPNet
from mitnet_fast.models.official import DCMPNET_NAMES, CheckpointError, official_name

from .. import golden
from .rounding import disturbed_as_by_float32

UNUSED = [
    f"{layer}.{leaf}" for layer in ("conv_fu", "ccc", "conv11", "conv22", "fuse_conv1.0") for leaf in ("weight", "bias")
]

# as deep as the published network where attention and shifts are concerned, and small everywhere else
SMALL = {
    "widths": [4, 6, 8],
    "depths": [2, 2, 2, 1, 1],
    "heads": [2, 3, 2, 1, 1],
    "mlp_ratios": [2, 1, 1.5, 2, 2],
    "attention_ratios": [0.5, 1, 1, 0, 0],
    "window_size": 8,
    "prior_widths": [4, 4, 6, 6, 8],
    "depth_widths": [4, 4, 6, 6],
    "growth": 4,
}

# file with arrays, file with gradient norms, salt, shape, training mode
PUBLISHED = {
    "even": ("dcmpnet_dehaze_float64", "dcmpnet_dehaze_gradient_norms_float64", 0, (1, 3, 64, 80), False),
    "odd": ("dcmpnet_dehaze_61x75", "dcmpnet_dehaze_61x75_gradient_norms", 4, (1, 3, 61, 75), False),
    "train": ("dcmpnet_dehaze_train", "dcmpnet_dehaze_train_gradient_norms", 1, (2, 3, 64, 64), True),
}


@pytest.fixture(scope="module")
def untouched() -> dict[str, torch.Tensor]:
    """Entries of a checkpoint that the golden values leave as the network makes them."""
    axis = torch.arange(8)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    delta = (position[:, None] - position[None]).float()
    positions = delta.sign() * torch.log(1 + delta.abs())
    values = {"relative_positions": positions, "num_batches_tracked": torch.tensor(0)}
    return {key: values[leaf] for key in golden.keys("dcmpnet_dehaze") if (leaf := key.rpartition(".")[2]) in values}


@pytest.fixture(scope="module")
def checkpoint(untouched) -> dict[str, torch.Tensor]:
    return golden.official_state("dcmpnet_dehaze", 0, 0.8, untouched)


def small(seed: int = 0, **changes: object) -> DCMPNet:
    torch.manual_seed(seed)
    return DCMPNet(**(SMALL | changes))


def is_zero(name: str, train: bool) -> bool:
    """Gradients that are 0 because a softmax or a normalisation removes the constant."""
    return (
        name.endswith("attn.meta.2.bias")
        or name in ("fuse_conv2.0.bias", "fuse_conv3.0.bias")
        or (train and name.startswith("Unet1") and name.endswith(("conv.0.bias", "conv.3.bias")))
    )


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_values_and_every_gradient(case, untouched):
    arrays_of, norms_of, salt, shape, train = PUBLISHED[case]
    state = golden.official_state("dcmpnet_dehaze", salt, 0.8, untouched)
    network = DCMPNet.from_official(state).double().train(train)
    output = network(golden.uniform("input", shape, salt))
    (output.restored * golden.uniform("w", shape, salt)).sum().backward()
    expected = golden.arrays(arrays_of)

    assert golden.relative_error(output.restored, expected["restored"]) < 1e-6
    if case == "even":
        d1, d2, d3 = output.prior_features
        assert golden.relative_error(d1[:, ::8], expected["d1"]) < 1e-6
        assert golden.relative_error(d2[:, ::8], expected["d2"]) < 1e-6
        assert golden.relative_error(d3, expected["d3"]) < 1e-6
    if train:
        norm = network.prior.encoder[0][1]
        assert golden.relative_error(norm.running_mean, expected["running_mean"]) < 1e-6
        assert golden.relative_error(norm.running_var, expected["running_var"]) < 1e-6
        assert norm.num_batches_tracked == 1

    gradients = {official_name(name, DCMPNET_NAMES): value.grad for name, value in network.named_parameters()}
    for key, value in expected.items():
        if key.startswith("grad"):
            name = "drdb.conv.weight" if key == "grad_drdb_conv" else key.removeprefix("grad/")
            if np.any(value):
                assert golden.relative_error(gradients[name], value) < 1e-6, name
            else:
                assert not gradients[name].any(), name
    norms = golden.gradient_norms(norms_of)
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        if norm is None:
            assert gradients[name] is None, name
        elif is_zero(name, train):
            assert norm < 1e-10, name
            assert gradients[name].norm() < 1e-10, name
        else:  # a norm of exactly 0 belongs to a ReLU that is off everywhere
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-6, abs=0), name


@pytest.mark.parametrize(("salt", "shape", "train"), [(4, (1, 3, 45, 51), False), (1, (2, 3, 32, 36), True)])
def test_float32_is_as_exact_as_float32_can_be(salt, shape, train, untouched):
    state = golden.official_state("dcmpnet_dehaze", salt, 0.8, untouched)
    network = DCMPNet.from_official(state).train(train)
    image = golden.uniform("input", shape, salt, torch.float32)
    with torch.no_grad():
        actual = network(image).restored
        network.double()
        truth = network(image.double()).restored
        with disturbed_as_by_float32(network):
            allowed = golden.relative_error(network(image.double()).restored, truth)
    assert actual.dtype == torch.float32
    assert golden.relative_error(actual, truth) < allowed < 1e-5


def test_size_is_the_published_one():
    network = DCMPNet()
    assert sum(value.numel() for value in network.parameters()) == 17_358_337
    assert sum(value.numel() for value in network.prior.parameters()) == 13_395_459
    assert sum(value.numel() for value in network.depth_branch.parameters()) == 1_980_283
    idle = {official_name(n, DCMPNET_NAMES): v for n, v in network.named_parameters() if not v.requires_grad}
    assert sorted(idle) == sorted(UNUSED)
    assert sum(value.numel() for value in idle.values()) == 37_067
    heads = [[block.mix.heads for block in legm.blocks] for legm in (network.legm1, network.legm2, network.legm3)]
    assert heads == [[0] * 6 + [2] * 2, [0] * 4 + [4] * 4, [0] * 2 + [6] * 6]


def test_official_names_and_shapes_both_ways(checkpoint):
    network = DCMPNet.from_official(checkpoint)
    returned = network.to_official()
    assert {name: tuple(value.shape) for name, value in returned.items()} == golden.keys("dcmpnet_dehaze")
    assert all(torch.equal(returned[name], value) for name, value in checkpoint.items() if "relative" not in name)
    for name, value in checkpoint.items():
        if name.endswith("relative_positions"):
            assert (returned[name] - value).abs().max() < 1e-6, name


def test_wrapped_and_prefixed_checkpoints_load(tmp_path, checkpoint):
    path = tmp_path / "dehaze.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in checkpoint.items()}, "epoch": 3}, path)
    returned = DCMPNet.from_official(path).to_official()
    assert torch.equal(returned["legm3.blocks.7.attn.QK.weight"], checkpoint["legm3.blocks.7.attn.QK.weight"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("mfm1.mlp.0.weight"), "missing: mfm1.mlp.0.weight$"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown: extra$"),
        (
            lambda state: state.update({"ca.2.bias": torch.zeros(4)}),
            r"wrong shape: ca.2.bias \(4,\) instead of \(3,\)$",
        ),
        (
            lambda state: state.update({"legm1.blocks.6.attn.attn.relative_positions": torch.zeros(64, 64, 2)}),
            "different constant: legm1.blocks.6.attn.attn.relative_positions$",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(checkpoint, damage, message):
    state = dict(checkpoint)
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        DCMPNet.from_official(state)


def test_configuration_rebuilds_the_network():
    network = small()
    configuration = json.loads(json.dumps(network.config))
    assert configuration == {**SMALL, "share_depth": False}
    twin = DCMPNet(**configuration)
    twin.load_state_dict(network.state_dict())
    image = golden.uniform("image", (1, 3, 32, 32), dtype=torch.float32)
    assert torch.equal(twin.eval()(image).restored, network.eval()(image).restored)
    configuration["widths"].append(1)
    assert network.config["widths"] == SMALL["widths"]


def test_smaller_networks_keep_their_official_names():
    network = small()
    state = network.to_official()
    outside = [name for name in state if ".blocks." not in name]  # other blocks attend than in the published network
    assert sorted(outside) == sorted(name for name in golden.keys("dcmpnet_dehaze") if ".blocks." not in name)
    twin = DCMPNet.from_official(state, **SMALL)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("size", [(1, 1), (3, 11), (1, 40), (16, 16), (17, 31), (27, 29), (28, 28), (61, 75)])
def test_restore_is_forward_on_the_reflected_image(size):
    network = small()
    image = golden.tensor("image", (2, 3, *size), dtype=torch.float32)
    pads = [(0, max(-(-side // 4) * 4, 28) - side) for side in size]
    reflected = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *pads], mode="reflect"))
    with torch.no_grad():
        expected = network.eval()(2 * reflected - 1).restored[..., : size[0], : size[1]] / 2 + 0.5
    network.train()
    actual = network.restore(image)
    assert not actual.requires_grad
    assert golden.relative_error(actual, expected) < 1e-6


def test_restore_leaves_modes_and_statistics_alone():
    network = small().train()
    network.legm2.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    network.restore(torch.rand(1, 3, 20, 20))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="image"):
        network.restore(torch.rand(1, 2, 20, 20))
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("size", [(25, 25), (28, 41)])
def test_the_smallest_sizes_of_forward(size):
    network = small().double().eval()
    image = golden.uniform("image", (1, 3, *size))
    pads = [(0, -side % 4) for side in size]
    reflected = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *pads], mode="reflect"))
    expected = network(reflected)
    actual = network(image)
    assert torch.equal(actual.restored, expected.restored[..., : size[0], : size[1]])
    assert all(torch.equal(a, b) for a, b in zip(actual.prior_features, expected.prior_features, strict=True))


@pytest.mark.parametrize(
    ("changes", "smallest"),
    [({}, 28), ({"window_size": 4}, 16), ({"attention_ratios": [0] * 5}, 16), ({"depths": [1] * 5}, 20)],
)
def test_smallest_side_follows_from_the_stages(changes, smallest):
    network = small(**changes).eval()
    assert network.smallest_side == smallest
    assert torch.isfinite(network(torch.rand(1, 3, smallest - 3, smallest)).restored).all()
    with pytest.raises(ValueError, match=rf"at least {smallest - 3}, got {smallest - 4}×{smallest}; restore\(\)"):
        network(torch.rand(1, 3, smallest - 4, smallest))


def test_shared_depth_replaces_the_branch():
    own = small().double().eval()
    shared = small(1, share_depth=True).double().eval()
    state = own.state_dict()
    shared.load_state_dict({name: state[name] for name in shared.state_dict()})
    assert [name for name in state if name not in shared.state_dict()] == [
        f"depth_branch.{name}" for name in own.depth_branch.state_dict()
    ]
    image = golden.uniform("image", (2, 3, 32, 48))
    depth = own.depth_branch(image)[..., :32, :48].detach().requires_grad_()
    output = shared(image, depth)
    assert golden.relative_error(output.restored, own(image).restored.detach()) < 1e-14
    output.restored.sum().backward()
    assert depth.grad is None
    assert shared.depth_block.fuse.weight.grad is not None

    odd, odd_depth = image[..., :26, :45], depth.detach()[..., :26, :45]
    padded = [torch.from_numpy(np.pad(x, [(0, 0), (0, 0), (0, 2), (0, 3)], mode="reflect")) for x in (odd, odd_depth)]
    expected = shared(*padded).restored[..., :26, :45].detach()
    assert golden.relative_error(shared(odd, odd_depth).restored, expected) < 1e-14
    restored = shared.restore((odd + 1) / 2, odd_depth)
    assert golden.relative_error(restored, (expected + 1) / 2) < 1e-14
    assert shared.restore(torch.rand(1, 3, 3, 5).double(), torch.rand(1, 1, 3, 5).double()).shape == (1, 3, 3, 5)


def test_images_of_a_batch_do_not_meet():
    network = small().double().eval()
    images = golden.uniform("image", (3, 3, 28, 32))
    together = network(images).restored
    for index in range(3):
        assert golden.relative_error(network(images[index : index + 1]).restored, together[index : index + 1]) < 1e-13


def test_gradients_reach_all_that_is_used():
    network = small().double().train()
    network(golden.uniform("image", (2, 3, 32, 32))).restored.square().sum().backward()
    without = {official_name(n, DCMPNET_NAMES) for n, value in network.named_parameters() if value.grad is None}
    assert without == set(UNUSED)


def test_autocast_runs_forward_and_backward():
    network = small().train()
    image = golden.uniform("image", (2, 3, 32, 32), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        restored = network(image).restored
    restored.float().square().sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in network.parameters() if v.requires_grad)
    # image + correction: only the correction, rounded to 8 bits some twenty times in a row, is inexact
    exact = network(image).restored.detach()
    assert (restored.float() - exact).norm() < 20 * 2**-8 * (exact - image).norm()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[1.0]], TypeError, r"image: expected a tensor \[B, C, H, W\], got list"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "image: dtype uint8 is not supported"),
        (torch.zeros(3, 32, 32), ValueError, r"image: expected shape \[B, C, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"image: expected .*\[1, 3, 32, 32\], got \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"image: needs at least one pixel, got shape \[1, 3, 0, 32\]"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "restore"])
def test_bad_images_are_named(method, image, error, message):
    with pytest.raises(error, match=message):
        getattr(small(), method)(image)


@pytest.mark.parametrize(
    ("share", "depth", "message"),
    [
        (False, torch.zeros(2, 1, 32, 32), "depth_prior: only a network built with share_depth=True takes one"),
        (True, None, "depth_prior: a network built with share_depth=True needs the depth of the hazy image"),
        (True, torch.zeros(2, 1, 32, 31), r"depth_prior: expected .*\[2, 1, 32, 32\], got \[2, 1, 32, 31\]"),
        (True, torch.zeros(1, 1, 32, 32), "depth_prior: expected .* 2.*, got .*1"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "restore"])
def test_bad_depth_is_named(method, share, depth, message):
    with pytest.raises(ValueError, match=message):
        getattr(small(share_depth=share), method)(torch.zeros(2, 3, 32, 32), depth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [4, 6]}, r"widths: expected three levels, got \[4, 6\]"),
        ({"depths": [1, 1]}, r"depths: expected five stages, got \[1, 1\]"),
        ({"depths": [1, 1, 0, 1, 1]}, r"depths\[2\]: expected an integer of at least 1, got 0"),
        ({"heads": [3, 1, 1, 1, 1]}, "heads: must divide the 4 channels, or be 0, got 3"),
        ({"prior_widths": [4, 4]}, r"widths: expected five levels, got \[4, 4\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
