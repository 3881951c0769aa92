"""What a training step launches and moves, counted without a GPU and without computing anything.

    python -m benchmarks.work [--batch 8] [--size 256] [--operators 12] [--output benchmarks/results/NAME]

Rule: every dispatched operator that is no view counts as one; its tensor operands and results count
once each, in bytes. The training step is forward in training mode and backward of the mean absolute values of
the images that the losses see, float32, without loss networks and optimizer. A fused operator is
dispatched once but may move its data several times. For the kernels on a CPU ``PASSES`` says what they do. Those
in Triton are launched by the operator's own launcher on tensors without storage, and the rule holds for every
launch and for every operator of PyTorch between them: each is a kernel.

The counts do not depend on the machine: shapes are propagated through the operators' fake kernels.
OUTPUT.csv and .json hold a network and implementation a row, OUTPUT-parts.csv and .json what the fused networks'
steps are made of.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mitnet_fast import ops
from mitnet_fast.models import DCMPNet, MITNet
from mitnet_fast.ops._backends import UNAVAILABLE, triton_kernels
from mitnet_fast.ops._registration import RUN

from .measure import environment, write_results

# The published networks under this rule at batch 8, 256×256: operators and gigabytes
PUBLISHED = {"MITNet": (937, 58.3), "DCMPNet": (2432, 202.0)}
IMAGES: dict[str, Callable[[tuple], Sequence[torch.Tensor]]] = {
    "MITNet": lambda output: (output.restored, output.stage1),
    "DCMPNet": lambda output: (output.restored,),
}
NETWORKS = {"MITNet": MITNet, "DCMPNet": DCMPNet}
PLAIN, ON_CPU, IN_TRITON = "plain PyTorch", "fused, C++ on a CPU", "fused, Triton"
BACKENDS = {PLAIN: "reference", ON_CPU: "cpp", IN_TRITON: "triton"}  # of every operator
NO_WORK = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "expand",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "alias",
        "detach",
        "as_strided",
        "view_as_real",
        "view_as_complex",
        "real",
        "imag",
        "_conj",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "lift_fresh",
        "device",
    }
)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def spectrum_of(image: torch.Tensor) -> float:
    """Bytes of the half spectrum of a real map."""
    width = image.shape[-1]
    return size_of(image) * 2 * (width // 2 + 1) / width


def amplitude_phase_conv(tensors: Sequence[torch.Tensor]) -> float:
    """Rows and columns of two transforms, and one pass from spectrum to spectrum between them."""
    x, y = tensors[0], tensors[-1]
    return sum(map(size_of, tensors)) + 4 * spectrum_of(x) + 4 * spectrum_of(y)


def amplitude_phase_conv_backward(tensors: Sequence[torch.Tensor]) -> float:
    """The spectra of x and of the gradient, one pass that reads both and writes one, one transform back."""
    grad, x = tensors[:2]
    return sum(map(size_of, tensors)) + 8 * spectrum_of(x) + 4 * spectrum_of(grad)


def normalized_qkv(tensors: Sequence[torch.Tensor]) -> float:
    """x once for the statistics, once for the products."""
    return sum(map(size_of, tensors)) + size_of(tensors[0])


def normalized_qkv_backward(tensors: Sequence[torch.Tensor]) -> float:
    """x for the statistics, for the sums and for its gradient, which lies half done between the last two."""
    return sum(map(size_of, tensors)) + 4 * size_of(tensors[4])


def dense_block(tensors: Sequence[torch.Tensor]) -> float:
    """Layers read all channels before them and write their own; the fusion reads all."""
    x, bias = tensors[0], tensors[2]
    return sum(map(size_of, tensors)) + size_of(x[:, :1]) * (7 * x.shape[1] + 4 * bias.shape[0])


def dense_block_backward(tensors: Sequence[torch.Tensor]) -> float:
    """The layers again, and back through them: features are read, gradients of all channels before read and written."""
    x, bias = tensors[1], tensors[3]
    return sum(map(size_of, tensors)) + size_of(x[:, :1]) * (24 * x.shape[1] + 15 * bias.shape[0])


def residual_conv(tensors: Sequence[torch.Tensor]) -> float:
    """Tall maps once, of which bands of 32 rows of tiles read three more; short ones lie in the workspace, h too."""
    x = tensors[0]
    out, depth = identity_of(tensors).shape
    channel = size_of(x[:, :1])
    beside = 3 / 32 * depth if is_tall(x) else 3 * depth + 2 * out
    return sum(map(size_of, tensors)) + channel * beside


def residual_conv_backward(tensors: Sequence[torch.Tensor]) -> float:
    """The same with six rows more, and of y, h and the gradient of y too; beside h the gradient of z lies there."""
    x = tensors[3]
    out, depth = identity_of(tensors).shape
    channel = size_of(x[:, :1])
    beside = 6 / 32 * (depth + 3 * out) if is_tall(x) else 6 * depth + 20 * out
    return sum(map(size_of, tensors)) + channel * beside


def identity_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight of a residual convolution's shortcut, [Co, C]."""
    return next(tensor for tensor in tensors if tensor.dim() == 2)


