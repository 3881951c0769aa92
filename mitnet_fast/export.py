"""Networks as packages: ``restore`` in one file that runs without the network's Python code.

Three formats. ``torch``: a graph of :func:`torch.export.export`, loaded by ``torch.export.load(path).module()``.
``aoti``: machine code of AOTInductor for the kind of processor it was made on, loaded by
``torch._inductor.aoti_load_package(path)`` or from C++. ``onnx``: for ONNX runtimes. All are called with an image
[1, 3, H, W] in [0, 1].

By default a package calls this project's operators, which ``import mitnet_fast.ops`` registers: it must come first
wherever the package is loaded. With ``backend="reference"`` plain PyTorch takes their place, and the package needs
nothing but torch. ONNX knows no operators but its own, so plain PyTorch is what it is made of. All there is to know is
in the package: see :func:`read_package`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import reference
from .data.files import atomic_write
from .models import DCMPNet, DepthSharingDCMPNet
from .ops import use_backend
from .weights import check_finite, describe, versions

SUFFIXES = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
"""Formats, and what the names of their files end with."""

CARD = "mitnet_fast"
CARD_VERSION = 1
LARGEST_SIDE = 2**16

PLAIN = {
    getattr(torch.ops.mitnet_fast, name).default: getattr(reference, name)
    for name in ("half_spectrum", "amplitude_and_phase", "recombine")
}
"""Operators that are there in every backend, and plain PyTorch for them."""


def _hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """√(x² + y²) without overflow."""
    larger, smaller = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return larger * torch.sqrt(1 + (smaller / torch.where(larger > 0, larger, 1.0)).square())


def _atan2(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The angle of (x, y) ≠ 0; π for y = 0, x < 0, where ONNX exporters write −π."""
    angle = torch.atan(y / x)
    return torch.where(x < 0, torch.where(y < 0, angle - math.pi, angle + math.pi), angle)


MISSING_IN_ONNX = {torch.ops.aten.hypot.default: _hypot, torch.ops.aten.atan2.default: _atan2}
"""Operators that ONNX lacks or that its exporter gets wrong, and others for them."""


class ExportError(ValueError):
    """A network that cannot be exported as asked, or a file that is no package of ours."""


class Restore(nn.Module):
    """``network.restore`` as the forward pass, which is what export takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[1, 3, H, W] in [0, 1] → the same shape, not clamped."""
        return self.network.restore(image)


def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    format: str = "torch",
    backend: str | None = None,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a network's ``restore`` as a package; the file appears whole or not at all.

    Args:
        model: MITNet, DCMPNet or DepthSharingDCMPNet, where the package is to run.
        path: of the package, ``.pt2`` or ``.onnx``; its folder is made if it is missing.
        size: height and width of the images that it takes, any from 1×1; None for a package of dynamic size, whose
            sides are multiples of what its description says.
        format: "torch", "aoti" or "onnx".
        backend: whose operators it calls: "cpp", "triton", "reference" for plain PyTorch, None for the best each (plain
            PyTorch for "onnx").
        card: what the weights' file says about them, kept under ``weights``.
        overwrite: replace a file that exists.

    Returns:
        The description that the package holds: ``system``, ``config`` and so on of the network; ``format``,
        ``backend``, ``operators`` (those of this project that it calls), ``needs`` (what must be imported before it is
        loaded), ``image`` (``height`` and ``width``, or ``multiple``, ``smallest`` and ``largest`` of its sides),
        ``device``, ``dtype``, ``versions``, and ``deviation``, the largest difference between the result of the
        exported graph (of the package itself for "onnx") and the network's own for a random image.

    Raises:
        ExportError: an argument outside what is allowed, no compiler for "aoti", no exporter for "onnx" or an operator
            that it cannot take, such as the remainder by a size in MITNet of dynamic size; a result that is not the
            network's.
        WeightsError: weights that are not finite.
        FileExistsError: ``path`` exists.
        BackendError: the backend cannot run on the network's device.
    """
    path = Path(path)
    check_format(format, backend)
    _check(model, path, size, format)
    backend = "reference" if format == "onnx" else backend
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite it, or choose another name")
    weight = next(model.parameters())
    multiple, smallest = _sides(model, backend)
    height, width = size or (smallest + multiple, smallest + 2 * multiple)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(weight)
    module = Restore(model).eval()
    with torch.no_grad(), use_backend(backend), _quiet():
        expected = module(image)
        program = torch.export.export(module, (image,), dynamic_shapes=None if size else _dynamic(multiple, smallest))
        if backend == "reference":
            program = program.run_decompositions(PLAIN | (MISSING_IN_ONNX if format == "onnx" else {}))
    operators = sorted({str(node.target) for node in program.graph.nodes if "mitnet_fast." in str(node.target)})
    with torch.no_grad(), _quiet():
        converted = _to_onnx(program) if format == "onnx" else None
        result = _run_onnx(converted.model_proto.SerializeToString(), image) if converted else program.module()(image)
        deviation = float((result - expected).abs().max())
    allowed = max(1 / 255, 8 * torch.finfo(weight.dtype).eps)  # a step of 8-bit images, or what rounding explains
    if not deviation <= allowed:
        raise ExportError(
            f"model: the package's result for a random image would be {deviation:.2g} off the network's own, more "
            f"than the {allowed:.2g} allowed"
        )
    description = {
        "format_version": CARD_VERSION,
        **describe(model),
        "format": format,
        "backend": backend or "best",
        "operators": operators,
        "needs": ["mitnet_fast.ops"] if operators else [],
        "image": {"height": height, "width": width}
        if size
        else {"multiple": multiple, "smallest": smallest, "largest": LARGEST_SIDE},
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "deviation": deviation,
        "versions": versions(),
        "weights": dict(card or {}),
    }
    content, text = io.BytesIO(), json.dumps(description, ensure_ascii=False)
    with _quiet():
        if format == "torch":
            torch.export.save(program, content, extra_files={f"{CARD}.json": text})
        elif format == "aoti":
            torch._inductor.aoti_compile_and_package(
                program, package_path=content, inductor_configs={"aot_inductor.metadata": {CARD: text}}
            )
        else:
            converted.model.metadata_props[CARD] = text
            content.write(converted.model_proto.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(content.getbuffer())
    return description


def read_package(path: str | PathLike[str]) -> dict[str, Any]:
    """The description that a package holds, read without loading or running any of it.

    Args:
        path: a ``.pt2`` file that :func:`export` wrote; in ONNX it is ``metadata_props["mitnet_fast"]``.

    Raises:
        FileNotFoundError: no such file.
        ExportError: no package of ours.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(f"extra/{CARD}.json"):
                    return _described(json.loads(archive.read(name)))
                if name.endswith("metadata.json") and CARD in (metadata := json.loads(archive.read(name))):
                    return _described(json.loads(metadata[CARD]))
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path}: no package of mitnet_fast: {error}") from error
    raise ExportError(f"{path}: no package of mitnet_fast: it holds no description")


