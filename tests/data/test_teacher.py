"""Depth maps by a teacher: values, direction, cards, going on after an interrupt, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mitnet_fast import __version__
from mitnet_fast.cli import app
from mitnet_fast.data import PairedImages, estimate_depth, load_teacher, teacher
from mitnet_fast.data.layouts import DataError
from mitnet_fast.data.photographs import photograph

NAMES = ("1", "2", "3")


class Fake:
    """Knows the test picture's depth; of anything else its guess is that bright places are near."""

    def __init__(self, kind: str = "disparity", name: str = "fake/teacher", stop_after: int | None = None) -> None:
        self.kind, self.name, self.versions = kind, name, {"fake": "1.2"}
        self.images = 0
        self.stop_after = stop_after
        self._known = photograph("motorcycle")

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if image.shape == self._known.rgb.shape:
            distance = self._known.depth[0]
        else:
            if self.images == self.stop_after:
                raise KeyboardInterrupt
            self.images += 1
            distance = 2 / (image.mean(0) + 0.5)
        return 3 / distance + 7 if self.kind == "disparity" else 5 * distance


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for folder in ("GT", "hazy"):
            (tmp_path / "set" / split / folder).mkdir(parents=True)
            for name in NAMES:
                samples = generator.integers(0, 256, (12, 16, 3)).astype(np.uint8)
                Image.fromarray(samples).save(tmp_path / "set" / split / folder / f"{name}.png")
    return tmp_path / "set"


