"""Presets, YAML files and overrides, and the messages for what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mitnet_fast.training import PRESETS, ConfigError, load_changes, load_config, to_yaml
from mitnet_fast.training.config import flatten, parse_override

PUBLISHED = {
    "mitnet-its": (2e-4, "halve", 200, 1000, 8, 1, 0.0),
    "mitnet-ots": (2e-4, "halve", 200, 2000, 8, 1, 0.0),
    "mitnet-dense": (2e-4, "halve", 100, 1000, 4, 100, 1.0),
    "mitnet-nh": (2e-4, "halve", 100, 1000, 4, 100, 1.0),
    "mitnet-ohaze": (2e-4, "halve", 100, 1000, 4, 100, 1.0),
    "mitnet-ihaze": (2e-4, "halve", 100, 1000, 4, 100, 1.0),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_mitnet_presets_are_the_published_settings(preset):
    config = load_config(preset)
    settings = (
        config.optimizer.lr,
        config.schedule.kind,
        config.schedule.halve_every,
        config.run.epochs,
        config.data.batch,
        config.data.repeat,
        config.loss.ssim_weight,
    )
    assert settings == PUBLISHED[preset]
    assert (config.data.patch, config.data.augment, config.optimizer.betas) == (256, "mitnet", (0.9, 0.999))
    assert (config.loss.spectral_weight, config.loss.mutual_information_weight) == (0.05, 0.001)
    assert config.validation.protocol == "mitnet-crop16"


@pytest.mark.parametrize("preset", ["dcmpnet-its", "dcmpnet-ots"])
def test_dcmpnet_presets_are_the_published_settings(preset):
    config = load_config(preset)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.9, 0.999))
    assert (config.schedule.kind, config.schedule.cosine_minimum, config.run.epochs) == ("cosine", 1e-6, 600)
    assert (config.data.batch, config.data.patch, config.data.augment, config.data.depth) == (8, 256, "dcmpnet", None)
    assert (config.loss.mode, config.loss.depth_weight) == ("difference_perception", 0.1)
    assert config.loss.contrastive_weight == 1.0
    assert config.validation.protocol == "dcmp-test"


def test_every_preset_is_tested_here():
    assert set(PRESETS) == {*PUBLISHED, "dcmpnet-its", "dcmpnet-ots"}


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_holds_everything(preset, tmp_path):
    config = load_config(preset, ["data.root=/somewhere", "run.ema=0.999", "optimizer.clip=0.5"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    assert load_config(yaml.safe_load(file.read_text())) == config
    stated = set(flatten(yaml.safe_load(file.read_text())))
    assert stated == set(flatten(config.model_dump()))


def test_a_partial_file_rests_on_the_preset_it_names_and_overrides_on_both(tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text("preset: mitnet-dense\nrun: {epochs: 7, seed: 3}\noptimizer:\n  lr: 1e-3\n")
    config = load_config(file, ["run.seed=4", "run.seed=5"])
    assert (config.preset, config.run.epochs, config.run.seed, config.optimizer.lr) == ("mitnet-dense", 7, 5, 1e-3)
    assert (config.data.batch, config.data.repeat) == (4, 100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=1e-3", {"optimizer": {"lr": "1e-3"}}),
        ("run.epochs=3", {"run": {"epochs": 3}}),
        ("optimizer.betas=[0.5, 0.9]", {"optimizer": {"betas": [0.5, 0.9]}}),
        ("run.ema=null", {"run": {"ema": None}}),
        ("run.ema=", {"run": {"ema": None}}),
        ("data.layout=a=b", {"data": {"layout": "a=b"}}),
        ("run={epochs: 2}", {"run": {"epochs": 2}}),
    ],
)
def test_overrides_are_yaml_values(text, expected):
    assert parse_override(text) == expected


def test_values_are_converted_to_their_type():
    config = load_config("mitnet-its", ["optimizer.lr=1e-3", "run.channels_last=no", "data.root=~/images"])
    assert config.optimizer.lr == 1e-3
    assert config.run.channels_last is False
    assert config.data.root == Path.home() / "images"


def test_relative_paths_do_not_depend_on_the_folder_of_a_later_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("dcmpnet-its", ["data.root=images", "data.depth=maps"])
    assert (config.data.root, config.data.depth) == (tmp_path / "images", str(tmp_path / "maps"))
    assert load_config("dcmpnet-its", ["data.depth=none"]).data.depth == "none"


@pytest.mark.parametrize(
    ("preset", "overrides", "parts"),
    [
        ("mitnet-its", ["optimizer.lrr=1"], ["optimizer.lrr: no such field", "lr, betas, clip", "did you mean lr?"]),
        ("mitnet-its", ["optimiser.lr=1"], ["optimiser: no such field", "did you mean optimizer?"]),
        ("mitnet-its", ["data.depth=none"], ["data.depth: no such field"]),
        ("mitnet-its", ["optimizer.lr=-1"], ["optimizer.lr: got -1", "greater than 0"]),
        ("mitnet-its", ["optimizer.lr=.nan"], ["optimizer.lr: got nan"]),
        ("mitnet-its", ["run.epochs=1.5"], ["run.epochs: got 1.5", "integer"]),
        ("mitnet-its", ["run.epochs.x=1"], ["run.epochs: got {'x': 1}"]),
        ("mitnet-its", ["schedule.kind=step"], ["schedule.kind: got 'step'", "'halve', 'cosine' or 'constant'"]),
        ("mitnet-its", ["data=3"], ["data: got 3"]),
        ("mitnet-its", ["data.patch=28"], ["data.patch: got 28", "multiples of 8"]),
        ("mitnet-its", ["data.patch=128", "loss.mutual_information=official"], ["loss.mutual_information", "256"]),
        ("mitnet-its", ["optimizer.accumulate=3"], ["optimizer.accumulate: got 3", "data.batch = 8"]),
        ("dcmpnet-its", ["optimizer.lr=1e-7"], ["schedule.cosine_minimum: got 1e-06", "optimizer.lr = 1e-07"]),
        ("dcmpnet-its", ["network.share_depth=true", "data.depth=none"], ["network.share_depth", "data.depth is none"]),
        ("dcmpnet-its", ["network.heads=[1, 2]"], ["network.heads"]),
        ("mitnet-its", ["run.epochs=0", "run.seed=-1"], ["run.epochs: got 0", "run.seed: got -1"]),
        ("mitnet-its", ["run.epochs"], ["override 'run.epochs': expected section.field=value"]),
        ("mitnet-its", [".epochs=1"], ["override '.epochs=1': expected section.field=value"]),
        ("mitnet-its", ["run.epochs=[1"], ["override 'run.epochs=[1'", "not YAML"]),
        ("mitnet-itz", [], ["'mitnet-itz' is neither a preset nor a YAML file", "did you mean mitnet-its?"]),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(preset, overrides, parts):
    with pytest.raises(ConfigError) as error:
        load_config(preset, overrides)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: [1", ["not a YAML file"]),
        ("- 1\n- 2\n", ["expected sections with fields, got list"]),
        ("preset: mitnet-foo\n", ["preset: got 'mitnet-foo'", "mitnet-its"]),
        ("run: {epochs: 3}\n", ["system: got None", "mitnet, dcmpnet"]),
    ],
)
def test_files_that_are_no_configuration(text, parts, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    for part in parts:
        assert part in str(error.value)


def test_changes_are_what_is_stated_and_nothing_else(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("{preset: mitnet-its, run: {epochs: 3, seed: 4}}")
    assert load_changes(None) == {}
    assert load_changes("mitnet-its") == {"preset": "mitnet-its"}
    assert load_changes(file, ["run.seed=5"]) == {"preset": "mitnet-its", "run": {"epochs": 3, "seed": 5}}
    with pytest.raises(ConfigError, match="neither a preset nor a YAML file"):
        load_changes(tmp_path / "missing.yaml")
