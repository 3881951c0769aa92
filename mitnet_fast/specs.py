"""One specification per operator: its inputs, its truth, and how far from it a kernel may be.

Tests, ``mitnet-fast verify`` and the benchmarks draw every input and every tolerance from here.

The truth is the reference in float64 on the same inputs (for half precision: on the same rounded
inputs). For every tensor, outputs and gradients alike, the error is the relative L2 distance to it:

    error ≤ max(4 × error of the reference in the kernel's dtype,
                8 · eps · ‖operation on absolute values‖ / ‖truth‖)

- The first term holds a kernel to what plain PyTorch reaches in the same dtype. A factor is needed
  because a single correct kernel, by cancellation, exceeds twice eager's error in about one case of
  a few hundred; the median over a sweep of random cases must stay within 1.5 of eager's.
- The second is what rounding alone may do, where eager happens to be lucky: each of the summed terms
  is rounded to ``eps`` of the dtype, whatever their order.
- float64: 1e-12. In TF32 ``eps`` is that of the factors, 2^-10, however plain PyTorch computes on a CPU.
- An operator that jumps where rounding may decide on which side it lands, as the phase of a spectrum
  does at ±π, is compared from what the kernel saw: truth and plain PyTorch both start there. Where
  its derivative jumps, as that of a LeakyReLU does at 0, rounding may land on either side: twice
  the distance to the truth on the other side of all values that are 0 within rounding is allowed too,
  twice since in a sum some of them may cancel each other. So is twice the distance to the truth whose
  computed phases are off by the rounding of their terms: a cosine has the same absolute value however
  far its argument is rounded, and a kernel would be held to what plain PyTorch reaches by luck.

Both terms come from the inputs, so the rule tightens with easy inputs and relaxes with hard ones,
where a fixed tolerance would be wrong in both directions. A result that is not finite never passes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import log2, prod
from random import Random

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from . import ops, reference
from .ops._amplitude_phase import KERNELS as AMPLITUDE_PHASE_KERNELS
from .ops._amplitude_phase import launchers as amplitude_phase_launchers
from .ops._amplitude_phase import sizes_of
from .ops._backends import choose
from .ops._feature_mixing import LOCAL_SIZE
from .reference.amplitude_phase import SMALLEST_AMPLITUDE, amplitude_phase_conv_of_spectrum
from .reference.feature_mixing import NORM_EPS, dense_layers
from .reference.window_attention import padding

# what an operator returns: a map, or several tensors
Results = torch.Tensor | tuple[torch.Tensor, ...]
# the reference, and the same as rounding may have it
Formulas = tuple[Callable[..., torch.Tensor], ...]
LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")
FLOAT64_LIMIT = 1e-12
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Case:
    """One call of one operator: everything that its inputs are made from.

    Attributes:
        sizes: the operator's sizes by name, such as batch, channels, height, width.
        options: keyword arguments of the operator that are no tensors.
        dtype: of all tensors.
        layout: of the maps, one of ``LAYOUTS``.
        seed: of the generator that fills them.
        tf32: whether float32 products are in TF32, as a GPU has them; else they are IEEE's.
    """

    sizes: Mapping[str, int]
    options: Mapping[str, object]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    tf32: bool = False

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in (*self.sizes.items(), *self.options.items())]
        return " ".join([*parts, self.arithmetic, self.layout, f"seed={self.seed}"])

    @property
    def arithmetic(self) -> str:
        """The dtype by name, or "tf32"."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def eps(self) -> float:
        """Twice the relative error with which a factor of a product is rounded at the most."""
        return TF32_EPS if self.tf32 else torch.finfo(self.dtype).eps


