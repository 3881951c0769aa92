"""Files of weights: what is written comes back as the same network, whatever the kind of file."""

from __future__ import annotations

import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mitnet_fast import __version__
from mitnet_fast.models import CheckpointError, DCMPNet, DepthNet, DepthSharingDCMPNet, MITNet
from mitnet_fast.models.official import PREFIXES, WRAPPERS
from mitnet_fast.weights import (
    TRAINING_CHECKPOINT,
    WeightsError,
    describe,
    load_weights,
    read_card,
    save_weights,
    system_of,
)
from tests.networks import SMALL_DCMPNET


def network(system: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return {
        "mitnet": lambda: MITNet(width=2, depth=3, decoder_spectral=True),
        "dcmpnet": lambda: DCMPNet(**SMALL_DCMPNET),
        "depthnet": lambda: DepthNet((4, 4), growth=2),
        "dcmpnet-shared-depth": lambda: DepthSharingDCMPNet(
            DCMPNet(**SMALL_DCMPNET, share_depth=True), DepthNet((4,), 2)
        ),
    }[system]()


def assert_same_network(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert type(actual) is type(expected)
    assert actual.config == expected.config
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


@pytest.mark.parametrize("system", ["mitnet", "dcmpnet", "depthnet", "dcmpnet-shared-depth"])
def test_a_network_comes_back_from_its_file(system, tmp_path):
    model = network(system).train()
    assert system_of(model) == system
    path = save_weights(tmp_path / "new folder" / "weights.safetensors", model, {"demo": True, "scores": {"psnr": 20}})
    loaded, card = load_weights(path)
    assert_same_network(loaded, model)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in loaded.parameters() if p.dim() == 4)
    assert not any(module.training for module in loaded.modules())
    assert card == read_card(path)
    assert (card["system"], card["demo"], card["scores"]) == (system, True, {"psnr": 20})
    assert card["width"] == {"mitnet": 2, "depthnet": [4, 4]}.get(system, [4, 4, 4])
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["versions"]["torch"] == torch.__version__
    assert card["versions"]["mitnet_fast"] == __version__
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_the_file_is_plain_safetensors_and_always_the_same(tmp_path):
    model = network("mitnet")
    first, second = (save_weights(tmp_path / name, model) for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert json.loads(file.metadata()["mitnet_fast"])["config"] == model.config


def test_the_network_with_shared_depth_restores_from_the_image_alone(tmp_path):
    model, _ = load_weights(save_weights(tmp_path / "w.safetensors", network("dcmpnet-shared-depth")))
    image = torch.rand(1, 3, 33, 30)
    expected = model.dehazing.restore(image, model.depth.estimate(image))
    assert torch.equal(model.restore(image), expected)


def test_the_network_goes_to_the_device_that_is_asked_for(tmp_path):
    model, _ = load_weights(save_weights(tmp_path / "w.safetensors", network("mitnet")), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


WRAPPINGS = {
    "bare": lambda state: state,
    **{key: lambda state, key=key: {"epoch": 3, key: state} for key in WRAPPERS},
    "in two": lambda state: {"model": {"state_dict": state, "step": 1}, "optimizer": {"lr": [0.1]}},
    **{prefix: lambda state, prefix=prefix: prefixed(state, prefix) for prefix in PREFIXES},
    "compiled, then parallel": lambda state: prefixed(prefixed(state, "_orig_mod."), "module."),
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **prefixed(state, "module.")},
    "averaged, in a dictionary": lambda state: {"ema": {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}},
    "ordered": OrderedDict,
    "parameters": lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
    "double precision": lambda state: {name: value.double() for name, value in state.items()},
}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_published_mitnet_checkpoints_are_recognised_in_every_wrapping(wrapping, legacy, tmp_path):
    torch.manual_seed(0)
    model = MITNet(width=2)
    path = tmp_path / "anything.pth"
    content = WRAPPINGS[wrapping](model.to_official())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    loaded, card = load_weights(path)
    assert_same_network(loaded, model)
    assert card == {**describe(model), "source": "published checkpoint"}
    assert (card["system"], card["width"], card["config"]) == ("mitnet", 2, model.config)


def test_a_published_checkpoint_goes_round(tmp_path):
    torch.manual_seed(0)
    model = MITNet(width=2)
    official = model.to_official()
    torch.save({"params": official}, tmp_path / "published.pth")
    loaded, card = load_weights(tmp_path / "published.pth")
    known = {"source": card["source"], "data": "ITS", "scores": {"full-rgb": {"psnr": 40.23, "ssim": 0.992}}}
    again, card = load_weights(save_weights(tmp_path / "own.safetensors", loaded, known))
    assert {name: card[name] for name in known} == known
    back = again.to_official()
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], value) for name, value in official.items())


