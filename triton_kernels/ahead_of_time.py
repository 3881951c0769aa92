"""Compiles every Triton kernel as its launcher would launch it, without a GPU.

The launchers run on "meta" tensors while their launches are recorded, so what is compiled here is what
users get: the same arguments, constants, tile sizes and number of warps.

    python -m mitnet_fast.triton_kernels.ahead_of_time --architecture 90 [--every]

prints one line of JSON per kernel with its registers, spilled bytes and shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import amplitude_phase, convolution, dynamic_filter, feature_mixing, window_attention
from ._common import COMPILER_OPTIONS, DTYPES, INTERPRETED, Launch, record_launches

ARCHITECTURES = (80, 90, 100)
# of each family's shapes the first is the hot one
FILTERS = ((20, 256, 3), (20, 256, 1), (20, 256, 5), (20, 256, 7))  # channels, side, K
PREDICTED_FILTERS = ((20, 256, 3), (40, 128, 3), (80, 64, 3), (20, 256, 1), (20, 256, 5), (20, 256, 7))
WINDOWS = ((24, 2, 8), (96, 6, 8), (64, 1, 8), (24, 1, 4), (24, 2, 7), (24, 2, 16), (64, 2, 16))  # channels, heads, w
MIXINGS = ((24, 256, 48), (48, 128, 192), (96, 64, 384))  # channels, side, hidden channels
DENSE_BLOCKS = ((3, 256), (48, 64))  # channels, side
RESIDUALS = ((20, 20, 20, 256), (80, 80, 80, 64), (80, 0, 160, 32))  # channels of both maps and the result, side
CONVOLUTIONS = ((64, 64, 64, 128),)  # likewise
TUNED_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Kernel:
    """One kernel as one launch asks for it."""

    name: str
    launch: Launch


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers per thread, bytes spilled per thread, shared bytes per program."""

    kernel: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int


def kernels(arch: int, *, every: bool = False) -> list[Kernel]:
    """Kernels for ``arch``: each once as a network's first levels launch it, or ``every`` representative launch."""
    found: dict[str, Kernel] = {}
    with record_launches(f"sm_{arch}") as launches:
        for call, label in _calls(every):
            launches.clear()
            call()
            for launch in launches:
                name = f"{launch.kernel.__name__.strip('_')}{_variant(launch.constants)} {label}"
                found.setdefault(name, Kernel(name, launch))
    return list(found.values())


def _variant(constants: Mapping[str, Any]) -> str:
    """What tells a launch from others of its kernel in one call."""
    if "DILATION" not in constants:
        return "_transposed" if constants.get("TRANSPOSED") else ""
    words = ["_transposed" if constants["DILATION"] < 0 else ""]
    if constants["CHANNELS"]:
        words.append("{KERNEL}×{KERNEL}".format(**constants))
    if "JOINED" in constants:
        words += [name.lower() for name in ("JOINED", "SIDE") if constants[name]]
        words += [constants["OTHER"]] * bool(constants["OTHER"])
    else:
        words.append("of {CHANNELS}".format(**constants))
    return " ".join(words)


