"""Checkpoints are whole or not there, and only whole ones are read."""

from __future__ import annotations

import os
import random
import zipfile

import numpy as np
import pytest
import torch

from mitnet_fast.models import CheckpointError
from mitnet_fast.training.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state

CPU = torch.device("cpu")


def content(step: int) -> dict:
    return {
        "position": {"step": step, "epoch": 0},
        "system": {"weight": torch.arange(5000.0) + step, "betas": (0.9, 0.999), "flags": [True, None, "text"]},
    }


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(7))
    return path


def same(loaded: dict, step: int) -> bool:
    expected = content(step)
    return (
        loaded["position"] == expected["position"]
        and torch.equal(loaded["system"].pop("weight"), expected["system"].pop("weight"))
        and loaded["system"] == expected["system"]
    )


def test_what_is_written_is_read_back(checkpoint):
    assert same(load_checkpoint(checkpoint), 7)
    assert torch.load(checkpoint, weights_only=True)["version"] == 2


def test_the_old_file_keeps_a_second_name(checkpoint):
    previous = checkpoint.with_name("previous.pt")
    for step in (8, 9):
        save_checkpoint(checkpoint, content(step), keep_as=previous)
        assert same(load_checkpoint(checkpoint), step)
        assert same(load_checkpoint(previous), step - 1)
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["last.pt", "previous.pt"]


def test_the_old_file_is_copied_where_there_are_no_links(checkpoint, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    previous = checkpoint.with_name("previous.pt")
    save_checkpoint(checkpoint, content(8), keep_as=previous)
    assert same(load_checkpoint(previous), 7)
    assert same(load_checkpoint(checkpoint), 8)


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(checkpoint, monkeypatch, point):
    before = checkpoint.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    def half_written(_, stream):
        stream.write(before[: len(before) // 2])
        full_disk()

    if point == "write":
        monkeypatch.setattr(torch, "save", half_written)
    else:
        monkeypatch.setattr(os, point, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint, content(8))
    monkeypatch.undo()
    assert checkpoint.read_bytes() == before
    assert [file.name for file in checkpoint.parent.iterdir()] == ["last.pt"]
    assert same(load_checkpoint(checkpoint), 7)


def test_file_and_folder_are_synced_before_and_after_the_name_changes(checkpoint, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def traced_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    save_checkpoint(checkpoint, content(8))
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_file_that_was_cut_off_is_refused(checkpoint, share):
    save_checkpoint(checkpoint.with_name("best.pt"), content(3))
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"last\.pt: cut off.*newest good.*best\.pt \(step 3\)"):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_is_found(checkpoint):
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    checkpoint.write_bytes(damaged)
    assert torch.load(checkpoint, weights_only=True)["version"] == 2  # PyTorch does not see it
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of .*; there is no good checkpoint beside it"):
        load_checkpoint(checkpoint)


def test_the_newest_good_checkpoint_is_named(checkpoint):
    for name, step, age in (("best.pt", 3, 50), ("epoch-00004.pt", 5, 20), ("previous.pt", 6, 10)):
        file = checkpoint.with_name(name)
        save_checkpoint(file, content(step))
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    checkpoint.with_name("previous.pt").write_bytes(b"PK")
    checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint; the newest good .*epoch-00004\.pt \(step 5\)"):
        load_checkpoint(checkpoint)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of a training run; weights to start from go in run\.w"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "text")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        load_checkpoint(path)
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        load_checkpoint(path)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(checkpoint):
    save_checkpoint(checkpoint.with_name("previous.pt"), content(3))
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Code(checkpoint.with_name("run"))}, checkpoint)
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot be read safely: .*mkdir.*previous\.pt \(step 3\)"):
        load_checkpoint(checkpoint)
    assert not checkpoint.with_name("run").exists()
    torch.load(checkpoint, weights_only=False)
    assert checkpoint.with_name("run").exists()


def test_another_version_is_refused(checkpoint):
    loaded = torch.load(checkpoint, weights_only=True)
    torch.save({**loaded, "version": 3}, checkpoint)
    with pytest.raises(CheckpointError, match="of version 3, this program reads version 2"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [np.float64(1), torch.__version__, {1}, np.zeros(2), random.random])
def test_what_could_not_be_read_again_is_not_written(checkpoint, value):
    before = checkpoint.read_bytes()
    with pytest.raises(TypeError, match=r"content\['scores'\]\[1\]: got .*tensors and plain data only"):
        save_checkpoint(checkpoint, {"scores": [1.0, value]})
    assert checkpoint.read_bytes() == before


def test_all_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist()

    draw()
    path = tmp_path / "random.pt"
    save_checkpoint(path, {"position": {"step": 0}, "random": random_state(CPU)})
    expected = draw()
    assert draw() != expected
    set_random_state(load_checkpoint(path)["random"], CPU)
    assert draw() == expected
