"""Packages: what they compute, what they need at load, what they say about themselves, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mitnet_fast.cli import app
from mitnet_fast.export import ExportError, export, read_package
from mitnet_fast.models import DCMPNet, DepthNet, DepthSharingDCMPNet, MITNet
from mitnet_fast.ops import BackendError, use_backend
from mitnet_fast.weights import WeightsError, save_weights
from tests.networks import SMALL_DCMPNET

NETWORKS = {
    "mitnet": lambda: MITNet(width=2, depth=2),
    "mitnet of full depth": lambda: MITNet(width=4),
    "dcmpnet": lambda: DCMPNet(**SMALL_DCMPNET),
    "dcmpnet-shared-depth": lambda: DepthSharingDCMPNet(DCMPNet(**SMALL_DCMPNET, share_depth=True), DepthNet((4,), 2)),
}

# Loads packages and runs them on saved images, in a process of its own; forbids this project where told to.
LOADER = """
import sys
mode, kind, path, *images = sys.argv[1:]
if mode == "alone":
    class Forbid:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "mitnet_fast":
                raise ImportError(name + " is forbidden here")
    sys.meta_path.insert(0, Forbid())
import torch
from safetensors.torch import load_file, save_file
if mode == "with mitnet_fast":
    import mitnet_fast.ops
run = torch.export.load(path).module() if kind == "torch" else torch._inductor.aoti_load_package(path)
with torch.no_grad():
    for image in images:
        save_file({"image": run(load_file(image)["image"]).contiguous()}, image + ".out")