def _calls(every: bool) -> Iterator[tuple[Callable[[], object], str]]:
    """Calls of the launchers on tensors without storage, each with what tells it from the others."""
    if not every:
        yield _dynamic_filter(20, 256, 3, torch.bfloat16, torch.channels_last)
        yield _predicted(20, 256, 3, torch.bfloat16, torch.contiguous_format, False)
        yield _predicted(20, 256, 3, torch.float32, torch.contiguous_format, True)
        yield _amplitude_phase(20, 256, False, True)
        yield _amplitude_phase(20, 256, True, False)
        yield _window_attention(24, 2, 8, torch.bfloat16, torch.contiguous_format, False)
        yield _window_attention(24, 2, 8, torch.bfloat16, torch.channels_last, False)
        yield _window_attention(24, 2, 8, torch.float32, torch.contiguous_format, True)
        yield from _feature_mixing(24, 256, 48, torch.bfloat16, torch.channels_last, False)
        yield from _feature_mixing(48, 128, 192, torch.float32, torch.channels_last, True)
        yield _dense_block(3, 256, torch.bfloat16, torch.channels_last, False)
        yield _residual_conv(20, 20, 20, 256, torch.bfloat16, torch.channels_last, False)
        yield _residual_conv(20, 20, 20, 256, torch.float32, torch.channels_last, True)
        yield _conv_relu(64, 64, 64, 128, torch.bfloat16, torch.channels_last, False)
        return
    for (channels, side, size), dtype, layout in _crossed(FILTERS):
        yield _dynamic_filter(channels, side, size, dtype, layout)
    for (channels, side, size), dtype, layout in _crossed(PREDICTED_FILTERS):
        for tf32 in _precisions(dtype):
            yield _predicted(channels, side, size, dtype, layout, tf32)
    for (channels, heads, window), dtype, layout in _crossed(WINDOWS):
        for tf32 in _precisions(dtype):
            yield _window_attention(channels, heads, window, dtype, layout, tf32)
    for phase, tf32 in product((False, True), repeat=2):
        for channels, side in ((20, 256), (40, 128), (80, 64), (160, 32)):
            yield _amplitude_phase(channels, side, phase, tf32)
    for shape, *kind in _as_trained(MIXINGS):
        yield from _feature_mixing(*shape, *kind)
    for call, shapes in ((_dense_block, DENSE_BLOCKS), (_residual_conv, RESIDUALS), (_conv_relu, CONVOLUTIONS)):
        for shape, *kind in _as_trained(shapes):
            yield call(*shape, *kind)


def _crossed(shapes: Sequence[tuple]) -> Iterator[tuple[tuple, torch.dtype, torch.memory_format]]:
    """The hot shape in every dtype and layout, the others in NCHW, where bfloat16 stands for float16 too."""
    hot, *others = shapes
    for dtype, layout in product(DTYPES, (torch.contiguous_format, torch.channels_last)):
        yield hot, dtype, layout
    for shape, dtype in product(others, (torch.float32, torch.bfloat16)):
        yield shape, dtype, torch.contiguous_format


def _as_trained(shapes: Sequence[tuple]) -> Iterator[tuple[tuple, torch.dtype, torch.memory_format, bool]]:
    """All shapes in channels_last in bfloat16 and TF32, the hot one in IEEE's float32 and in NCHW too."""
    for shape in shapes:
        yield shape, torch.bfloat16, torch.channels_last, False
        yield shape, torch.float32, torch.channels_last, True
    yield shapes[0], torch.float32, torch.channels_last, False
    yield shapes[0], torch.bfloat16, torch.contiguous_format, False


def _precisions(dtype: torch.dtype) -> tuple[bool, ...]:
    """Whether TF32 may be used: both, where there is a choice."""
    return (False, True) if dtype == torch.float32 else (False,)


