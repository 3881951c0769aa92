"""What a training step launches and moves, counted without a GPU and without computing anything.

    python -m benchmarks.work [--batch 8] [--size 256] [--operators 12] [--output benchmarks/results/NAME]

Rule: every dispatched operator that is no view counts as one; its tensor operands and results count
once each, in bytes. The training step is forward in training mode and backward of the mean absolute values of
the images that the losses see, float32, without loss networks and optimizer. A fused operator is
dispatched once but may move its data several times; ``PASSES`` says what its kernels really do.

The counts do not depend on the machine: shapes are propagated through the operators' fake kernels.
OUTPUT.csv and .json hold a network a row, OUTPUT-parts.csv and .json what the fused networks' steps are made of.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mitnet_fast import ops
from mitnet_fast.models import DCMPNet, MITNet

from .measure import environment, write_results

# The published networks under this rule at batch 8, 256×256: operators and gigabytes
PUBLISHED = {"MITNet": (937, 58.3), "DCMPNet": (2432, 202.0)}
IMAGES: dict[str, Callable[[tuple], Sequence[torch.Tensor]]] = {
    "MITNet": lambda output: (output.restored, output.stage1),
    "DCMPNet": lambda output: (output.restored,),
}
NETWORKS = {"MITNet": MITNet, "DCMPNet": DCMPNet}
IMPLEMENTATIONS = {"plain PyTorch": "reference", "fused": "cpp"}  # backend of every operator
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


# Fused operators whose kernels move more than operands and results once: bytes from the operator's
# tensors, results last.
PASSES: dict[str, Callable[[Sequence[torch.Tensor]], float]] = {
    "amplitude_phase_conv": amplitude_phase_conv,
    "amplitude_phase_conv_backward": amplitude_phase_conv_backward,
    "normalized_qkv": normalized_qkv,
    "normalized_qkv_backward": normalized_qkv_backward,
    "dense_block": dense_block,
    "dense_block_backward": dense_block_backward,
}


CONVOLUTIONS, FUSED, ELSE = "convolutions", "fused operators", "everything else"
PARTS = {  # of a step, by the names of operators
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
AROUND = tuple(part for part in PARTS if part != CONVOLUTIONS)  # what a convolution could do on its way


def part_of(operator: str) -> str:
    """The part of a step that an operator belongs to."""
    if hasattr(torch.ops.mitnet_fast, operator):
        return FUSED
    return next((part for part, operators in PARTS.items() if operator in operators), ELSE)


class WorkCounter(TorchDispatchMode):
    """Operators that were dispatched, and the bytes that they move, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in NO_WORK:
            tensors = [leaf for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, torch.Tensor)]
            self.operators[name] += 1
            self.bytes[name] += PASSES[name](tensors) if name in PASSES else sum(map(size_of, tensors))
        return result


@dataclass(frozen=True)
class Row:
    """Work of one network's training step."""

    network: str
    implementation: str
    shape: str
    operators: int
    gigabytes: float
    dtype: str
    torch: str
    commit: str


@dataclass(frozen=True)
class PartRow:
    """Work of one part of a fused network's training step."""

    network: str
    part: str
    operators: int
    gigabytes: float
    dtype: str
    torch: str
    commit: str


@functools.cache
def count(network: str, batch: int, size: int, backend: str | None) -> WorkCounter:
    """Work of one training step of a network.

    Args:
        network: "MITNet" or "DCMPNet".
        batch: images.
        size: their side, pixels.
        backend: of every operator: "reference", or "cpp" for the fused ones; None for what runs by default.
    """
    model = NETWORKS[network]().train()
    with FakeTensorMode(allow_non_fake_inputs=True), ops.use_backend(backend):
        image = torch.rand(batch, 3, size, size)
        with WorkCounter() as counter:
            sum(result.abs().mean() for result in IMAGES[network](model(image))).backward()
    return counter


def rows(network: str, batch: int = 8, size: int = 256) -> list[Row]:
    """Work of a network's training step: published (batch 8, 256×256 only), plain PyTorch and fused."""
    shape = f"[{batch}, 3, {size}, {size}]"
    counted = {"published": PUBLISHED[network]} if (batch, size) == (8, 256) else {}
    for name, backend in IMPLEMENTATIONS.items():
        counter = count(network, batch, size, backend)
        counted[name] = counter.operators.total(), round(counter.bytes.total() / 1e9, 1)
    return [Row(network, name, shape, *numbers, **_source()) for name, numbers in counted.items()]


def parts(network: str, batch: int = 8, size: int = 256) -> list[PartRow]:
    """What a fused network's training step is made of, what moves most first."""
    counter = count(network, batch, size, IMPLEMENTATIONS["fused"])
    operators: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for operator, calls in counter.operators.items():
        operators[part_of(operator)] += calls
        moved[part_of(operator)] += counter.bytes[operator]
    return [
        PartRow(network, part, operators[part], round(amount / 1e9, 1), **_source())
        for part, amount in moved.most_common()
    ]


def _source() -> dict[str, str]:
    """What was counted: which operators PyTorch dispatches depends on its version, not on the device."""
    where = environment("cpu")
    return {"dtype": "float32", "torch": where["torch"], "commit": where["commit"]}


def show(found: Sequence[Row], console: Console) -> None:
    """Print one table."""
    table = Table("network", "implementation", "operators", "GB", title="one training step, float32")
    for row in found:
        table.add_row(f"{row.network}, {row.shape}", row.implementation, str(row.operators), f"{row.gigabytes:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="side of the images, a multiple of 8")
    parser.add_argument("--operators", type=int, default=0, help="show so many of the operators that move most")
    parser.add_argument("--output", type=Path, help="write OUTPUT and OUTPUT-parts, as .csv and .json")
    options = parser.parse_args()
    console = Console()
    if options.operators:
        for network in NETWORKS:
            counter = count(network, options.batch, options.size, "cpp")
            table = Table("operator", "calls", "GB", title=f"{network}, fused")
            for operator, amount in counter.bytes.most_common(options.operators):
                table.add_row(operator, str(counter.operators[operator]), f"{amount / 1e9:.2f}")
            console.print(table)
    found = [row for network in NETWORKS for row in rows(network, options.batch, options.size)]
    show(found, console)
    if options.output:
        write_results(found, options.output)
        of_networks = [row for network in NETWORKS for row in parts(network, options.batch, options.size)]
        write_results(of_networks, options.output.with_name(f"{options.output.name}-parts"))
        console.print(f"written: {options.output}.csv, {options.output}.json, and with -parts what they consist of")


if __name__ == "__main__":
    main()
