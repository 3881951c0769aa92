"""Losses of DCMPNet: their sums, which network each of them trains, and training without depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mitnet_fast.losses.contrastive import ContrastiveLoss
from mitnet_fast.losses.dcmpnet import DCMPNetLoss
from mitnet_fast.losses.difference_perception import difference_weights
from mitnet_fast.models.depthnet import DepthNet

from .. import golden

SIZE = (20, 18)  # no multiple of the depth network's 4: its map is larger than the image
MODES = ["difference_perception", "official"]


class Setting:
    """A one-layer dehazing network, a small depth network, and a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dehazing = nn.Conv2d(3, 3, 3, padding=1).double()
        self.depth_network = DepthNet((3, 4), growth=2).double()
        self.hazy, self.clear = (golden.uniform(name, (2, 3, *SIZE)) for name in ("hazy", "clear"))
        self.depth = golden.tensor("depth", (2, 1, *SIZE))
        self.restored = self.dehazing(self.hazy)

    def arguments(self) -> tuple:
        return self.restored, self.hazy, self.clear, self.depth_network, self.depth

    def gradients(self, total: torch.Tensor) -> tuple[list, list]:
        """Gradients of the dehazing network's parameters and of the depth network's."""
        parameters = [list(network.parameters()) for network in (self.dehazing, self.depth_network)]
        flat = torch.autograd.grad(total, [*parameters[0], *parameters[1]], allow_unused=True, retain_graph=True)
        return list(flat[: len(parameters[0])]), list(flat[len(parameters[0]) :])


@pytest.fixture
def setting() -> Setting:
    return Setting()


def expected_terms(setting: Setting, mode: str) -> dict[str, torch.Tensor]:
    """The equations of the module on plain tensors; gradients flow everywhere but into weights."""
    u, target = setting.clear, setting.depth
    restored = setting.restored
    estimate = setting.depth_network(restored)[..., : SIZE[0], : SIZE[1]]
    a = difference_weights(restored, u, mode=mode)
    terms = {
        "restored": (restored - u).abs().mean(),
        "depth": (estimate - target).abs().mean(),
        "depth_weighted": (a * estimate - a * target).abs().mean(),
    }
    if mode == "difference_perception":
        e = difference_weights(estimate, target)
        terms["restored_weighted"] = (e * restored - e * u).abs().mean()
    return terms


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contrastive_weight", [0, 0.3])
@pytest.mark.parametrize("depth_weight", [0.1, 2])
def test_terms_and_totals_are_the_equations(setting, mode, contrastive_weight, depth_weight, vgg_path):
    loss = DCMPNetLoss(
        mode, depth_weight=depth_weight, contrastive_weight=contrastive_weight, vgg_weights=vgg_path
    ).double()
    expected = expected_terms(setting, mode)
    expected["depth_loss"] = expected["depth"] + expected["depth_weighted"]
    expected["dehazing_loss"] = (
        expected["restored"] + expected.get("restored_weighted", 0) + depth_weight * expected["depth"]
    )
    if contrastive_weight:
        kind = "official" if mode == "official" else "default"
        term = ContrastiveLoss(vgg_path, mode=kind).double()(setting.restored, setting.clear, setting.hazy)
        expected["contrastive"] = term
        expected["dehazing_loss"] = expected["dehazing_loss"] + contrastive_weight * term
    expected["total"] = expected["dehazing_loss"] + expected["depth_loss"]
    actual = loss(*setting.arguments())
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-12
    )


def test_difference_perception_trains_each_network_by_its_own_loss_only(setting):
    loss = DCMPNetLoss(contrastive_weight=0)
    terms = loss(*setting.arguments())
    direct = expected_terms(setting, "difference_perception")
    wanted_dehazing, _ = setting.gradients(direct["restored"] + direct["restored_weighted"] + 0.1 * direct["depth"])
    _, wanted_depth = setting.gradients(direct["depth"] + direct["depth_weighted"])

    dehazing, depth = setting.gradients(terms["dehazing_loss"])
    assert depth == [None] * len(depth)
    assert all(golden.relative_error(a, b) < 1e-13 for a, b in zip(dehazing, wanted_dehazing, strict=True))
    dehazing, depth = setting.gradients(terms["depth_loss"])
    assert dehazing == [None, None]
    assert all(golden.relative_error(a, b) < 1e-13 for a, b in zip(depth, wanted_depth, strict=True))

    terms["total"].backward()  # one pass for both
    for network, wanted in ((setting.dehazing, wanted_dehazing), (setting.depth_network, wanted_depth)):
        for value, gradient in zip(network.parameters(), wanted, strict=True):
            assert golden.relative_error(value.grad, gradient) < 1e-13