def maps(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("kind", ["disparity", "depth"])
def test_maps_are_near_large_whatever_the_teacher_gives(root: Path, kind: str) -> None:
    summary = estimate_depth(root, Fake(kind))
    assert (summary.folder, summary.kind, summary.written, summary.kept) == (root / "depth", kind, 6, 0)
    assert summary.agreement == pytest.approx(1, abs=1e-6)
    grey = np.asarray(Image.open(root / "train/GT/2.png"), np.float64).mean(2)
    expected = (grey - grey.min()) / (grey.max() - grey.min())
    with Image.open(root / "depth/train/GT/2.png") as image:
        stored = np.asarray(image)
        assert (stored.dtype, image.mode[0]) == (np.uint16, "I")
    np.testing.assert_allclose(stored / 65535, expected, atol=1e-5)


def test_training_takes_them(root: Path) -> None:
    estimate_depth(root, Fake())
    item = PairedImages(root, "train", depth=root / "depth")[0]
    grey = item["clear"].mean(0, keepdim=True)
    expected = (grey - grey.min()) / (grey.max() - grey.min())
    torch.testing.assert_close(item["depth"], expected, atol=1e-5, rtol=0)


def test_every_folder_of_maps_has_its_card(root: Path) -> None:
    estimate_depth(root, Fake("depth"))
    for split in ("train", "test"):
        card = json.loads((root / "depth" / split / "GT" / "card.json").read_text())
        versions = card.pop("versions")
        assert card == {
            "kind": "disparity",
            "teacher": "fake/teacher",
            "teacher_kind": "depth",
            "scaling": teacher.SCALING,
            "direction": {"picture": "motorcycle", "rank_correlation": 1.0},
        }
        assert versions == {"mitnet-fast": __version__, "torch": torch.__version__, "fake": "1.2"}


@pytest.mark.parametrize("done", [0, 1, 4])
def test_interrupted_goes_on_and_ends_the_same(root: Path, tmp_path: Path, done: int) -> None:
    whole = estimate_depth(root, Fake(), output=tmp_path / "whole").folder
    with pytest.raises(KeyboardInterrupt):
        estimate_depth(root, Fake(stop_after=done), output=tmp_path / "parts")
    assert len(maps(tmp_path / "parts")) == done
    summary = estimate_depth(root, Fake(), output=tmp_path / "parts")
    assert (summary.written, summary.kept) == (6 - done, done)
    assert maps(tmp_path / "parts") == maps(whole)


def test_full_disk_leaves_no_part_of_a_map(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mitnet_fast.data.files.os.fsync", fails)
        patch.setattr(teacher, "write_card", lambda *_, **__: None)
        with pytest.raises(OSError, match="No space left"):
            estimate_depth(root, Fake())
    assert not [path for path in (root / "depth").rglob("*") if path.is_file()]


def test_a_map_of_another_size_is_computed_anew(root: Path) -> None:
    estimate_depth(root, Fake())
    expected = maps(root / "depth")
    Image.new("I;16", (4, 4)).save(root / "depth/test/GT/1.png")
    assert estimate_depth(root, Fake()).written == 1
    assert maps(root / "depth") == expected


def test_another_teacher_is_refused_unless_told_to_overwrite(root: Path) -> None:
    estimate_depth(root, Fake())
    before = maps(root / "depth")
    with pytest.raises(ValueError, match=r"maps in .* are of .*fake/teacher.*would be of .*other"):
        estimate_depth(root, Fake("depth", "other"))
    assert maps(root / "depth") == before
    with pytest.raises(KeyboardInterrupt):
        estimate_depth(root, Fake("depth", "other", stop_after=2), overwrite=True)
    assert len(maps(root / "depth")) == 2  # none of the other teacher's
    assert estimate_depth(root, Fake("depth", "other")).written == 4


def test_images_that_are_no_maps_are_not_replaced(root: Path) -> None:
    with pytest.raises(ValueError, match=r"output: .*GT holds images without a card\.json"):
        estimate_depth(root, Fake(), output=root)


@pytest.mark.parametrize(("gives", "told"), [("disparity", "depth"), ("depth", "disparity")])
def test_a_direction_that_the_known_picture_contradicts(root: Path, gives: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"kind: .*motorcycle.*its values are '{gives}', not '{told}'"):
        estimate_depth(root, Fake(gives), kind=told)
    assert not (root / "depth").exists()


@pytest.mark.parametrize("level", [False, True])
def test_a_teacher_that_sees_no_depth(root: Path, level: bool) -> None:
    def blind(image: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(0))
        return torch.ones_like(noise) if level else noise

    blind.name, blind.versions = "blind", {}
    with pytest.raises(ValueError, match=r"blind: .*rank correlation with the true nearness is -?0\.0"):
        estimate_depth(root, blind)


def test_one_bad_image_does_not_stop_the_others(root: Path) -> None:
    good, path = Fake(), root / "test/GT/2.png"
    path.write_bytes(path.read_bytes()[:60])
    Image.new("RGB", (16, 12), "white").save(root / "test/GT/3.png")

    def sometimes_infinite(image: torch.Tensor) -> torch.Tensor:
        return good(image) / (0 if image.min() == 1 else 1)

    sometimes_infinite.name, sometimes_infinite.versions = "sometimes", {}
    summary = estimate_depth(root, sometimes_infinite)
    assert summary.written == 4
    assert [failure.clear for failure in summary.failures] == ["test/GT/2.png", "test/GT/3.png"]
    assert "test/GT/2.png" in summary.failures[0].error
    assert summary.failures[1].error == "sometimes gives 192 values that are not finite"


def test_two_images_that_would_share_a_map(root: Path) -> None:
    for folder in ("GT", "hazy"):
        Image.new("RGB", (16, 12)).save(root / "train" / folder / "1.jpg")
    with pytest.raises(DataError, match=r"train/GT/1\.jpg and train/GT/1\.png would share one depth map"):
        estimate_depth(root, Fake())


def test_unknown_kind(root: Path) -> None:
    with pytest.raises(ValueError, match="kind: expected one of disparity, depth or None, got 'inverse'"):
        estimate_depth(root, Fake(), kind="inverse")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"need the transformers library: pip install 'mitnet-fast\[depth\]'"):
        load_teacher()


def test_a_teacher_sees_8_bit_samples_and_gives_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Inputs(dict):
        def to(self, device: torch.device) -> Inputs:
            asked.append(device)
            return self

    class Processor:
        @staticmethod
        def from_pretrained(name: str) -> Processor:
            asked.append(name)
            return Processor()

        def __call__(self, images: np.ndarray, return_tensors: str) -> Inputs:
            assert (images.dtype, return_tensors) == (np.uint8, "pt")
            return Inputs(pixel_values=torch.from_numpy(images))

    class Model(torch.nn.Linear):
        device = torch.device("cpu")

        @staticmethod
        def from_pretrained(name: str) -> Model:
            asked.append(name)
            return Model(1, 1)

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            assert not self.training
            return SimpleNamespace(predicted_depth=pixel_values[None, ..., 1].half())

    stand_in = SimpleNamespace(AutoImageProcessor=Processor, AutoModelForDepthEstimation=Model)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    monkeypatch.setattr(teacher.importlib.metadata, "version", {"transformers": "5.0"}.__getitem__)
    network = load_teacher("some/teacher")
    values = network(torch.tensor([0.0, 0.4, 1.2])[:, None, None].expand(3, 5, 7))
    assert asked == ["some/teacher", "some/teacher", torch.device("cpu")]
    assert (network.name, network.versions) == ("some/teacher", {"transformers": "5.0"})
    assert (values.shape, values.dtype, values.unique().tolist()) == ((5, 7), torch.float32, [102.0])


def test_a_teacher_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("no\nconnection")

    missing = SimpleNamespace(from_pretrained=offline)
    stand_in = SimpleNamespace(AutoImageProcessor=missing, AutoModelForDepthEstimation=missing)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    with pytest.raises(OSError, match=r"teacher: some/teacher is no folder .* of that name: no connection$"):
        load_teacher("some/teacher")


@pytest.mark.exhaustive
@pytest.mark.parametrize("installed", [True] if find_spec("transformers") else [])
def test_a_teacher_of_transformers(installed: bool, tmp_path: Path) -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        image_size=56,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8}
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, patch_size=14, head_hidden_size=8, **sizes)
    ).eval()
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)  # else the last ReLU leaves next to nothing
    processor = DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    samples = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = model(**processor(images=samples, return_tensors="pt")).predicted_depth[0]
    values = load_teacher(str(tmp_path))(torch.from_numpy(samples).permute(2, 0, 1) / 255)
    assert values.shape == (56, 84)
    assert values.max() > values.min()
    torch.testing.assert_close(values, expected)


class TestCommand:
    def test_says_what_it_did_and_how_to_train(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(teacher, "load_teacher", lambda *words: asked.append(words) or Fake())
        result = CliRunner().invoke(app, ["data", "depth", str(root), "--teacher", "fake/teacher", "--device", "cpu"])
        assert (result.exit_code, asked) == (0, [("fake/teacher", "cpu")])
        printed = " ".join(result.output.split())
        assert "6 depth maps written, 0 kept" in printed
        assert "disparity (near is large), rank correlation with measured nearness 1.00" in printed
        assert f"data.depth={root / 'depth'}" in result.output.replace("\n", "")

    def test_failures_are_named_and_give_an_exit_code(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (root / "test/GT/2.png").write_bytes(b"")
        monkeypatch.setattr(teacher, "load_teacher", lambda *_: Fake())
        result = CliRunner().invoke(app, ["data", "depth", str(root)])
        assert result.exit_code == 1
        assert "failed: test/GT/2.png" in result.output
        assert "5 depth maps written" in " ".join(result.output.split())