def _described(description: object) -> dict[str, Any]:
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != CARD_VERSION:
        raise ValueError(f"description of version {version}, this version reads {CARD_VERSION}")
    return description


def _to_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    try:
        return torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        found = re.search(r"target=torch\.ops\.([\w.]+)|op='([\w.]+)'", str(error))
        operator = (found[1] or found[2]) if found else "one of the network's operators"
        raise ExportError(
            f"format: ONNX's exporter cannot take {operator} as it stands here; a fixed size asks less of it than a "
            "dynamic one, and format torch with backend reference takes everything and needs nothing but torch"
        ) from error


def _run_onnx(package: bytes, image: torch.Tensor) -> torch.Tensor:
    """What ONNX's own runtime makes of an image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    try:
        session = onnxruntime.InferenceSession(package, options, providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {session.get_inputs()[0].name: image.numpy(force=True)})
    except Exception as error:  # the runtime's own share no class
        raise ExportError(f"format: ONNX's runtime cannot run a network of {image.dtype}: {error}") from error
    return torch.from_numpy(result).to(image.device)


def check_format(format: str, backend: str | None) -> None:
    """Raise ExportError unless packages of this format can be made here, of this backend's operators."""
    if format not in SUFFIXES:
        raise ExportError(f"format: expected one of {', '.join(SUFFIXES)}, got {format!r}")
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ExportError(
                "format: aoti needs a C++ compiler, and there is none here (g++, or another in CXX); "
                "format torch needs none"
            ) from error
    if format == "onnx":
        if backend not in (None, "reference"):
            raise ExportError(
                f"backend: ONNX knows none of mitnet_fast's operators, so {backend!r} cannot be asked for; "
                "reference, the default of format onnx, is made of ONNX's own"
            )
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(
                f"format: onnx needs {', '.join(missing)} (pip install onnx onnxscript onnxruntime); "
                "format torch with backend reference needs nothing but torch"
            )


def _check(model: nn.Module, path: Path, size: tuple[int, int] | None, format: str) -> None:
    if not callable(getattr(model, "restore", None)):
        raise ExportError(f"model: {type(model).__name__} restores no images, expected a network with restore(image)")
    check_finite(model, type(model).__name__)
    if size is not None and min(size) < 1:
        raise ExportError(f"size: expected height and width of at least 1, got {size[0]}×{size[1]}")
    if path.suffix != SUFFIXES[format]:
        raise ExportError(f"path: expected a name that ends with {SUFFIXES[format]} for format {format}, got {path}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch says about its own insides while it exports."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _sides(model: nn.Module, backend: str | None) -> tuple[int, int]:
    """What the sides of a package of dynamic size are multiples of, and the least side."""
    network = model.dehazing if isinstance(model, DepthSharingDCMPNet) else model
    if not isinstance(network, DCMPNet):
        return network.size_multiple, 2 * network.size_multiple
    # the prior halves four times; plain PyTorch pads by no rows or columns where whole windows fit at quarter size
    multiple = math.lcm(16, 4 * network.config["window_size"]) if backend == "reference" else 16
    return multiple, -(-max(network.smallest_side, 2 * multiple) // multiple) * multiple


def _dynamic(multiple: int, smallest: int) -> dict[str, dict[int, object]]:
    rows, columns = (
        torch.export.Dim(name, min=smallest // multiple, max=LARGEST_SIDE // multiple) for name in ("rows", "columns")
    )
    return {"image": {2: multiple * rows, 3: multiple * columns}}
