"""Contrastive term against a VGG-19 written layer by layer; getting its weights, and failing to."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.losses import contrastive
from mitnet_fast.losses.contrastive import ContrastiveLoss, VGG19Features, load_vgg19
from mitnet_fast.models.official import CheckpointError

from .. import golden
from . import vgg19

NAMES = ("restored", "clear", "hazy")


def images(size: tuple[int, int] = (32, 18)) -> list[torch.Tensor]:
    return [golden.uniform(name, (2, 3, *size)) for name in NAMES]


def test_features_are_those_of_the_layers_one_by_one(vgg_path, vgg_state):
    image = images()[0]
    actual = VGG19Features(vgg_path).double()(image)
    expected = vgg19.features(vgg_state, image)
    assert [tuple(level.shape[1:]) for level in actual] == [
        (64, 32, 18),
        (128, 16, 9),
        (256, 8, 4),
        (512, 4, 2),
        (512, 2, 1),
    ]
    for ours, formula in zip(actual, expected, strict=True):
        assert golden.relative_error(ours, formula.detach()) < 1e-14


@pytest.mark.parametrize("mode", ["default", "official"])
def test_loss_and_its_gradient_are_the_equation(mode, vgg_path, vgg_state):
    restored, clear, hazy = (image.requires_grad_() for image in images())
    loss = ContrastiveLoss(vgg_path, mode=mode).double()
    levels = []
    for name, image in zip(NAMES, (restored, clear.detach(), hazy.detach()), strict=True):
        if mode == "default":
            mean = torch.tensor([0.485, 0.456, 0.406]).double().view(1, 3, 1, 1)
            deviation = torch.tensor([0.229, 0.224, 0.225]).double().view(1, 3, 1, 1)
            image = ((image + 1) / 2 - mean) / deviation
        found = vgg19.features(vgg_state, image)
        if mode == "official":
            projected = torch.einsum("oi,bihw->bohw", getattr(loss, f"{name}_weight1")[..., 0, 0], found[4])
            projected = F.gelu(projected + getattr(loss, f"{name}_bias1").view(1, -1, 1, 1))
            projected = torch.einsum("oi,bihw->bohw", getattr(loss, f"{name}_weight2")[..., 0, 0], projected)
            found[4] = projected + getattr(loss, f"{name}_bias2").view(1, -1, 1, 1)
        levels.append(found)
    expected = 0
    for weight, ours, positive, negative in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), *levels, strict=True):
        expected = expected + weight * (ours - positive).abs().mean() / ((ours - negative).abs().mean() + 1e-7)
    actual = loss(restored, clear, hazy)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)  # ImageNet's constants are float32 here
    gradients = torch.autograd.grad(actual, [restored, clear, hazy], allow_unused=True)
    assert golden.relative_error(gradients[0], torch.autograd.grad(expected, restored)[0]) < 1e-6
    assert gradients[1:] == (None, None)


def test_loss_falls_towards_the_clear_and_rises_towards_the_hazy_image(vgg_path):
    _, clear, hazy = (image.float() for image in images())
    loss = ContrastiveLoss(vgg_path)
    between = [loss(clear + step * (hazy - clear), clear, hazy).item() for step in (0, 0.25, 0.5, 0.75)]
    assert between[0] == 0
    assert between == sorted(between)


def test_random_networks_are_the_same_in_every_run_and_differ_from_each_other(vgg_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ContrastiveLoss(vgg_path, mode="official")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = ContrastiveLoss(vgg_path, mode="official")
    weights = [getattr(first, f"{name}_weight{layer}") for name in NAMES for layer in (1, 2)]
    for index, weight in enumerate(weights):
        assert 0.999 * 512**-0.5 < weight.abs().max() <= 512**-0.5
        assert not any(torch.equal(weight, other) for other in weights[:index])
    for name in NAMES:
        assert torch.equal(getattr(first, f"{name}_weight2"), getattr(second, f"{name}_weight2"))


@pytest.mark.parametrize("mode", ["default", "official"])
def test_fixed_weights_are_neither_saved_nor_trained(mode, vgg_path):
    loss = ContrastiveLoss(vgg_path, mode=mode)
    assert not loss.state_dict()
    assert not list(loss.parameters())


def test_autocast_computes_the_distances_in_float32(vgg_path):
    restored, clear, hazy = (image.float() for image in images())
    loss = ContrastiveLoss(vgg_path)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(restored, clear, hazy)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(restored, clear, hazy).item(), rel=2**-7)


def test_a_promised_hash_is_checked(tmp_path, vgg_path):
    digest = hashlib.sha256(vgg_path.read_bytes()).hexdigest()
    right, wrong = tmp_path / f"vgg19-{digest[:8]}.pth", tmp_path / "vgg19-dcbb9e9d.pth"
    for copy in (right, wrong):
        shutil.copy(vgg_path, copy)
    assert len(load_vgg19(right)) == 26
    with pytest.raises(CheckpointError, match=rf"damaged: its SHA-256 begins with {digest[:8]}, not dcbb9e9d"):
        load_vgg19(wrong)


def test_the_published_file_is_fetched_once_and_its_hash_checked(tmp_path, vgg_path, vgg_state, monkeypatch, capfd):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hashlib.sha256(vgg_path.read_bytes()).hexdigest()
    served = tmp_path / f"vgg19-{digest[:8]}.pth"
    shutil.copy(vgg_path, served)
    monkeypatch.setattr(contrastive, "VGG19_URL", served.as_uri())
    assert torch.equal(load_vgg19()["features.28.weight"], vgg_state["features.28.weight"])
    served.unlink()  # the second use reads the cached file
    assert torch.equal(load_vgg19()["features.0.bias"], vgg_state["features.0.bias"])

    damaged = tmp_path / "vgg19-00000000.pth"
    shutil.copy(vgg_path, damaged)
    monkeypatch.setattr(contrastive, "VGG19_URL", damaged.as_uri())
    with pytest.raises(RuntimeError, match=r"could not be fetched .*invalid hash value"):
        load_vgg19()


def test_without_network_the_message_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(contrastive, "VGG19_URL", (tmp_path / "nowhere" / "vgg19-dcbb9e9d.pth").as_uri())
    with pytest.raises(RuntimeError) as caught:
        ContrastiveLoss()
    for part in ("VGG-19", "vgg19-dcbb9e9d.pth", str(tmp_path / "hub"), "vgg_weights", "contrastive_weight=0"):
        assert part in str(caught.value)


def test_the_address_is_torchvisions():
    assert contrastive.VGG19_URL == "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


def test_a_path_without_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg_weights: no file .*absent\.pth; .*contrastive_weight=0"):
        load_vgg19(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("features.19.bias"), r"not torchvision's VGG-19; missing: features\.19\.bias$"),
        (lambda state: state.update({"features.1.weight": torch.ones(64)}), r"unknown: features\.1\.weight$"),
        (
            lambda state: state.update({"features.5.weight": torch.zeros(64, 64, 3, 3)}),
            r"wrong shape: features\.5\.weight \(64, 64, 3, 3\) instead of \(128, 64, 3, 3\)$",
        ),
    ],
)
def test_other_networks_are_refused(damage, message, vgg_state, tmp_path):
    state = dict(vgg_state)
    damage(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message):
        load_vgg19(tmp_path / "other.pth")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"page\.pth: no checkpoint of tensors"):
        load_vgg19(tmp_path / "page.pth")


def test_bad_arguments_are_named(vgg_path):
    with pytest.raises(ValueError, match="mode: expected 'default' or 'official', got 'difference_perception'"):
        ContrastiveLoss(vgg_path, mode="difference_perception")
    loss = ContrastiveLoss(vgg_path)
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"clear: expected shape of restored = \[2, 3, 16, 16\], got \[1, 3, 16, 16\]"):
        loss(x, x[:1], x)
    with pytest.raises(ValueError, match=r"hazy: expected shape of restored = \[2, 3, 16, 16\], got \[2, 3, 16, 15\]"):
        loss(x, x, x[..., :15])
    with pytest.raises(ValueError, match="image: VGG-19 needs at least 16×16 pixels, got 16×15"):
        loss(*[x[..., :15]] * 3)