def is_tall(x: torch.Tensor) -> bool:
    """Whether a map has two bands of 32 rows of 2×2 tiles."""
    return x.shape[2] > 2 * 63


def transform(tensors: Sequence[torch.Tensor]) -> float:
    """Rows and columns of a transform: what lies between them is written and read."""
    return sum(map(size_of, tensors)) + 2 * max(map(size_of, tensors))


# Fused operators whose kernels on a CPU move more than operands and results once: bytes from the operator's
# tensors, results last.
PASSES: dict[str, Callable[[Sequence[torch.Tensor]], float]] = {
    "amplitude_phase_conv": amplitude_phase_conv,
    "amplitude_phase_conv_backward": amplitude_phase_conv_backward,
    "normalized_qkv": normalized_qkv,
    "normalized_qkv_backward": normalized_qkv_backward,
    "dense_block": dense_block,
    "dense_block_backward": dense_block_backward,
    "residual_conv": residual_conv,
    "residual_conv_backward": residual_conv_backward,
}
TRANSFORMS = {"_fft_r2c": transform, "_fft_c2r": transform}


CONVOLUTIONS, ELSE = "convolutions", "everything else"
PARTS = {  # of a step beside fused operators, by the names of operators
    CONVOLUTIONS: ("convolution", "convolution_backward"),
    "sums of maps and of gradients": ("add", "add_"),
    "activations": (
        "leaky_relu",
        "leaky_relu_",
        "leaky_relu_backward",
        "relu",
        "relu_",
        "threshold_backward",
        "sigmoid",
        "sigmoid_backward",
    ),
    "concatenations": ("cat", "stack"),
}


def part_of(operator: str) -> str:
    """The part of a step that an operator belongs to: a fused one's is itself, forward and backward."""
    if hasattr(torch.ops.mitnet_fast, operator):
        return operator.removesuffix("_backward")
    return next((part for part, operators in PARTS.items() if operator in operators), ELSE)