def test_depth_reaches_the_dehazing_network_through_the_frozen_one(setting):
    with_depth, without = (
        setting.gradients(DCMPNetLoss(depth_weight=weight, contrastive_weight=0)(*setting.arguments())["dehazing_loss"])
        for weight in (1, 0)
    )
    estimate = setting.depth_network(setting.restored)[..., : SIZE[0], : SIZE[1]]
    through = setting.gradients(F.l1_loss(estimate, setting.depth))[0]
    for more, less, gradient in zip(with_depth[0], without[0], through, strict=True):
        assert gradient.norm() > 1e-6
        assert golden.relative_error(more - less, gradient) < 1e-9


def test_official_trains_both_networks_by_the_sum(setting):
    terms = DCMPNetLoss("official", contrastive_weight=0)(*setting.arguments())
    direct = expected_terms(setting, "official")
    wanted = setting.gradients(direct["restored"] + 1.1 * direct["depth"] + direct["depth_weighted"])
    actual = setting.gradients(terms["total"])
    for ours, formula in zip([*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
        assert golden.relative_error(ours, formula) < 1e-13
    assert all(gradient is not None for gradient in setting.gradients(terms["depth_loss"])[0])
    assert all(gradient is not None for gradient in setting.gradients(terms["dehazing_loss"])[1])


@pytest.mark.parametrize("mode", MODES)
def test_the_depth_network_runs_as_often_as_its_losses_need(setting, mode):
    calls = []
    setting.depth_network.register_forward_hook(lambda *_: calls.append(1))
    DCMPNetLoss(mode, contrastive_weight=0)(*setting.arguments())
    assert len(calls) == (2 if mode == "difference_perception" else 1)


def test_losses_can_be_taken_apart_for_training_that_alternates(setting):
    loss = DCMPNetLoss(contrastive_weight=0)
    both = loss(*setting.arguments())
    dehazing = loss.dehazing(*setting.arguments())
    depth = loss.depth(setting.restored, setting.clear, setting.depth_network, setting.depth)
    assert dehazing.keys() == {"total", "restored", "restored_weighted", "depth"}
    assert depth.keys() == {"total", "depth", "depth_weighted"}
    assert torch.equal(dehazing["total"], both["dehazing_loss"])
    assert torch.equal(depth["total"], both["depth_loss"])


@pytest.mark.parametrize("mode", MODES)
def test_without_depth_its_terms_are_left_out(setting, mode, vgg_path):
    restored, hazy, clear = setting.arguments()[:3]
    loss = DCMPNetLoss(mode, contrastive_weight=0.5, vgg_weights=vgg_path).double()
    terms = loss(restored, hazy, clear)
    assert terms.keys() == {"total", "dehazing_loss", "restored", "contrastive"}
    assert terms["total"] is terms["dehazing_loss"]
    expected = F.l1_loss(restored, clear) + 0.5 * loss.contrastive(restored, clear, hazy)
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-14)
    plain = DCMPNetLoss(mode, contrastive_weight=0)(restored, hazy, clear)
    assert plain.keys() == {"total", "dehazing_loss", "restored"}
    assert plain["total"].item() == F.l1_loss(restored, clear).item()


def test_without_contrastive_term_no_weights_are_wanted(monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    assert DCMPNetLoss(contrastive_weight=0).contrastive is None
    with pytest.raises(RuntimeError, match="contrastive_weight=0"):
        DCMPNetLoss()


def test_loss_has_no_state(vgg_path):
    loss = DCMPNetLoss("official", vgg_weights=vgg_path)
    assert not loss.state_dict()
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 1, *SIZE), r"restored: expected .*\[2, 3, 20, 18\], got \[2, 1, 20, 18\]"),
        (1, torch.zeros(2, 3, 20, 17), r"hazy: expected shape of restored = \[2, 3, 20, 18\], got \[2, 3, 20, 17\]"),
        (2, torch.zeros(1, 3, *SIZE), r"clear: expected shape of restored = \[2, 3, 20, 18\], got \[1, 3, 20, 18\]"),
        (3, None, "depth_network: got None, but depth is given; the depth terms need both, or neither"),
        (4, None, "depth: got None, but depth_network is given; the depth terms need both, or neither"),
        (4, torch.zeros(2, 3, *SIZE), r"depth: expected .*\[2, 1, 20, 18\], got \[2, 3, 20, 18\]"),
    ],
)
def test_bad_arguments_are_named(setting, position, value, message):
    arguments = list(setting.arguments())
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        DCMPNetLoss(contrastive_weight=0)(*arguments)


def test_the_depth_loss_needs_depth(setting):
    with pytest.raises(ValueError, match="depth_network, depth: got None"):
        DCMPNetLoss(contrastive_weight=0).depth(setting.restored, setting.clear, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "paper"}, "mode: expected 'difference_perception' or 'official', got 'paper'"),
        ({"depth_weight": -1}, "depth_weight: expected a number of at least 0, got -1"),
        ({"contrastive_weight": float("nan")}, "contrastive_weight: expected a number of at least 0, got nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DCMPNetLoss(**({"contrastive_weight": 0} | options))