@dataclass(frozen=True)
class OpSpec:
    """What tests, verification and benchmarks know about an operator.

    The bytes that a call must move follow from its shapes by one rule, :meth:`bytes_at_least`.

    Attributes:
        name: the public function in ``mitnet_fast.ops``.
        family: its kernel family.
        shapes: case to shapes of the tensor arguments, in their order; None for an absent one.
        maps: names of the arguments that are maps, and so get the case's layout; the first is the
            one that tests differentiate twice, transform and batch.
        output_shape: case to the shape of the result, or to those of all results.
        cases: the fixed cases, from tiny to large, in float32 and contiguous.
        typical: one of middling size, two samples and every tensor present.
        random_sizes: draws sizes and options for the seeded sweep.
        benchmark_cases: what users run, for speed and memory.
        flops: case to the floating-point operations of the formula, forward and backward: those of its products
            (a multiplication and an addition each) and transforms, with nothing computed a second time.
        only_added: arguments whose values the backward does not need, since they are only added. A map among
            them has the incoming gradient for its own.
        multiplies: whether it has products of matrices, which a GPU may compute in TF32.
        casts_like_convolution: whether autocast makes it compute in half precision; else it computes in
            float32 and returns the dtype of its map.
        results: names of what is returned.
        deviations: case to the standard deviations of arguments, where they are not 1: of the weights of so many layers
            in a row that the last ones' results would otherwise leave float16's range.
        decided: what the public function decides for the registered operator, every possibility, as arguments that
            follow the options.
        as_seen: for an operator that jumps: case, tensors and backend to the reference, as a function of the
            tensor arguments in any dtype, that starts from what the backend saw of these tensors; and to the same
            as rounding may have it, such as with derivatives on the other side wherever rounding decides.
        absolute: for an operator that subtracts, as a norm does: the reference as a function of the tensor
            arguments, in which absolute values stand for differences too, so that no terms cancel each other.
    """

    name: str
    family: str
    shapes: Callable[[Case], dict[str, tuple[int, ...] | None]]
    maps: tuple[str, ...]
    output_shape: Callable[[Case], tuple[int, ...] | tuple[tuple[int, ...], ...]]
    cases: Sequence[Case]
    typical: Case
    random_sizes: Callable[[Random], tuple[dict[str, int], dict[str, object]]]
    benchmark_cases: Sequence[Case]
    flops: Callable[[Case], tuple[int, int]]
    only_added: tuple[str, ...] = ()
    multiplies: bool = True
    casts_like_convolution: bool = True
    results: tuple[str, ...] = ("y",)
    deviations: Callable[[Case], Mapping[str, float]] | None = None
    decided: Sequence[tuple[bool, ...]] = ((),)
    as_seen: Callable[[Case, Mapping[str, torch.Tensor | None], str | None], Formulas] | None = None
    absolute: Callable[..., Results] | None = None

    def inputs(self, case: Case, device: torch.device | str = "cpu") -> dict[str, torch.Tensor | None]:
        """The tensor arguments of ``case``: the same values on every device, normally distributed around 0."""
        tensors, deviations = {}, self.deviations(case) if self.deviations else {}
        for name, shape in self.shapes(case).items():
            if shape is None:
                tensors[name] = None
                continue
            generator = torch.Generator().manual_seed(case.seed * 1_000_003 + zlib.crc32(name.encode()))
            layout = case.layout if name in self.maps else "contiguous"
            values = _laid_out(shape, layout, generator, case.dtype)
            tensors[name] = (values * deviations[name] if name in deviations else values).to(device)
        return tensors

    def uninitialized(self, case: Case, device: torch.device | str = "cpu") -> Results:
        """What the operator returns, in shape, dtype and device."""
        shapes = self.output_shape(case)
        if len(self.results) == 1:
            return torch.empty(shapes, dtype=case.dtype, device=device)
        return tuple(torch.empty(shape, dtype=case.dtype, device=device) for shape in shapes)

    def gradient(self, case: Case, like: Results) -> Results:
        """An incoming gradient for results ``like``, maps in the case's layout."""
        generator = torch.Generator().manual_seed(case.seed * 1_000_003 + 17)
        return tree_map(lambda t: _laid_out(tuple(t.shape), case.layout, generator, t.dtype).to(t.device), like)

    def bytes_at_least(self, case: Case) -> tuple[int, int]:
        """Bytes that forward and backward must move, by one rule for every operator.

        The forward reads every argument and writes every result once. The backward reads the gradients of the
        results and the arguments that it needs, and writes the gradients of all arguments, each once.
        """
        shapes = {name: shape for name, shape in self.shapes(case).items() if shape is not None}
        arguments = {name: case.dtype.itemsize * prod(shape) for name, shape in shapes.items()}
        results = sum(result.nbytes for result in tree_leaves(self.uninitialized(case, "meta")))
        needed = sum(size for name, size in arguments.items() if name not in self.only_added)
        passed_on = sum(size for name, size in arguments.items() if name in self.only_added and name in self.maps)
        all_arguments = sum(arguments.values())
        return all_arguments + results, results + needed + all_arguments - passed_on

    def run(self, case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Results:
        """Call the public function."""
        return getattr(ops, self.name)(**tensors, **case.options, backend=backend)

    def random_case(self, seed: int, dtypes: Sequence[torch.dtype]) -> Case:
        """Case number ``seed`` of the sweep."""
        random = Random(f"{self.name} {seed}")
        sizes, options = self.random_sizes(random)
        return Case(sizes, options, random.choice(list(dtypes)), random.choice(LAYOUTS), seed)

    def dtypes_and_layouts(self, case: Case, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
        """``case`` in every dtype and every layout."""
        for dtype in dtypes:
            for layout in LAYOUTS:
                yield replace(case, dtype=dtype, layout=layout)


@dataclass(frozen=True)
class Comparison:
    """One tensor of one call against the truth.

    Attributes:
        tensor: ``y`` or ``grad_<argument>``.
        error: relative L2 distance to float64.
        eager_error: the same of plain PyTorch in the call's dtype.
        allowed: the error that the tolerance rule allows.
        repeated: whether the same call gave the same bits again, where it was made twice.
    """

    tensor: str
    error: float
    eager_error: float
    allowed: float
    repeated: bool = True

    @property
    def passed(self) -> bool:
        """Whether the error is finite and within what is allowed, and the bits were the same every time."""
        return self.error <= self.allowed and self.repeated  # false for NaN

    @property
    def ratio(self) -> float:
        """Error relative to that of the reference in the same dtype; 1 where both are exact."""
        if self.eager_error == 0:
            return 1.0 if self.error == 0 else float("inf")
        return self.error / self.eager_error


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Convolutions and matrix products of float32 on a GPU in "ieee" or "tf32" while the context is open."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance in float64; infinite for another shape or anything that is not finite."""
    if actual.shape != truth.shape or not torch.isfinite(actual).all():
        return float("inf")
    truth = truth.double()
    distance = float((actual.to(truth.device).double() - truth).norm())
    return distance if distance == 0 else distance / max(float(truth.norm()), 1e-300)


def allowed_error(
    dtype: torch.dtype, eager_error: float, truth: torch.Tensor, absolute: torch.Tensor, *, tf32: bool = False
) -> float:
    """The tolerance rule of this module for one tensor."""
    if dtype == torch.float64:
        return FLOAT64_LIMIT
    norm = float(truth.double().norm())
    # of what is no sum of products, such as a phase, absolute values may give less than the values did
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    rounding = 8 * eps * max(1.0, float(absolute.double().norm()) / norm) if norm else 0.0
    return max(4 * eager_error, rounding)


def outputs_and_gradients(
    spec: OpSpec,
    case: Case,
    tensors: Mapping[str, torch.Tensor | None],
    gradient: Results,
    backend: str | None,
    needs: Mapping[str, bool] | None = None,
    formula: Callable[..., Results] | None = None,
) -> dict[str, torch.Tensor]:
    """Results by name and the gradients ``grad_<argument>`` of one call, for the arguments that ``needs`` names.

    A ``formula`` of the tensor arguments is called in place of the operator.
    """
    needs = needs or {}
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(needs.get(name, True))
        for name, tensor in tensors.items()
    }
    returned = tree_leaves(formula(**leaves) if formula else spec.run(case, leaves, backend))
    results = {name: tensor.detach() for name, tensor in zip(spec.results, returned, strict=True)}
    pairs = [pair for pair in zip(returned, tree_leaves(gradient), strict=True) if pair[0].requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    for name, leaf in leaves.items():
        if leaf is not None and leaf.requires_grad:
            results[f"grad_{name}"] = leaf.grad
        elif leaf is not None and leaf.grad is not None:
            raise AssertionError(f"{spec.name}: {name} got a gradient that nobody asked for")
    return results


def expectations(
    spec: OpSpec,
    case: Case,
    tensors: Mapping[str, torch.Tensor | None],
    gradient: Results,
    backend: str | None,
    needs: Mapping[str, bool] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the results of ``backend`` are held to, computed on the CPU: truth, operation on absolute values, eager."""
    seen, *rounded = spec.as_seen(case, tensors, backend) if spec.as_seen else (None,)

    def plain(change: Callable[[torch.Tensor], torch.Tensor], formula: Callable[..., Results] | None = seen):
        host = {name: None if t is None else change(t.detach().cpu()) for name, t in tensors.items()}
        changed = tree_map(lambda t: change(t.cpu()), gradient)
        return outputs_and_gradients(spec, case, host, changed, "reference", needs, formula)

    truth, absolute = plain(lambda t: t.double()), plain(lambda t: t.double().abs(), spec.absolute)
    for formula in rounded if case.dtype != torch.float64 else ():
        for name, other in plain(lambda t: t.double(), formula).items():
            absolute[name] = absolute[name].abs() + (other - truth[name]).abs() / (4 * case.eps)
    return truth, absolute, plain(lambda t: t)


def compare(
    spec: OpSpec,
    case: Case,
    backend: str | None,
    device: torch.device | str = "cpu",
    needs: Mapping[str, bool] | None = None,
    twice: bool = False,
) -> list[Comparison]:
    """Run one case on a backend and compare its result and gradients with the truth, tensor by tensor.

    Args:
        spec: the operator.
        case: the call.
        backend: what runs it; None for the best.
        device: where.
        needs: arguments whose gradients are wanted or not; those that it does not name are.
        twice: run it twice, and compare the bits too.
    """
    tensors = spec.inputs(case, device)
    gradient = spec.gradient(case, spec.uninitialized(case, device))
    with float32_products("tf32" if case.tf32 else "ieee"):
        truth, absolute, eager = expectations(spec, case, tensors, gradient, backend, needs)
        actual = outputs_and_gradients(spec, case, tensors, gradient, backend, needs)
        again = outputs_and_gradients(spec, case, tensors, gradient, backend, needs) if twice else actual
    return [
        Comparison(
            name,
            relative_error(actual[name].cpu(), truth[name]) if truth[name].numel() else float(actual[name].numel()),
            eager_error := relative_error(eager[name], truth[name]) if truth[name].numel() else 0.0,
            allowed_error(case.dtype, eager_error, truth[name], absolute[name], tf32=case.tf32),
            torch.equal(actual[name], again[name]) or bool(actual[name].isnan().any()),
        )
        for name in truth
    ]


def _laid_out(shape: tuple[int, ...], layout: str, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal values of ``shape``, rounded to ``dtype``, in one of ``LAYOUTS``."""
    if layout == "expanded" and len(shape) == 4 and shape[0] > 0:
        one = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)
        return one.expand(shape)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if len(shape) != 4:
        return values
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every second column of a wider map, whose other columns are NaN
        wide = torch.full((*shape[:3], 2 * shape[3]), float("nan"), dtype=dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


def _filter_sizes(random: Random) -> dict[str, int]:
    return {
        "batch": random.choice((0, 1, 1, 2, 3)),
        "channels": random.choice((1, 3, 7, 8, 20, 40, 80)),
        "height": random.choice((1, 2, 3, 5, 8, 13, 16, 17)),
        "width": random.choice((1, 2, 3, 7, 8, 15, 16, 31, 33)),
        "kernel_size": random.choice((1, 3, 3, 3, 5, 7)),
    }


def _random_dynamic_filter(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    return _filter_sizes(random), {"residual": random.random() < 0.5}


def _random_predicted(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes = _filter_sizes(random)
    sizes["features"] = random.choice((1, 3, 7, 20, sizes["channels"], sizes["channels"]))
    sizes["bias"] = random.choice((0, 1, 2))
    return sizes, {"residual": random.random() < 0.5}


def _dynamic_filter_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w, k = (case.sizes[name] for name in ("batch", "channels", "height", "width", "kernel_size"))
    return {"x": (b, c, h, w), "filters": (b, c * k * k, h, w)}


def _predicted_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w, k = (case.sizes[name] for name in ("batch", "channels", "height", "width", "kernel_size"))
    features = case.sizes["features"]
    return {
        "x": (b, c, h, w),
        "features": (b, features, h, w),
        "weight": (c * k * k, features),
        "bias": (None, (c * k * k,), (b, c * k * k))[case.sizes["bias"]],
    }


def _pixels(case: Case) -> int:
    return case.sizes["batch"] * case.sizes["height"] * case.sizes["width"]


def _with_gradients(products: int) -> tuple[int, int]:
    """Operations of products, and those of the gradients of both their factors."""
    return products, 2 * products


def _convolutions(
    shapes: Callable[[Case], dict[str, tuple[int, ...] | None]], *weights: str
) -> Callable[[Case], tuple[int, int]]:
    """Operations of convolutions, in which every element of these weights meets every pixel, zeros around included."""

    def flops(case: Case) -> tuple[int, int]:
        return _with_gradients(2 * _pixels(case) * sum(prod(shapes(case)[name]) for name in weights))

    return flops


def _dynamic_filter_flops(case: Case) -> tuple[int, int]:
    products = _pixels(case) * case.sizes["channels"] * case.sizes["kernel_size"] ** 2
    return 2 * products, 3 * products  # backward: nothing is added up in the gradient of the filters


def _predicted_flops(case: Case) -> tuple[int, int]:
    forward, backward = _dynamic_filter_flops(case)
    prediction, gradients = _convolutions(_predicted_shapes, "weight")(case)
    return forward + prediction, backward + gradients


def _case(batch: int, channels: int, height: int, width: int, kernel_size: int = 3, residual=False, **more) -> Case:
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "kernel_size": kernel_size}
    return Case(sizes | more, {"residual": residual})


DYNAMIC_FILTER = OpSpec(
    name="dynamic_filter",
    family="dynamic_filter",
    shapes=_dynamic_filter_shapes,
    maps=("x", "filters"),
    multiplies=False,
    output_shape=lambda case: _dynamic_filter_shapes(case)["x"],
    cases=(
        _case(1, 1, 1, 1),
        _case(1, 1, 1, 1, 7),
        _case(2, 3, 5, 7, 1),
        _case(2, 7, 6, 9, 3, residual=True),
        _case(1, 20, 17, 33, 3),
        _case(2, 3, 9, 11, 5, residual=True),
        _case(1, 2, 12, 13, 7),
        _case(0, 3, 4, 4),
        _case(2, 40, 24, 20, 3, residual=True),
    ),
    typical=_case(2, 7, 6, 9, 3, residual=True),
    random_sizes=_random_dynamic_filter,
    benchmark_cases=tuple(_case(2, c, s, s) for c, s in ((20, 256), (40, 128), (80, 64))),
    flops=_dynamic_filter_flops,
)

PREDICTED_DYNAMIC_FILTER = OpSpec(
    name="predicted_dynamic_filter",
    family="dynamic_filter",
    shapes=_predicted_shapes,
    maps=("x", "features"),
    output_shape=lambda case: _predicted_shapes(case)["x"],
    cases=(
        _case(1, 1, 1, 1, features=1, bias=0),
        _case(1, 2, 3, 4, 7, features=3, bias=1),
        _case(2, 3, 5, 7, 1, features=4, bias=2),
        _case(2, 7, 6, 9, 3, residual=True, features=7, bias=1),
        _case(2, 20, 17, 33, 3, residual=True, features=20, bias=2),
        _case(2, 3, 9, 11, 5, features=5, bias=1),
        _case(0, 3, 4, 4, features=3, bias=2),
        _case(1, 40, 24, 20, 3, residual=True, features=40, bias=2),
        _case(1, 80, 16, 16, 3, residual=True, features=80, bias=1),
    ),
    typical=_case(2, 7, 6, 9, 3, residual=True, features=7, bias=1),
    random_sizes=_random_predicted,
    benchmark_cases=tuple(
        _case(2, c, s, s, residual=True, features=c, bias=2) for c, s in ((20, 256), (40, 128), (80, 64))
    ),
    flops=_predicted_flops,
)


def _random_window_attention(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    window_size = random.choice((1, 2, 3, 4, 5, 7, 8, 8, 8, 8, 16))
    shift = random.choice((0, window_size // 2, random.randrange(window_size)))
    heads = random.choice((1, 2, 3))
    head_size = random.choice((1, 5, 8, 12, 12, 16, 24, 33, 64)) if window_size < 16 else random.choice((3, 12, 16))
    sides = [side for side in range(1, 2 * window_size + 14) if _reflects(side, window_size, shift)]
    sizes = {
        "batch": random.choice((0, 1, 1, 2)),
        "channels": heads * head_size,
        "height": random.choice(sides),
        "width": random.choice(sides),
    }
    return sizes, {"num_heads": heads, "window_size": window_size, "shift": shift}


def _reflects(side: int, window_size: int, shift: int) -> bool:
    return max(padding(side, window_size, shift)) < side


def _window_attention_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w = (case.sizes[name] for name in ("batch", "channels", "height", "width"))
    rows = (2 * case.options["window_size"] - 1) ** 2
    return {"qk": (b, 2 * c, h, w), "v": (b, c, h, w), "bias_table": (rows, case.options["num_heads"])}


def _window_attention_flops(case: Case) -> tuple[int, int]:
    window_size, shift = case.options["window_size"], case.options["shift"]
    windows = case.sizes["batch"]
    for side in (case.sizes["height"], case.sizes["width"]):
        windows *= -(-(side + shift) // window_size)
    return _with_gradients(2 * 2 * windows * case.sizes["channels"] * window_size**4)  # scores, and values


def _attention(batch: int, heads: int, head_size: int, height: int, width: int, window_size=8, shift=0) -> Case:
    sizes = {"batch": batch, "channels": heads * head_size, "height": height, "width": width}
    return Case(sizes, {"num_heads": heads, "window_size": window_size, "shift": shift})


WINDOW_ATTENTION = OpSpec(
    name="window_attention",
    family="window_attention",
    shapes=_window_attention_shapes,
    maps=("qk", "v"),
    output_shape=lambda case: _window_attention_shapes(case)["v"],
    cases=(
        _attention(1, 1, 1, 1, 1, window_size=1),
        _attention(1, 1, 8, 3, 4, window_size=4),
        _attention(1, 2, 12, 5, 5),
        _attention(1, 2, 12, 7, 7, shift=4),  # padding shows some pixels eight times more
        _attention(2, 2, 12, 13, 22),
        _attention(1, 4, 12, 21, 16, shift=4),
        _attention(2, 3, 16, 9, 14, window_size=7, shift=3),
        _attention(1, 1, 24, 17, 19, window_size=16, shift=8),
        _attention(1, 1, 64, 11, 10, shift=3),
        _attention(0, 2, 12, 9, 8, shift=4),
    ),
    typical=_attention(2, 2, 12, 13, 18, shift=4),
    random_sizes=_random_window_attention,
    benchmark_cases=(
        *(
            _attention(2, heads, size, side, side, shift=shift)
            for shift in (4, 0)
            for heads, size, side in ((2, 12, 256), (4, 12, 128), (6, 16, 64))
        ),
    ),
    flops=_window_attention_flops,
)


class _AsSeen(torch.autograd.Function):
    """The value ``seen`` in place of ``part``, whose gradient goes to ``part``."""

    @staticmethod
    def forward(ctx, part, seen):
        return seen.to(part.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _amplitude_phase_as_seen(case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Formulas:
    """The reference from the spectrum that ``backend`` sees of ``x``, where the same amplitudes count as zero."""
    x = tensors["x"].detach()
    sizes = sizes_of(x, tensors["weight1"], tensors["output_weight"])
    chosen = choose(AMPLITUDE_PHASE_KERNELS, backend, x.device.type, x.dtype, sizes)
    if chosen == "reference":
        seen = reference.half_spectrum(x)
    else:
        seen = amplitude_phase_launchers(chosen).amplitude_phase_conv_spectrum(x)
    smallest = SMALLEST_AMPLITUDE[x.dtype]

    def formula(
        x: torch.Tensor, map_of_values: Callable[..., torch.Tensor] | None = None, **weights: torch.Tensor | None
    ) -> torch.Tensor:
        own = reference.half_spectrum(x)
        parts = (_AsSeen.apply(*pair) for pair in zip(own.unbind(-1), seen.to(x.device).unbind(-1), strict=True))
        more = {"size": x.shape[-2:], "map_of_values": map_of_values, "smallest": smallest}
        return amplitude_phase_conv_of_spectrum(*parts, **weights, **case.options, **more)

    def on_the_other_side(values, kernel1, bias1, kernel2, bias2, negative_slope):
        hidden = F.conv2d(values, kernel1, bias1)
        rounding = 8 * case.eps * F.conv2d(values.abs(), kernel1.abs(), bias1.abs())
        hidden = hidden * torch.where((hidden > 0) == (hidden.abs() > rounding), 1.0, negative_slope)
        return F.conv2d(hidden, kernel2, bias2)

    def with_rounded_sums(values, kernel1, bias1, kernel2, bias2, negative_slope):
        hidden = F.leaky_relu(F.conv2d(values, kernel1, bias1), negative_slope)
        rounding = case.eps / 2 * F.conv2d(hidden.abs(), kernel2.abs(), bias2.abs())
        return F.conv2d(hidden, kernel2, bias2) + rounding

    of_values = (on_the_other_side, with_rounded_sums) if case.options["mode"] == "phase" else (on_the_other_side,)
    return formula, *(partial(formula, map_of_values=rounded) for rounded in of_values)


def _amplitude_phase_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w, hidden, out = (case.sizes[n] for n in ("batch", "channels", "height", "width", "hidden", "out"))
    return {
        "x": (b, c, h, w),
        "weight1": (hidden, c),
        "bias1": (hidden,),
        "weight2": (c, hidden),
        "bias2": (c,),
        "output_weight": (out, 2 * c if case.sizes["skip"] else c) if out else None,
        "output_bias": (out,) if case.sizes["bias"] else None,
    }


def _amplitude_phase_output(case: Case) -> tuple[int, ...]:
    b, c, h, w = _amplitude_phase_shapes(case)["x"]
    return b, case.sizes["out"] or c, h, w


def _random_amplitude_phase(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    channels = random.choice((1, 3, 5, 8, 20, 20, 40, 80, 160))
    sides = (1, 2, 3, 4, 5, 7, 8, 11) if channels > 20 else (1, 2, 3, 5, 8, 12, 13, 16, 17, 20, 24, 31, 36)
    outputs = ((0, 0, 0), (0, 0, 0), (channels, 0, 0), (channels, 1, 1), (3, 1, 0), (22, 0, 1))
    sizes = {
        "batch": random.choice((0, 1, 1, 2, 3)),
        "channels": channels,
        "height": random.choice(sides),
        "width": random.choice(sides),
        "hidden": random.choice((1, 6, channels, channels)),
        **dict(zip(("out", "skip", "bias"), random.choice(outputs), strict=True)),
    }
    return sizes, {
        "mode": random.choice(("amplitude", "phase")),
        "negative_slope": random.choice((0.01, 0.1, 0.2)),  # not 0: gradients may then be 0 but for eager's rounding
    }


def _amplitude_phase_flops(case: Case) -> tuple[int, int]:
    c, h, w, hidden, skip = (case.sizes[name] for name in ("channels", "height", "width", "hidden", "skip"))
    out = _amplitude_phase_output(case)[1]
    bins = case.sizes["batch"] * h * (w // 2 + 1)
    transform = int(2.5 * _pixels(case) * log2(max(2, h * w)))  # of one channel
    # two layers of one part of the spectrum, one or two of both parts
    forward, backward = _with_gradients(4 * bins * c * (hidden + (1 + skip) * case.sizes["out"]))
    transforms = (c + out) * transform  # backward: their adjoints
    return forward + transforms, backward + transforms


def _spectral(
    batch: int,
    channels: int,
    height: int,
    width: int,
    hidden: int,
    out: int,
    mode: str = "amplitude",
    slope: float = 0.2,
    *,
    skip: int = 0,
    bias: int = 0,
) -> Case:
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "hidden": hidden, "out": out}
    return Case(sizes | {"skip": skip, "bias": bias}, {"mode": mode, "negative_slope": slope})


AMPLITUDE_PHASE_CONV = OpSpec(
    name="amplitude_phase_conv",
    family="amplitude_phase",
    shapes=_amplitude_phase_shapes,
    maps=("x",),
    output_shape=_amplitude_phase_output,
    cases=(
        _spectral(1, 1, 1, 1, 1, 0),
        _spectral(1, 3, 1, 2, 3, 0, "phase"),
        _spectral(1, 1, 1, 1, 1, 1, skip=1, bias=1),
        _spectral(2, 3, 2, 1, 4, 3, "phase"),
        _spectral(1, 5, 3, 4, 2, 7, bias=1),
        _spectral(2, 3, 4, 3, 3, 2, "phase", skip=1),
        _spectral(0, 3, 4, 4, 3, 3, "phase", skip=1, bias=1),
        _spectral(2, 20, 13, 11, 20, 20, skip=1, bias=1),
        _spectral(1, 20, 17, 23, 20, 20, "phase", 0.0),
        _spectral(2, 8, 24, 20, 11, 0, "phase"),
        _spectral(1, 3, 96, 80, 3, 3, "phase", skip=1, bias=1),
        _spectral(1, 160, 7, 6, 160, 160),
        _spectral(1, 160, 7, 6, 160, 160, "phase", skip=1, bias=1),
    ),
    typical=_spectral(2, 5, 6, 9, 7, 5, "phase", skip=1, bias=1),
    random_sizes=_random_amplitude_phase,
    benchmark_cases=tuple(
        _spectral(2, c, s, s, c, c, mode, skip=1, bias=1)
        for c, s in ((20, 256), (40, 128), (80, 64), (160, 32))
        for mode in ("amplitude", "phase")
    ),
    flops=_amplitude_phase_flops,
    only_added=("output_bias",),
    casts_like_convolution=False,
    as_seen=_amplitude_phase_as_seen,
)


def _random_mixing(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes = {
        "batch": random.choice((0, 1, 1, 2, 3)),
        "channels": random.choice((1, 3, 7, 16, 20, 24, 40, 48, 96)),
        "height": random.choice((3, 4, 5, 8, 13, 16, 17)),
        "width": random.choice((3, 5, 7, 8, 15, 16, 31, 33, 67)),
    }
    return sizes, {}


def _random_mlp(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes, options = _random_mixing(random)
    return sizes | {"hidden": random.choice((1, 5, 32, 48, 100))}, options


def _mlp_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w, hidden = (case.sizes[name] for name in ("batch", "channels", "height", "width", "hidden"))
    return {"x": (b, c, h, w), "weight1": (hidden, c), "bias1": (hidden,), "weight2": (c, hidden), "bias2": (c,)}


def _mixing_map(case: Case) -> tuple[int, ...]:
    return tuple(case.sizes[name] for name in ("batch", "channels", "height", "width"))


def _local_mixing_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    c = case.sizes["channels"]
    value = {"value_weight": (c, c), "value_bias": (c,)}
    return {"x": _mixing_map(case)} | value | _mixing_weights(c)


def _local_global_mixing_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c = case.sizes["batch"], case.sizes["channels"]
    maps = dict.fromkeys(("x", "value", "attended"), _mixing_map(case))
    return maps | _mixing_weights(c) | {"rescale": (b, c), "rebias": (b, c)}


def _mixing_weights(channels: int) -> dict[str, tuple[int, ...]]:
    weights = {"local_weight": (channels, LOCAL_SIZE, LOCAL_SIZE), "local_bias": (channels,)}
    return weights | {"proj_weight": (channels, channels), "proj_bias": (channels,)}


def _mlp_as_seen(case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Formulas:
    """The reference, whose ReLU may let through what is 0 within rounding, or not."""

    def formula(
        x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor,
        *, other_side: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if not other_side:
            return reference.pointwise_mlp(x, weight1, bias1, weight2, bias2)
        kernel = weight1[..., None, None]
        hidden = F.conv2d(x, kernel, bias1)
        rounding = 8 * case.eps * F.conv2d(x.abs(), kernel.abs(), bias1.abs())
        passes = (hidden > 0) != (hidden.abs() <= rounding)
        return x + F.conv2d(hidden * passes, weight2[..., None, None], bias2)

    return formula, partial(formula, other_side=True)


def _qkv_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    c = case.sizes["channels"]
    weights = {"norm_weight": (c,), "norm_bias": (c,), "value_weight": (c, c), "value_bias": (c,)}
    return {"x": _mixing_map(case)} | weights | {"query_key_weight": (2 * c, c), "query_key_bias": (2 * c,)}


def _qkv_output_shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    b, c, h, w = _mixing_map(case)
    return (b, c, h, w), (b, 2 * c, h, w), (b,), (b,)


def _qkv_of_absolute_values(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, value_weight: torch.Tensor,
    value_bias: torch.Tensor, query_key_weight: torch.Tensor, query_key_bias: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The reference with the absolute value of what the norm gives, whose derivative stays that of the norm."""
    standardized = torch.group_norm(x, 1, eps=NORM_EPS)
    standardized = standardized + (standardized.abs() - standardized).detach()
    normalized = standardized * norm_weight[:, None, None] + norm_bias[:, None, None]
    value = F.conv2d(normalized, value_weight[..., None, None], value_bias)
    query_key = F.conv2d(normalized, query_key_weight[..., None, None], query_key_bias)
    variance, mean = torch.var_mean(x, (1, 2, 3), correction=0)
    return value, query_key, mean, (variance + NORM_EPS).sqrt()


def _dense_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    c, growth = case.sizes["channels"], case.sizes["growth"]
    weights = {"dense_weight": (45 * growth * (c + 2 * growth),), "dense_bias": (5 * growth,)}
    return {"x": _mixing_map(case)} | weights | {"fuse_weight": (c, c + 5 * growth), "fuse_bias": (c,)}


def _dense_deviations(case: Case) -> dict[str, float]:
    c, growth = case.sizes["channels"], case.sizes["growth"]
    return {"dense_weight": (9 * (c + 2 * growth)) ** -0.5, "fuse_weight": (c + 5 * growth) ** -0.5}


def _random_dense(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes, options = _random_mixing(random)
    return sizes | {"channels": random.choice((1, 3, 7, 24)), "growth": random.choice((1, 4, 20, 32))}, options


def _dense_as_seen(case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Formulas:
    """The reference, whose ReLUs may let through what is 0 within rounding, or not."""

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options: int) -> torch.Tensor:
        sum_of_products = F.conv2d(x, weight, bias, **options)
        rounding = 8 * case.eps * F.conv2d(x.abs(), weight.abs(), bias.abs(), **options)
        return sum_of_products * ((sum_of_products > 0) != (sum_of_products.abs() <= rounding))

    def formula(
        x: torch.Tensor, dense_weight: torch.Tensor, dense_bias: torch.Tensor, fuse_weight: torch.Tensor,
        fuse_bias: torch.Tensor, *, other_side: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if not other_side:
            return reference.dense_block(x, dense_weight, dense_bias, fuse_weight, fuse_bias)
        features = x
        for weight, bias in dense_layers(x.shape[1], dense_weight, dense_bias):
            added = layer(features, weight, bias, padding=2, dilation=2)
            features = torch.cat([features, added], 1)
        return layer(features, fuse_weight[..., None, None], fuse_bias) + x

    return formula, partial(formula, other_side=True)


def _conv_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w = _mixing_map(case)
    joined, out = case.sizes["joined"], case.sizes["out"]
    maps = {"x": (b, c, h, w), "joined": (b, joined, h, w) if joined else None}
    return maps | {"weight": (out, c + joined, 3, 3), "scale": (out,), "shift": (out,)}


def _residual_shapes(case: Case) -> dict[str, tuple[int, ...] | None]:
    b, c, h, w = _mixing_map(case)
    joined, out = case.sizes["joined"], case.sizes["out"]
    maps = {"x": (b, c, h, w), "joined": (b, joined, h, w) if joined else None}
    weights = {"weight1": (out, c + joined, 3, 3), "bias1": (out,), "weight2": (out, out, 3, 3), "bias2": (out,)}
    return maps | weights | {"identity_weight": (out, c + joined), "identity_bias": (out,)}


def _random_residual(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes = {
        "batch": random.choice((0, 1, 1, 2, 3)),
        "channels": random.choice((1, 3, 10, 20, 20, 40)),
        "height": random.choice((1, 2, 3, 5, 8, 13, 16, 17)),
        "width": random.choice((1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 67)),
        "joined": random.choice((0, 0, 1, 20, 40)),
        "out": random.choice((1, 7, 20, 20, 40, 80)),
    }
    return sizes, {
        "identity_scale": random.choice((1.0, 1.0, 2.0, -0.5)),
        "negative_slope": random.choice((0.01, 0.1, 0.2)),  # not 0: gradients may then be 0 but for eager's rounding
    }


def _residual_as_seen(case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Formulas:
    """The reference, whose LeakyReLUs may have either slope at what is 0 within rounding."""

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        sum_of_products = F.conv2d(x, weight, bias, padding=1)
        rounding = 8 * case.eps * F.conv2d(x.abs(), weight.abs(), bias.abs(), padding=1)
        passes = (sum_of_products > 0) == (sum_of_products.abs() > rounding)
        return sum_of_products * torch.where(passes, 1.0, case.options["negative_slope"])

    def formula(
        x: torch.Tensor, joined: torch.Tensor | None, weight1: torch.Tensor, bias1: torch.Tensor,
        weight2: torch.Tensor, bias2: torch.Tensor, identity_weight: torch.Tensor, identity_bias: torch.Tensor,
        *, other_side: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if not other_side:
            weights = weight1, bias1, weight2, bias2, identity_weight, identity_bias
            return reference.residual_conv(x, joined, *weights, **case.options)
        maps = x if joined is None else torch.cat([x, joined], 1)
        residual = layer(layer(maps, weight1, bias1), weight2, bias2)
        identity = F.conv2d(maps, identity_weight[..., None, None], identity_bias)
        return residual + case.options["identity_scale"] * identity

    return formula, partial(formula, other_side=True)


def _conv_output(case: Case) -> tuple[int, ...]:
    batch, _, height, width = _mixing_map(case)
    return batch, case.sizes["out"], height, width


def _random_conv(random: Random) -> tuple[dict[str, int], dict[str, object]]:
    sizes, options = _random_mixing(random)
    sizes |= {"channels": random.choice((1, 3, 16, 24, 64)), "height": random.choice((1, 2, 3, 5, 8, 13))}
    return sizes | {"joined": random.choice((0, 0, 1, 16, 20)), "out": random.choice((1, 7, 16, 40, 64))}, options


def _conv_as_seen(case: Case, tensors: Mapping[str, torch.Tensor | None], backend: str | None) -> Formulas:
    """The reference, whose ReLU may let through what is 0 within rounding, or not."""

    def formula(
        x: torch.Tensor, joined: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
        *, other_side: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if not other_side:
            return reference.conv_relu(x, joined, weight, scale, shift)
        maps = x if joined is None else torch.cat([x, joined], 1)
        factor, summand = scale[:, None, None], shift[:, None, None]
        result = F.conv2d(maps, weight, padding=1) * factor + summand
        largest = F.conv2d(maps.abs(), weight.abs(), padding=1) * factor.abs() + summand.abs()
        return result * ((result > 0) != (result.abs() <= 8 * case.eps * largest))

    return formula, partial(formula, other_side=True)


def _mixed(batch: int, channels: int, height: int, width: int, **more: int) -> Case:
    return Case({"batch": batch, "channels": channels, "height": height, "width": width} | more, {})


def _residual(
    batch: int, channels: int, height: int, width: int, joined: int, out: int, identity_scale=1.0, negative_slope=0.2
) -> Case:
    sizes = _mixed(batch, channels, height, width, joined=joined, out=out).sizes
    return Case(sizes, {"identity_scale": identity_scale, "negative_slope": negative_slope})


POINTWISE_MLP = OpSpec(
    name="pointwise_mlp",
    family="feature_mixing",
    shapes=_mlp_shapes,
    maps=("x",),
    output_shape=_mixing_map,
    cases=(
        _mixed(1, 1, 1, 1, hidden=1),
        _mixed(2, 3, 1, 7, hidden=5),
        _mixed(0, 3, 4, 4, hidden=6),
        _mixed(2, 24, 17, 33, hidden=48),
        _mixed(1, 48, 13, 9, hidden=192),
        _mixed(1, 96, 4, 8, hidden=384),
        _mixed(1, 20, 40, 13, hidden=33),
    ),
    typical=_mixed(2, 7, 6, 9, hidden=11),
    random_sizes=_random_mlp,
    benchmark_cases=tuple(_mixed(2, c, s, s, hidden=r * c) for c, s, r in ((24, 256, 2), (48, 128, 4), (96, 64, 4))),
    flops=_convolutions(_mlp_shapes, "weight1", "weight2"),
    only_added=("bias2",),
    as_seen=_mlp_as_seen,
)

_MIXING_CASES = (
    _mixed(1, 1, 3, 3),
    _mixed(2, 3, 4, 5),
    _mixed(0, 3, 4, 4),
    _mixed(2, 7, 3, 70),
    _mixed(1, 24, 33, 67),
    _mixed(1, 48, 40, 19),
    _mixed(1, 96, 8, 8),
)
_MIXING_BENCHMARKS = tuple(_mixed(2, c, s, s) for c, s in ((24, 256), (48, 128), (96, 64)))

LOCAL_MIXING = OpSpec(
    name="local_mixing",
    family="feature_mixing",
    shapes=_local_mixing_shapes,
    maps=("x",),
    output_shape=_mixing_map,
    cases=_MIXING_CASES,
    typical=_mixed(2, 5, 6, 9),
    random_sizes=_random_mixing,
    benchmark_cases=_MIXING_BENCHMARKS,
    flops=_convolutions(_local_mixing_shapes, "value_weight", "local_weight", "proj_weight"),
    only_added=("proj_bias",),
)

LOCAL_GLOBAL_MIXING = OpSpec(
    name="local_global_mixing",
    family="feature_mixing",
    shapes=_local_global_mixing_shapes,
    maps=("value", "x", "attended"),  # the gradient of x is the incoming one, whatever the backend
    output_shape=_mixing_map,
    cases=_MIXING_CASES,
    typical=_mixed(2, 5, 6, 9),
    random_sizes=_random_mixing,
    benchmark_cases=_MIXING_BENCHMARKS,
    flops=_convolutions(_local_global_mixing_shapes, "local_weight", "proj_weight"),
    only_added=("x", "rebias"),
)

NORMALIZED_QKV = OpSpec(
    name="normalized_qkv",
    family="feature_mixing",
    shapes=_qkv_shapes,
    maps=("x",),
    output_shape=_qkv_output_shapes,
    cases=(
        _mixed(1, 1, 1, 3),
        _mixed(2, 3, 4, 5),
        _mixed(0, 3, 4, 4),
        _mixed(2, 24, 33, 67),
        _mixed(1, 48, 40, 19),
        _mixed(2, 96, 8, 8),
        _mixed(1, 20, 3, 70),
    ),
    typical=_mixed(2, 5, 6, 9),
    random_sizes=_random_mixing,
    benchmark_cases=_MIXING_BENCHMARKS,
    flops=_convolutions(_qkv_shapes, "value_weight", "query_key_weight"),
    only_added=("value_bias", "query_key_bias"),
    results=("value", "query_key", "mean", "deviation"),
    absolute=_qkv_of_absolute_values,
)

DENSE_BLOCK = OpSpec(
    name="dense_block",
    family="feature_mixing",
    shapes=_dense_shapes,
    maps=("x",),
    output_shape=_mixing_map,
    cases=(
        _mixed(1, 1, 1, 1, growth=1),
        _mixed(2, 3, 4, 5, growth=2),
        _mixed(0, 3, 4, 4, growth=3),
        _mixed(2, 3, 9, 17, growth=32),
        _mixed(1, 24, 5, 14, growth=32),
        _mixed(1, 7, 20, 3, growth=20),
    ),
    typical=_mixed(2, 3, 6, 9, growth=4),
    random_sizes=_random_dense,
    benchmark_cases=(_mixed(2, 3, 128, 128, growth=32), _mixed(2, 48, 64, 64, growth=32)),
    flops=_convolutions(_dense_shapes, "dense_weight", "fuse_weight"),
    deviations=_dense_deviations,
    as_seen=_dense_as_seen,
)

CONV_RELU = OpSpec(
    name="conv_relu",
    family="feature_mixing",
    shapes=_conv_shapes,
    maps=("x", "joined"),
    output_shape=_conv_output,
    cases=(
        _mixed(1, 1, 1, 1, joined=0, out=1),
        _mixed(2, 3, 4, 5, joined=2, out=4),
        _mixed(0, 3, 4, 4, joined=0, out=3),
        _mixed(2, 3, 9, 17, joined=0, out=64),
        _mixed(1, 20, 13, 30, joined=21, out=33),
        _mixed(1, 64, 24, 36, joined=64, out=48),
        _mixed(2, 256, 4, 4, joined=0, out=128),
        _mixed(2, 70, 7, 5, joined=67, out=72),
    ),
    typical=_mixed(2, 3, 6, 9, joined=5, out=4),
    random_sizes=_random_conv,
    benchmark_cases=(
        _mixed(2, 64, 128, 128, joined=64, out=64),
        _mixed(2, 256, 32, 32, joined=0, out=256),
        _mixed(2, 512, 16, 16, joined=0, out=512),
    ),
    flops=_convolutions(_conv_shapes, "weight"),
    as_seen=_conv_as_seen,
)

RESIDUAL_CONV = OpSpec(
    name="residual_conv",
    family="feature_mixing",
    shapes=_residual_shapes,
    maps=("x", "joined"),
    output_shape=_conv_output,
    cases=(
        _residual(1, 1, 1, 1, joined=0, out=1),
        _residual(2, 3, 2, 1, joined=0, out=2, identity_scale=2.0),
        _residual(2, 3, 4, 5, joined=2, out=4),
        _residual(0, 3, 4, 4, joined=0, out=3),
        _residual(2, 20, 17, 33, joined=0, out=20, negative_slope=0.0),
        _residual(1, 20, 13, 40, joined=20, out=20, identity_scale=2.0),
        _residual(2, 7, 3, 70, joined=5, out=33, identity_scale=-0.5),
        _residual(1, 3, 131, 9, joined=2, out=5),
        _residual(2, 10, 6, 32, joined=0, out=12),
        _residual(2, 40, 9, 8, joined=0, out=80),
        _residual(1, 80, 8, 6, joined=80, out=80),
        _residual(1, 80, 6, 7, joined=0, out=160),
    ),
    typical=_residual(2, 3, 6, 9, joined=2, out=4, identity_scale=2.0),
    random_sizes=_random_residual,
    benchmark_cases=(
        _residual(2, 20, 256, 256, joined=0, out=20),
        _residual(2, 20, 256, 256, joined=20, out=20),
        _residual(2, 40, 64, 64, joined=0, out=80),
        _residual(2, 80, 64, 64, joined=80, out=80),
        _residual(2, 80, 32, 32, joined=0, out=160),
    ),
    flops=_convolutions(_residual_shapes, "weight1", "weight2", "identity_weight"),
    only_added=("identity_bias",),
    decided=((False,), (True,)),  # whether the hidden map is kept
    as_seen=_residual_as_seen,
)

SPECS = (
    DYNAMIC_FILTER,
    PREDICTED_DYNAMIC_FILTER,
    AMPLITUDE_PHASE_CONV,
    WINDOW_ATTENTION,
    POINTWISE_MLP,
    LOCAL_MIXING,
    LOCAL_GLOBAL_MIXING,
    NORMALIZED_QKV,
    DENSE_BLOCK,
    CONV_RELU,
    RESIDUAL_CONV,
)