def _dynamic_filter(
    channels: int, side: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[Callable[[], object], str]:
    x, filters = (_map(count, side, dtype, layout) for count in (channels, channels * size**2))

    def call() -> None:
        dynamic_filter.dynamic_filter_forward(x, filters, False)
        dynamic_filter.dynamic_filter_backward(x, x, filters, False, True, True)

    return call, _label(channels, size, dtype, layout)


def _predicted(
    channels: int, side: int, size: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> tuple[Callable[[], object], str]:
    x = _map(channels, side, dtype, layout)
    weight = torch.empty(channels * size**2, channels, dtype=dtype, device="meta")
    bias = torch.empty(8, channels * size**2, dtype=dtype, device="meta")

    def call() -> None:
        dynamic_filter.predicted_dynamic_filter_forward(x, x, weight, bias, True, tf32)
        dynamic_filter.predicted_dynamic_filter_backward(x, x, x, weight, bias, True, tf32, True, True, True, True)

    return call, _label(channels, size, dtype, layout, "tf32" if tf32 else "")


def _amplitude_phase(channels: int, side: int, phase: bool, tf32: bool) -> tuple[Callable[[], object], str]:
    x = _map(channels, side, torch.float32, torch.contiguous_format)
    weight, bias = torch.empty(channels, channels, device="meta"), torch.empty(channels, device="meta")
    output_weight = torch.empty(channels, 2 * channels, device="meta")
    arguments = x, weight, bias, weight, bias, output_weight, bias, phase, 0.2, tf32

    def call() -> None:
        amplitude_phase.amplitude_phase_conv_forward(*arguments)
        amplitude_phase.amplitude_phase_conv_backward(x, *arguments, *[True] * 7)

    return call, f"C={channels} {'phase' if phase else 'amplitude'} {'tf32' if tf32 else 'float32'}"


def _window_attention(
    channels: int, heads: int, window_size: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> tuple[Callable[[], object], str]:
    qk, v = (_map(count, 256, dtype, layout) for count in (2 * channels, channels))
    table = torch.empty((2 * window_size - 1) ** 2, heads, dtype=dtype, device="meta")
    options = table, heads, window_size, window_size // 2, tf32

    def call() -> None:
        window_attention.window_attention_forward(qk, v, *options)
        window_attention.window_attention_backward(v, qk, v, *options, True, True, True)

    return call, f"C={channels} d={channels // heads} w={window_size} {_kind(dtype, layout, 'tf32' if tf32 else '')}"


def _feature_mixing(
    channels: int, side: int, hidden: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> Iterator[tuple[Callable[[], object], str]]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, query_key = (_map(count, side, dtype, layout) for count in (channels, 2 * channels))
    vector, matrix, of_samples = empty(channels), empty(channels, channels), empty(8, channels)
    hidden_weights = empty(hidden, channels), empty(hidden), empty(channels, hidden), vector
    mixing_weights = empty(channels, 5, 5), vector, matrix, vector
    projections = vector, vector, matrix, vector, empty(2 * channels, channels), empty(2 * channels)
    operators = {  # name: gradients of its results, tensors
        "pointwise_mlp": ((x,), (x, *hidden_weights)),
        "local_mixing": ((x,), (x, matrix, vector, *mixing_weights)),
        "local_global_mixing": ((x,), (x, x, x, *mixing_weights, of_samples, of_samples)),
        "normalized_qkv": ((x, query_key, empty(8), empty(8)), (x, *projections)),
    }
    for name, (grads, tensors) in operators.items():

        def call(name=name, grads=grads, tensors=tensors) -> None:
            getattr(feature_mixing, f"{name}_forward")(*tensors, tf32)
            getattr(feature_mixing, f"{name}_backward")(*grads, *tensors, [True] * len(tensors), tf32)

        yield call, f"C={channels} {name} {_kind(dtype, layout, 'tf32' if tf32 else '')}"


def _dense_block(
    channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> tuple[Callable[[], object], str]:
    x, growth = _map(channels, side, dtype, layout), 32
    shapes = (45 * growth * (channels + 2 * growth),), (5 * growth,), (channels, channels + 5 * growth), (channels,)
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    def call() -> None:
        convolution.dense_block_forward(x, *weights, tf32)
        convolution.dense_block_backward(x, x, *weights, [True] * 5, tf32)

    return call, f"C={channels} G={growth} {_kind(dtype, layout, 'tf32' if tf32 else '')}"


def _residual_conv(
    channels: int, joined: int, out: int, side: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> tuple[Callable[[], object], str]:
    maps = _two_maps(channels, joined, side, dtype, layout)
    both = channels + joined
    shapes = (out, both, 3, 3), (out,), (out, out, 3, 3), (out,), (out, both), (out,)
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    arguments = *maps, *weights, 1.0, 0.2

    def call() -> None:
        y, hidden = convolution.residual_conv_forward(*arguments, dtype == torch.float32, tf32)
        hidden = y.new_empty(0) if hidden is None else hidden
        convolution.residual_conv_backward(y, y, hidden, *arguments, [True, joined > 0, *[True] * 6], tf32)

    return call, f"C={channels}+{joined}→{out} {_kind(dtype, layout, 'tf32' if tf32 else '')}"


def _conv_relu(
    channels: int, joined: int, out: int, side: int, dtype: torch.dtype, layout: torch.memory_format, tf32: bool
) -> tuple[Callable[[], object], str]:
    maps = _two_maps(channels, joined, side, dtype, layout)
    weight = torch.empty(out, channels + joined, 3, 3, dtype=dtype, device="meta")
    scale = torch.empty(out, dtype=dtype, device="meta")

    def call() -> None:
        convolution.conv_relu_forward(*maps, weight, scale, scale, tf32)

    return call, f"C={channels}+{joined}→{out} {_kind(dtype, layout, 'tf32' if tf32 else '')}"


def _two_maps(
    channels: int, joined: int, side: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _map(channels, side, dtype, layout), _map(joined, side, dtype, layout) if joined else None


def _map(channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(8, channels, side, side, dtype=dtype, device="meta", memory_format=layout)


def _label(channels: int, size: int, dtype: torch.dtype, layout: torch.memory_format, product_type: str = "") -> str:
    return f"C={channels} K={size} {_kind(dtype, layout, product_type)}"


def _kind(dtype: torch.dtype, layout: torch.memory_format, product_type: str) -> str:
    kind = product_type or str(dtype).removeprefix("torch.")
    return f"{kind} {'NHWC' if layout == torch.channels_last else 'NCHW'}"


def compile_kernel(kernel: Kernel, arch: int) -> CompiledKernel:
    """Machine code of ``kernel`` for compute capability ``arch`` (90 is 9.0).

    Args:
        kernel: one of :func:`kernels` for the same ``arch``.
        arch: 80, 90 or 100.

    Raises:
        RuntimeError: Triton is interpreting, and so has nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("compiling ahead of time needs a process without TRITON_INTERPRET=1")
    function = kernel.launch.kernel
    constants = dict(kernel.launch.constants)
    options = COMPILER_OPTIONS | {name: constants.pop(name) for name in TUNED_OPTIONS if name in constants}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(function.arg_names):
        if position >= len(kernel.launch.arguments):
            signature[name] = "constexpr"
            continue
        value = kernel.launch.arguments[position]
        specialised = not function.params[position].do_not_specialize  # on None, 1 and multiples of 16
        if value is None or (specialised and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{DTYPES[value.dtype]}"
            attributes[position,] = [["tt.divisibility", 16]]  # PyTorch aligns to more
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(arch: int, *, every: bool = False) -> Iterator[Resources]:
    """Compile the :func:`kernels` for ``arch`` one after another and say what each takes."""
    for kernel in kernels(arch, every=every):
        compiled = compile_kernel(kernel, arch)
        registers, spills = usage(compiled)
        yield Resources(kernel.name, arch, registers, spills, compiled.metadata.shared, compiled.metadata.num_warps)


def usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of stack per thread. Our kernels index no local array: a stack holds spills alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [_cuobjdump(), "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", printed)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _cuobjdump() -> str:
    """NVIDIA's cuobjdump, the one that comes with Triton first."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"cuobjdump: neither at {bundled} nor on PATH")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the resources of every kernel as JSON, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--every", action="store_true", help="every representative launch, not one per kernel")
    chosen = parser.parse_args(arguments)
    for row in resources(chosen.architecture, every=chosen.every):
        json.dump(asdict(row), sys.stdout)
        print(flush=True)


if __name__ == "__main__":
    main()