@pytest.mark.parametrize("kind", ["own", "published", "run"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, value, tmp_path):
    model = MITNet(width=2)
    model.to_image.bias.data[1] = value
    path = tmp_path / "diverged"
    if kind == "own":
        save_weights(path, model)
    elif kind == "published":
        torch.save(model.to_official(), path)
    else:
        weights = {**describe(model), "state": model.state_dict()}
        torch.save({"format": TRAINING_CHECKPOINT, "weights": weights}, path)
    with pytest.raises(WeightsError, match=r"diverged: 1 of its tensors hold .* not finite, such as to_image\.bias"):
        load_weights(path)


@pytest.mark.parametrize("network", [DCMPNet, DepthNet])
def test_published_dcmpnet_checkpoints_are_recognised_by_their_names(network, tmp_path):
    torch.manual_seed(0)
    model = network()
    path = tmp_path / "anything.pt"
    torch.save(model.to_official(), path)
    loaded, card = load_weights(path)
    assert_same_network(loaded, model)
    assert card["system"] == network.__name__.lower()


def test_a_published_checkpoint_that_does_not_fit_lists_every_difference(tmp_path):
    state = MITNet(width=2).to_official()
    state["surplus"] = state.pop("last.bias")
    path = tmp_path / "broken.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"broken\.pt: .*missing: last\.bias; unknown: surplus"):
        load_weights(path)


def rewrite(path, **fields):
    """Change the card of a file, not its tensors; a field that is None is taken out."""
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["mitnet_fast"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    card = {name: value for name, value in {**card, **fields}.items() if value is not None}
    save_file(state, path, {"mitnet_fast": json.dumps(card)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "card of format 2, this version reads format 1"),
        ({"format": None}, "without a card of mitnet_fast"),
        ({"system": "unet"}, "system is 'unet', known are mitnet, dcmpnet, depthnet, dcmpnet-shared-depth"),
        ({"config": None}, "configuration does not fit mitnet"),
        ({"config": {"width": 2, "colour": 1}}, "configuration does not fit mitnet: .*colour"),
        ({"config": {"width": 0}}, "configuration does not fit mitnet: width"),
        ({"config": {"width": 3, "depth": 3}}, r"amplitude_stem\.weight is \[2, 3, 3, 3\] instead of \[3, 3, 3, 3\]"),
        ({"config": {"width": 2, "depth": 2}}, "unknown: "),
        ({"config": {"width": 2, "depth": 4}}, "missing: .* and [0-9]+ more"),
        ({"config": {"width": 10**9}}, "does not fit its [0-9]+ tensors: width is 1000000000"),
        ({"config": {"depth": 1000}}, "does not fit its [0-9]+ tensors: depth is 1000"),
        ({"config": {"negative_slope": float("nan")}}, "negative_slope is nan"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(fields, message, tmp_path):
    path = save_weights(tmp_path / "w.safetensors", network("mitnet"))
    rewrite(path, **fields)
    with pytest.raises(WeightsError, match=rf"w\.safetensors: (.|\n)*{message}"):
        load_weights(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(share, tmp_path):
    path = save_weights(tmp_path / "w.safetensors", network("mitnet"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights(path)


def test_foreign_files_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "foreign"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match="safetensors without a card"):
        load_weights(path)
    torch.save({"layer.weight": torch.ones(2), "layer.bias": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match=r"none of its 2 names .* MITNet, DCMPNet, DepthNet; .* layer\.weight"):
        load_weights(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"foreign: .*epoch"):
        load_weights(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(WeightsError, match="expected a state dict, got list"):
        load_weights(path)
    torch.save(network("mitnet"), path)  # a pickled module runs code when it is read
    with pytest.raises(WeightsError, match=r"no checkpoint of tensors: .*nor is it a safetensors file"):
        load_weights(path)
    for content in (b"", b"text", bytes(range(200))):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="no checkpoint of tensors"):
            load_weights(path)
    for function in (load_weights, read_card):
        with pytest.raises(FileNotFoundError, match="no such file of weights"):
            function(tmp_path / "missing")


def test_cards_and_models_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(TypeError, match="model: got Linear, allowed are MITNet, DCMPNet, DepthNet"):
        save_weights(path, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="card: the fields system, versions are taken from the model"):
        save_weights(path, network("mitnet"), {"system": "x", "versions": {}})
    for value in (torch.ones(1), float("nan"), {1, 2}):
        with pytest.raises(TypeError, match="card: not JSON"):
            save_weights(path, network("mitnet"), {"value": value})
    assert not path.exists()


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_weights(tmp_path / "w.safetensors", network("mitnet"), {"demo": False})
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, network("mitnet"), {"demo": True})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": TRAINING_CHECKPOINT}, "without its weights"),
        ({"format": TRAINING_CHECKPOINT, "weights": [1]}, "without its weights"),
        ({"format": TRAINING_CHECKPOINT, "weights": {"system": ["x"], "config": {}, "state": {}}}, "system is"),
        ({"format": TRAINING_CHECKPOINT, "weights": {"system": "mitnet", "config": {}, "state": 3}}, "without its"),
        (
            {"format": TRAINING_CHECKPOINT, "weights": {"system": "mitnet", "config": {}, "state": {"a": 3}}},
            "its weights hold more than tensors",
        ),
    ],
)
def test_checkpoints_that_lie_about_themselves_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(tmp_path / "weights.pt")


def test_a_folder_and_a_file_with_code_say_what_they_are(tmp_path):
    with pytest.raises(WeightsError, match="a folder"):
        load_weights(tmp_path)

    torch.save({"weight": print}, tmp_path / "code.pt")
    with pytest.raises(WeightsError, match=r"holds print, which is more than tensors and could run code"):
        load_weights(tmp_path / "code.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 100)
    with pytest.raises(WeightsError, match=r"damaged, or not written by torch\.save"):
        load_weights(tmp_path / "garbage.pt")