class WorkCounter(TorchDispatchMode):
    """Operators that were dispatched, and the bytes that they move, by name.

    Args:
        passes: operators that move more than operands and results once, as :data:`PASSES`.
        in_triton: keep calls of operators that have kernels in Triton for :meth:`launch`, which counts those.

    Attributes:
        operators: how often each was dispatched.
        bytes: that each moved in all.
        kernels: that were launched, one for every operator of PyTorch.
    """

    def __init__(self, passes: Mapping[str, Callable] = PASSES, in_triton: bool = False) -> None:
        super().__init__()
        self.passes, self.in_triton = passes, in_triton
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.kernels = 0
        self._calls: list[tuple[str, Sequence[object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in NO_WORK:
            return result
        self.operators[name] += 1
        if self.in_triton and name in RUN and args[-1] in ops.BACKENDS:
            self._calls.append((name, tree_map_only(torch.Tensor, _without_storage, args[:-1])))
            return result
        tensors = [leaf for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, torch.Tensor)]
        self.kernels += 1
        self.bytes[name] += self.passes[name](tensors) if name in self.passes else sum(map(size_of, tensors))
        return result

    def launch(self) -> None:
        """Launch the kernels of the kept calls in Triton, on tensors without storage, and count them."""
        for name, arguments in self._calls:
            with triton_kernels("_common").record_launches("sm_90") as launches, WorkCounter(TRANSFORMS) as between:
                RUN[name](*arguments, "triton")
            operands = [value for each in launches for value in each.arguments if isinstance(value, torch.Tensor)]
            self.kernels += len(launches) + between.kernels
            self.bytes[name] += sum(map(size_of, operands)) + between.bytes.total()
        self._calls.clear()


def _without_storage(tensor: torch.Tensor) -> torch.Tensor:
    with unset_fake_temporarily():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class Row:
    """Work of one network's training step."""

    network: str
    implementation: str
    shape: str
    operators: int
    kernels: int | None  # where fused operators run in Triton
    gigabytes: float
    dtype: str
    torch: str
    commit: str


@dataclass(frozen=True)
class PartRow:
    """Work of one part of a fused network's training step."""

    network: str
    implementation: str
    part: str
    operators: int
    gigabytes: float
    dtype: str
    torch: str
    commit: str


@functools.cache
def count(network: str, batch: int, size: int, implementation: str | None) -> WorkCounter:
    """Work of one training step of a network.

    Args:
        network: "MITNet" or "DCMPNet".
        batch: images.
        size: their side, pixels.
        implementation: one of :data:`BACKENDS`; None for what runs by default.
    """
    model = NETWORKS[network]().train()
    # the same operators are dispatched for Triton, which has no kernels for tensors of a CPU
    backend = "cpp" if implementation == IN_TRITON else BACKENDS.get(implementation)
    with FakeTensorMode(allow_non_fake_inputs=True), ops.use_backend(backend):
        image = torch.rand(batch, 3, size, size)
        with WorkCounter(in_triton=implementation == IN_TRITON) as counter:
            sum(result.abs().mean() for result in IMAGES[network](model(image))).backward()
    counter.launch()
    return counter


def implementations() -> list[str]:
    """Those of :data:`BACKENDS` that can be counted here: fused operators are dispatched where they are compiled."""
    missing = {PLAIN: False, ON_CPU: ("cpp", "cpu") in UNAVAILABLE}
    missing[IN_TRITON] = missing[ON_CPU] or find_spec("triton") is None
    return [name for name in BACKENDS if not missing[name]]


def rows(network: str, batch: int = 8, size: int = 256) -> list[Row]:
    """Work of a network's training step: published (batch 8, 256×256 only), plain PyTorch and fused."""
    shape = f"[{batch}, 3, {size}, {size}]"
    found = []
    if (batch, size) == (8, 256):
        operators, gigabytes = PUBLISHED[network]
        found.append(Row(network, "published", shape, operators, None, gigabytes, **_source()))
    for name in implementations():
        counter = count(network, batch, size, name)
        kernels = counter.kernels if name == IN_TRITON else None
        gigabytes = round(counter.bytes.total() / 1e9, 1)
        found.append(Row(network, name, shape, counter.operators.total(), kernels, gigabytes, **_source()))
    return found


def parts(network: str, batch: int = 8, size: int = 256) -> list[PartRow]:
    """What a fused network's training step is made of, what moves most first; nothing without the kernels."""
    found = []
    for implementation in implementations()[1:]:
        counter = count(network, batch, size, implementation)
        operators: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for operator, calls in counter.operators.items():
            operators[part_of(operator)] += calls
            moved[part_of(operator)] += counter.bytes[operator]
        found += [
            PartRow(network, implementation, part, operators[part], round(amount / 1e9, 1), **_source())
            for part, amount in moved.most_common()
        ]
    return found


def _source() -> dict[str, str]:
    """What was counted: which operators PyTorch dispatches depends on its version, not on the device."""
    where = environment("cpu")
    return {"dtype": "float32", "torch": where["torch"], "commit": where["commit"]}


def show(found: Sequence[Row], console: Console) -> None:
    """Print one table."""
    table = Table("network", "implementation", "operators", "kernels", "GB", title="one training step, float32")
    for row in found:
        kernels = "" if row.kernels is None else str(row.kernels)
        numbers = str(row.operators), kernels, f"{row.gigabytes:.1f}"
        table.add_row(f"{row.network}, {row.shape}", row.implementation, *numbers)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="side of the images, a multiple of 8")
    parser.add_argument("--operators", type=int, default=0, help="show so many of the operators that move most")
    parser.add_argument("--output", type=Path, help="write OUTPUT and OUTPUT-parts, as .csv and .json")
    options = parser.parse_args()
    console = Console()
    for implementation in implementations()[1:] if options.operators else ():
        for network in NETWORKS:
            counter = count(network, options.batch, options.size, implementation)
            table = Table("operator", "calls", "GB", title=f"{network}, {implementation}")
            for operator, amount in counter.bytes.most_common(options.operators):
                table.add_row(operator, str(counter.operators[operator]), f"{amount / 1e9:.2f}")
            console.print(table)
    found = [row for network in NETWORKS for row in rows(network, options.batch, options.size)]
    show(found, console)
    if options.output:
        write_results(found, options.output)
        of_networks = [row for network in NETWORKS for row in parts(network, options.batch, options.size)]
        if of_networks:
            write_results(of_networks, options.output.with_name(f"{options.output.name}-parts"))
        console.print(f"written: {options.output}.csv, {options.output}.json, and with -parts what they consist of")


if __name__ == "__main__":
    main()
