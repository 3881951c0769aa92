from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mitnet_fast.losses.mutual_information import MutualInformation
from mitnet_fast.models import CheckpointError, MITNet
from mitnet_fast.models.official import load_official, official_name, read_official, to_official
from tests import golden

NAMES = ((r"^0\.", "first."), (r"^1\.", "second."))


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def small_state() -> dict[str, torch.Tensor]:
    return {official_name(name, NAMES): torch.full_like(value, 2.0) for name, value in small().state_dict().items()}


class Callback:
    """Something that a pickle would call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "the pickle's code ran")


@pytest.mark.parametrize(
    ("network", "name"), [(MITNet, "mitnet"), (MutualInformation, "mutual_information")], ids=["MITNet", "regulariser"]
)
class TestPublishedNetworks:
    def test_names_and_shapes_are_the_official_ones_and_values_come_back(self, network, name):
        state = golden.official_state(name, 3, 1.0)
        loaded = network.from_official(state).to_official()
        assert {key: tuple(value.shape) for key, value in loaded.items()} == golden.keys(name)
        assert all(torch.equal(loaded[key], value) for key, value in state.items())

    def test_lists_everything_that_does_not_fit(self, network, name):
        state = golden.official_state(name, 3, 1.0)
        missing, misshapen = sorted(state)[3], sorted(state)[7]
        shape = tuple(state[misshapen].shape)
        del state[missing]
        state[misshapen] = torch.zeros(*shape, 1)
        state["surplus.weight"] = torch.zeros(1)
        with pytest.raises(CheckpointError) as error:
            network.from_official(state)
        message = str(error.value)
        assert f"not an official {network.__name__} checkpoint" in message
        assert f"missing: {missing};" in message
        assert "unknown: surplus.weight;" in message
        assert f"wrong shape: {misshapen} {(*shape, 1)} instead of {shape}" in message


def test_mitnet_reads_channels_width_and_depth_off_the_checkpoint():
    torch.manual_seed(0)
    network = MITNet(in_channels=1, width=6, depth=3, negative_slope=0.1, decoder_spectral=True)
    loaded = MITNet.from_official(network.to_official(), negative_slope=0.1, decoder_spectral=True)
    assert loaded.config == network.config
    image = golden.tensor("image", (1, 1, 8, 12), dtype=torch.float32)
    assert torch.equal(loaded.restore(image), network.restore(image))


@pytest.mark.parametrize("key", ["conv_01.weight", "down_path_1.3.identity.weight", "down_path_2.0.fusion.bias"])
def test_mitnet_reports_one_missing_entry_as_one_even_if_sizes_are_read_off_it(key):
    state = golden.official_state("mitnet", 0, 1.0)
    del state[key]
    with pytest.raises(CheckpointError, match=rf"^not an official MITNet checkpoint; missing: {re.escape(key)}$"):
        MITNet.from_official(state)


def test_mitnet_cuts_long_lists():
    state = {f"other.{index}": torch.zeros(1) for index in range(50)}
    with pytest.raises(CheckpointError, match=r"missing: .* and 278 more; unknown: .*other\.19 and 30 more$"):
        MITNet.from_official(state)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model",), ("params",), ("net",), ("model", "state_dict")])
def test_unwraps_dictionaries_and_the_prefix_of_data_parallel_training(wrappers, prefix, tmp_path):
    content: dict = {prefix + key: value for key, value in small_state().items()}
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 12, "optimizer": {"lr": 1e-4}}
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    for source in (content, path, str(path)):
        module = small()
        load_official(module, source, NAMES)
        assert all((value == 2).all() for value in module.state_dict().values())


@pytest.mark.parametrize("bare_pickle", [False, True])
def test_a_file_with_code_inside_is_refused_and_not_run(bare_pickle, tmp_path):
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"state_dict": small_state(), "callback": Callback(marker)}
    if bare_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: no checkpoint of tensors"):
        read_official(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))
    assert marker.exists(), "the trap itself must work"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pth: no checkpoint of tensors"):
        read_official(path)


@pytest.mark.parametrize("damage", ["value", "marked as a folder"])
def test_values_that_are_not_what_was_written_are_refused(damage, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small_state(), path)
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        directory = archive.start_dir
    content = bytearray(path.read_bytes())
    if damage == "value":
        content[content.index(torch.full((6,), 2.0).numpy().tobytes())] ^= 1
    else:
        attributes = content.rindex(entry.filename.encode()) - 8
        assert attributes > directory
        content[attributes] |= 0x10
    path.write_bytes(content)
    assert len(torch.load(path, weights_only=True)) == 4  # without a word
    with pytest.raises(CheckpointError, match=r"weights\.pth: damaged, .* that of weights/data/0 does not fit"):
        read_official(path)


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_official(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source: expected a state dict of tensors, got dict"),
        ({"state_dict": {}}, "source: expected a state dict of tensors, got dict"),
        ({"a": torch.zeros(1), "b": 3, "c": "x"}, "a state dict holds tensors only, but these are none: b, c"),
    ],
)
def test_what_holds_no_state_dict_is_refused(source, message):
    with pytest.raises(CheckpointError, match=message):
        read_official(source)


def test_a_list_in_a_file_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict of tensors, got list"):
        read_official(tmp_path / "list.pth")


@pytest.mark.parametrize("spoil", ["missing", "unknown", "wrong shape"])
def test_nothing_is_loaded_from_a_checkpoint_that_does_not_fit(spoil):
    state = small_state()
    if spoil == "missing":
        del state["second.bias"]
    elif spoil == "unknown":
        state["third.bias"] = torch.zeros(1)
    else:
        state["second.bias"] = torch.zeros(2)
    module = small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=spoil):
        load_official(module, state, NAMES)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_constants_are_checked_dropped_and_given_back():
    constants = {"positions": torch.arange(4.0)}
    module = small()
    load_official(module, small_state() | {"positions": torch.arange(4.0) + 5e-5}, NAMES, constants)
    state = to_official(module, NAMES, constants)
    assert state.keys() == small_state().keys() | {"positions"}
    assert torch.equal(state["positions"], torch.arange(4.0))
    with pytest.raises(CheckpointError, match="different constant: positions"):
        load_official(module, small_state() | {"positions": torch.arange(4.0) + 1e-2}, NAMES, constants)
    with pytest.raises(CheckpointError, match="missing: positions"):
        load_official(module, small_state(), NAMES, constants)


def test_the_official_state_is_a_copy():
    module = small()
    to_official(module, NAMES)["first.weight"].zero_()
    assert module[0].weight.abs().sum() > 0


def test_weights_of_another_precision_are_converted():
    state = {key: value.double() / 3 for key, value in small_state().items()}
    module = small()
    load_official(module, state, NAMES)
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, state["first.weight"].float())