assert mode == "with mitnet_fast" or not any(name.startswith("mitnet_fast") for name in sys.modules)
"""


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for module in model.modules():  # statistics other than those of initialisation, which do nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def picture(height: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def loaded(path: Path, images: list[torch.Tensor], *, kind: str = "torch", mode: str = "alone") -> list[torch.Tensor]:
    """What the package at ``path`` makes of images in a process of its own."""
    from safetensors.torch import load_file

    names = [path.with_name(f"{index}.safetensors") for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        save_file({"image": image}, name)
    words = [sys.executable, "-c", LOADER, mode, kind, str(path), *map(str, names)]
    answer = subprocess.run(words, capture_output=True, text=True, cwd=path.parent)
    assert answer.returncode == 0, answer.stderr
    return [load_file(f"{name}.out")["image"] for name in names]


def assert_equal_networks(results: list[torch.Tensor], expected: list[torch.Tensor], share: float = 2e-5) -> None:
    """Differences within ``share`` of what the network changes about an image at the most."""
    for result, truth in zip(results, expected, strict=True):
        assert result.shape == truth.shape
        assert (result - truth).abs().max() <= share * truth.abs().max()


@pytest.mark.exhaustive
def test_a_package_of_plain_pytorch_needs_nothing_but_torch(tmp_path: Path) -> None:
    model = network("mitnet")
    path = tmp_path / "new folder" / "network.pt2"
    description = export(model, path, size=(21, 30), backend="reference", card={"demo": True, "scores": {"psnr": 20.0}})
    image = picture(21, 30)
    with use_backend("reference"):
        expected = model.restore(image)
    assert_equal_networks(loaded(path, [image]), [expected])
    assert (expected - image).abs().max() > 0.01
    assert description == read_package(path)
    assert (description["needs"], description["operators"], description["backend"]) == ([], [], "reference")
    assert (description["system"], description["config"]) == ("mitnet", model.config)
    assert description["image"] == {"height": 21, "width": 30}
    assert description["weights"] == {"demo": True, "scores": {"psnr": 20.0}}
    assert (description["device"], description["dtype"]) == ("cpu", "float32")
    assert description["versions"]["torch"] == torch.__version__
    assert 0 <= description["deviation"] <= 2e-5
    assert [file.name for file in path.parent.glob("*.pt2")] == ["network.pt2"]


def test_the_default_package_says_which_operators_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    save_weights(tmp_path / "w.safetensors", network("mitnet"), {"demo": True})
    words = ["export", "-w", str(tmp_path / "w.safetensors"), "-o", str(path), "--size", "17x24", "--device", "cpu"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    said = " ".join(answer.output.split())
    assert "these are demo weights" in said
    assert "takes images [1, 3, 17, 24] in [0, 1]" in said
    assert "mitnet_fast.residual_conv: `import mitnet_fast.ops` before loading it, or use --backend reference" in said
    description = read_package(path)
    assert description["needs"] == ["mitnet_fast.ops"]
    assert "mitnet_fast.recombine.default" in description["operators"]
    assert description["weights"]["demo"] is True
    image = picture(17, 24)
    result = torch.export.load(path).module()(image)
    assert_equal_networks([result], [network("mitnet").restore(image)])
    assert (result - image).abs().max() > 0.01
    before = path.read_bytes()
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, FileExistsError)
    assert path.read_bytes() == before


@pytest.mark.exhaustive
def test_the_default_package_does_not_load_without_its_operators(tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    export(network("mitnet"), path, size=(16, 24))
    image = picture(16, 24)
    assert_equal_networks(loaded(path, [image], mode="with mitnet_fast"), [network("mitnet").restore(image)])
    with pytest.raises(AssertionError, match="mitnet_fast"):
        loaded(path, [image])


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["mitnet of full depth", "dcmpnet", "dcmpnet-shared-depth"])
def test_sizes_fixed_and_dynamic(name: str, backend: str | None, tmp_path: Path) -> None:
    model, mode = network(name), "alone" if backend == "reference" else "with mitnet_fast"
    fixed = tmp_path / "fixed.pt2"
    export(model, fixed, size=(61, 75), backend=backend)
    assert_equal_networks(loaded(fixed, [picture(61, 75)], mode=mode), [model.restore(picture(61, 75))])
    dynamic = tmp_path / "dynamic.pt2"
    image = export(model, dynamic, backend=backend)["image"]
    multiple, smallest = image["multiple"], image["smallest"]
    sides = [(smallest, smallest), (smallest, 5 * multiple), (3 * multiple, smallest + multiple), (96, 160), (224, 96)]
    pictures = [picture(*size) for size in sides]
    assert_equal_networks(loaded(dynamic, pictures, mode=mode), [model.restore(each) for each in pictures])
    program = torch.export.load(dynamic).module()
    for height, width in ((smallest + 1, smallest), (smallest - multiple, smallest)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            program(picture(height, width))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "backend", "size"),
    [
        ("mitnet", None, (33, 48)),
        ("mitnet", "reference", None),
        ("dcmpnet", None, None),
        ("dcmpnet", "reference", (33, 48)),
    ],
)
def test_compiled_packages(name: str, backend: str | None, size: tuple[int, int] | None, tmp_path: Path) -> None:
    model, path = network(name), tmp_path / "network.pt2"
    description = export(model, path, size=size, format="aoti", backend=backend)
    assert description == read_package(path)
    assert description["format"] == "aoti"
    pictures = [picture(*size)] if size else [picture(96, 64), picture(64, 160)]
    mode = "alone" if backend == "reference" else "with mitnet_fast"
    results = loaded(path, pictures, kind="aoti", mode=mode)
    assert_equal_networks(results, [model.restore(each) for each in pictures])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (0, 5)}, "size: expected height and width of at least 1, got 0×5"),
        ({"format": "tflite"}, "format: expected one of torch, aoti, onnx, got 'tflite'"),
        ({"name": "network.onnx"}, r"path: expected a name that ends with \.pt2 for format torch, got .*network\.onnx"),
        ({"format": "onnx", "backend": "cpp"}, "backend: ONNX knows none of mitnet_fast's operators, so 'cpp'"),
    ],
)
def test_arguments(options: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / options.pop("name", "network.pt2")
    with pytest.raises(ExportError, match=words):
        export(network("mitnet"), path, **{"size": (8, 8), **options})
    assert not any(tmp_path.iterdir())


def test_networks_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="model: DepthNet restores no images"):
        export(DepthNet((4, 4), growth=2), tmp_path / "a.pt2", size=(16, 16))
    model = network("mitnet")
    monkeypatch.setattr("mitnet_fast.ops._backends.UNAVAILABLE", {("triton", "cpu"): ("not here",)})
    with pytest.raises(BackendError, match="'triton' cannot run this call: not here"):
        export(model, tmp_path / "a.pt2", size=(16, 16), backend="triton")
    model.to_image.bias.data[1] = float("nan")
    with pytest.raises(WeightsError, match=r"MITNet: 1 of its tensors hold .* not finite, such as to_image\.bias"):
        export(model, tmp_path / "a.pt2", size=(16, 16))
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_aoti_says_so(tmp_path: Path) -> None:
    # Inductor's own patch: pytest's would delete the setting afterwards, and nothing compiled in this process any more
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ExportError, match=r"format: aoti needs a C\+\+ compiler, and there is none here"),
    ):
        export(network("mitnet"), tmp_path / "a.pt2", size=(8, 8), format="aoti")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected either a size"),
        (["--size", "8x8", "--dynamic"], "expected either a size"),
        (["--size", "wide"], "expected HEIGHTxWIDTH"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", network("mitnet"))
    answer = CliRunner().invoke(
        app, ["export", "-w", str(tmp_path / "w.safetensors"), "-o", str(tmp_path / "a.pt2"), *words]
    )
    assert answer.exit_code != 0
    assert message in " ".join((answer.output + str(answer.exception)).split())
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_without_its_exporter_onnx_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mitnet_fast.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"format: onnx needs onnx, onnxscript, onnxruntime .*nothing but torch"):
        export(network("mitnet"), tmp_path / "a.onnx", size=(8, 8), format="onnx")
    assert not any(tmp_path.iterdir())


WITH_ONNX = [True] if find_spec("onnxscript") and find_spec("onnxruntime") else []


@pytest.mark.exhaustive
@pytest.mark.parametrize("installed", WITH_ONNX)
@pytest.mark.parametrize(
    ("name", "size"),
    [("mitnet", (33, 47)), ("dcmpnet", (33, 47)), ("dcmpnet", None)],
    ids=["mitnet", "fixed", "dynamic"],
)
def test_onnx(name: str, size: tuple[int, int] | None, installed: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, path = network(name), tmp_path / "network.onnx"
    description = export(model, path, size=size, format="onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["mitnet_fast"]) == description
    assert description["operators"] == []
    assert 0 < description["deviation"] <= 1e-4
    for image in [picture(*size)] if size else [picture(96, 64), picture(64, 160)]:
        (result,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        assert_equal_networks([torch.from_numpy(result)], [model.restore(image)], 1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("installed", WITH_ONNX)
def test_what_onnx_cannot_take_is_said(installed: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ONNX's exporter cannot take aten\.remainder.* a fixed size asks less"):
        export(network("mitnet"), tmp_path / "a.onnx", format="onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("installed", WITH_ONNX)
def test_what_onnx_gets_wrong_is_not_written(installed: bool, tmp_path: Path) -> None:
    class Pooling(MITNet):
        """Its pooling's divisor is one that ONNX's exporter drops."""

        def restore(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(image, 2, divisor_override=1)

    with pytest.raises(ExportError, match=r"random image would be [\d.]+ off the network's own.* 0\.0039 allowed"):
        export(Pooling(width=4, depth=2), tmp_path / "a.onnx", size=(8, 8), format="onnx")
    assert not any(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.pt2"
    path.write_bytes(b"the old one")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(network("mitnet"), path, size=(8, 8), overwrite=True)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with pytest.raises(FileNotFoundError):
        read_package(path)
    for content in (b"", b"text", json.dumps({"mitnet_fast": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(ExportError, match=r"a\.pt2: no package of mitnet_fast"):
            read_package(path)
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ExportError, match="it holds no description"):
        read_package(path)
