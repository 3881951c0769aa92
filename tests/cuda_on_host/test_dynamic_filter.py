"""The CUDA kernels of the dynamic filter, run on a CPU, against the truth."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from mitnet_fast import reference
from mitnet_fast.specs import (
    DYNAMIC_FILTER,
    PREDICTED_DYNAMIC_FILTER,
    Case,
    OpSpec,
    allowed_error,
    outputs_and_gradients,
    relative_error,
)
from tests.cuda_on_host import Buffer, HostKernels, KernelFault, Order
from tests.cuda_on_host.harness import CSRC, HERE

SOURCES = (HERE / "dynamic_filter.cpp", *sorted((CSRC / "dynamic_filter").glob("*.cu")))
FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {FLOAT32: 0, BFLOAT16: 2, FLOAT16: 3}  # of the C++ enumeration
WORDS = {FLOAT32: torch.float32, BFLOAT16: torch.int16, FLOAT16: torch.int16}  # that numpy has a name for


@pytest.fixture(scope="module")
def kernels() -> Iterator[HostKernels]:
    with HostKernels(*SOURCES) as compiled:
        yield compiled


def buffer(tensor: torch.Tensor | None) -> Buffer | None:
    """The memory from the first to the last element of ``tensor``, shared with it."""
    if tensor is None or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Buffer(tensor.detach().as_strided((span,), (1,)).view(WORDS[tensor.dtype]).numpy())


def map_arguments(tensor: torch.Tensor | None) -> tuple[Buffer | None, np.ndarray]:
    return buffer(tensor), np.array((0,) * 4 if tensor is None else tensor.stride(), np.int64)


def unwritten(like: torch.Tensor | None, needed: bool = True) -> torch.Tensor | None:
    return torch.full_like(like, float("nan")) if needed and like is not None else None


def launch(
    kernels: HostKernels,
    case: Case,
    tensors: Mapping[str, torch.Tensor | None],
    gradient: torch.Tensor,
    needs: Mapping[str, bool] | None = None,
    tf32: bool = False,
    **order: int,
) -> dict[str, torch.Tensor]:
    """Result and gradients of the launchers, under the names that the specification gives them."""
    x = tensors["x"]
    needed = {name: tensor is not None and (needs or {}).get(name, True) for name, tensor in tensors.items()}
    sizes = [NUMBERS[case.dtype], case.sizes["kernel_size"], *x.shape, case.options["residual"]]
    results = {"y": unwritten(x)}
    results |= {f"grad_{name}": unwritten(tensors[name], needed[name]) for name in tensors}
    if "filters" in tensors:
        inputs = map_arguments(tensors["filters"])
        gradients = (*map_arguments(results["grad_x"]), *map_arguments(results["grad_filters"]))
        name = "dynamic_filter"
    else:
        bias = tensors["bias"]
        sizes += [tensors["features"].shape[1], bias is not None and bias.dim() == 2, tf32]
        inputs = (*map_arguments(tensors["features"]), buffer(tensors["weight"]), buffer(bias))
        gradients = (
            *map_arguments(results["grad_x"]),
            *map_arguments(results["grad_features"]),
            buffer(results["grad_weight"]),
            buffer(results["grad_bias"]),
        )
        name = "predicted_dynamic_filter"
    sizes = np.array(sizes, np.int64)
    kernels(f"{name}_forward", sizes, *map_arguments(x), *inputs, *map_arguments(results["y"]), **order)
    kernels(f"{name}_backward", sizes, *map_arguments(gradient), *map_arguments(x), *inputs, *gradients, **order)
    return {name: result for name, result in results.items() if result is not None}


def as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest value with 10 bits after the point, ties away from zero."""
    bits = tensor.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Convolution(torch.autograd.Function):
    """The 1×1 convolution as cuDNN does it in TF32: both factors rounded, sums in float32."""

    @staticmethod
    def forward(ctx, features, weight):
        ctx.save_for_backward(features, weight)
        return torch.einsum("of,bfhw->bohw", as_tf32(weight), as_tf32(features))

    @staticmethod
    def backward(ctx, grad):
        features, weight = map(as_tf32, ctx.saved_tensors)
        grad = as_tf32(grad)
        return torch.einsum("of,bohw->bfhw", weight, grad), torch.einsum("bohw,bfhw->of", grad, features)


def tf32_results(case, tensors, gradient, needs):
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_((needs or {}).get(name, True))
        for name, tensor in tensors.items()
    }
    filters = Tf32Convolution.apply(leaves["features"], leaves["weight"])
    if leaves["bias"] is not None:
        filters = filters + leaves["bias"].reshape(-1, filters.shape[1], 1, 1)
    y = reference.dynamic_filter(leaves["x"], filters, **case.options)
    if y.requires_grad:
        y.backward(gradient)
    return {"y": y.detach()} | {
        f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad
    }


def compared(
    kernels: HostKernels,
    spec: OpSpec,
    case: Case,
    needs: Mapping[str, bool] | None = None,
    tf32: bool = False,
    **order: int,
) -> dict[str, tuple[float, float, float]]:
    """Errors of every result: the kernels', plain PyTorch's, and what is allowed."""
    tensors = spec.inputs(case)
    gradient = spec.gradient(case, tensors["x"])

    def plain(change):
        changed = {name: None if tensor is None else change(tensor) for name, tensor in tensors.items()}
        return outputs_and_gradients(spec, case, changed, change(gradient), "reference", needs)

    truth, absolute = plain(lambda t: t.double()), plain(lambda t: t.double().abs())
    eager = tf32_results(case, tensors, gradient, needs) if tf32 else plain(lambda t: t)
    actual = launch(kernels, case, tensors, gradient, needs, tf32, **order)
    assert actual.keys() == truth.keys()
    return {
        name: (
            relative_error(actual[name], truth[name]),
            relative_error(eager[name], truth[name]),
            allowed_error(case.dtype, relative_error(eager[name], truth[name]), truth[name], absolute[name]),
        )
        for name in truth
    }


def failures(errors):
    return {name: values for name, values in errors.items() if not values[0] <= values[2]}


def case(batch, channels, height, width, kernel_size=3, dtype=FLOAT32, layout="contiguous", **more):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "kernel_size": kernel_size}
    return Case(sizes | more, {"residual": height % 2 == 1}, dtype, layout)


GIVEN = [
    case(1, 1, 1, 1, 7),
    case(1, 1, 1, 1, 1, BFLOAT16, "channels_last"),
    case(2, 3, 5, 33, 1, FLOAT16, "channels_last"),
    case(2, 7, 6, 9, 3, FLOAT16, "strided"),
    case(1, 20, 9, 35, 3, BFLOAT16, "channels_last"),
    case(1, 20, 5, 34),
    case(2, 3, 9, 11, 5, FLOAT32, "expanded"),
    case(1, 6, 5, 37, 5, BFLOAT16, "channels_last"),
    case(1, 5, 3, 34, 7, FLOAT16),
    case(0, 3, 4, 4),
]
PREDICTED = [
    case(1, 1, 1, 1, 3, features=1, bias=0),
    case(1, 1, 1, 1, 7, BFLOAT16, "channels_last", features=1, bias=2),
    case(2, 3, 5, 33, 1, FLOAT16, "channels_last", features=4, bias=2),
    case(2, 7, 6, 9, 3, FLOAT16, "strided", features=7, bias=1),
    case(2, 20, 5, 35, 3, BFLOAT16, "channels_last", features=20, bias=2),
    case(2, 20, 9, 33, 3, FLOAT32, "contiguous", features=20, bias=2),
    case(1, 20, 4, 7, 3, FLOAT32, "channels_last", features=25, bias=1),
    case(1, 41, 5, 6, 3, FLOAT32, "channels_last", features=42, bias=1),
    case(1, 41, 5, 6, 3, BFLOAT16, "contiguous", features=50, bias=2),
    case(5, 3, 3, 3, 3, FLOAT32, "expanded", features=5, bias=2),
    case(1, 3, 9, 8, 5, FLOAT32, "strided", features=26, bias=1),
    case(1, 26, 2, 3, 7, FLOAT32, "contiguous", features=3, bias=1),
    case(1, 2, 6, 34, 7, FLOAT16, "channels_last", features=3, bias=0),
    # a run of tiles ends within a sample, and where one ends
    case(15, 1, 9, 1, 7, BFLOAT16, "contiguous", features=1, bias=2),
    case(45, 1, 1, 1, 7, BFLOAT16, "contiguous", features=1, bias=1),
    case(0, 3, 4, 4, 3, FLOAT32, "contiguous", features=3, bias=2),
    case(0, 3, 4, 4, 3, BFLOAT16, "contiguous", features=3, bias=1),
]
CASES = [
    *(pytest.param(DYNAMIC_FILTER, chosen, False, id=str(chosen)) for chosen in GIVEN),
    *(
        pytest.param(PREDICTED_DYNAMIC_FILTER, chosen, tf32, id=f"{chosen} {'tf32' if tf32 else ''}")
        for chosen in PREDICTED
        for tf32 in ((False, True) if chosen.dtype == FLOAT32 else (False,))
    ),
]


@pytest.mark.parametrize(("spec", "chosen", "tf32"), CASES)
def test_result_and_gradients_equal_the_truth(kernels, spec, chosen, tf32):
    errors = compared(kernels, spec, chosen, tf32=tf32)
    assert not failures(errors)


def same_bits(results, expected):
    return results.keys() == expected.keys() and all(torch.equal(results[name], expected[name]) for name in results)


ORDERED = [
    (DYNAMIC_FILTER, case(2, 9, 5, 33, 3, BFLOAT16, "channels_last"), False),
    (DYNAMIC_FILTER, case(1, 5, 3, 34, 7), False),
    (PREDICTED_DYNAMIC_FILTER, case(2, 20, 5, 33, 3, FLOAT32, features=20, bias=2), True),
    (PREDICTED_DYNAMIC_FILTER, case(1, 41, 5, 6, 3, FLOAT32, features=25, bias=1), False),
    (PREDICTED_DYNAMIC_FILTER, case(2, 20, 5, 33, 3, FLOAT16, "channels_last", features=25, bias=2), False),
]


@pytest.mark.parametrize(("spec", "chosen", "tf32"), ORDERED, ids=lambda value: getattr(value, "name", str(value)))
def test_bits_depend_on_no_order_of_threads_or_blocks(kernels, spec, chosen, tf32):
    tensors = spec.inputs(chosen)
    arguments = chosen, tensors, spec.gradient(chosen, tensors["x"])
    expected = launch(kernels, *arguments, tf32=tf32)
    assert all(torch.isfinite(result).all() for result in expected.values())
    for order, seed in ((Order.REVERSE, 0), (Order.RANDOM, 1), (Order.RANDOM, 2)):
        assert same_bits(launch(kernels, *arguments, tf32=tf32, order=order, seed=seed), expected), order


@pytest.mark.parametrize("spec", [DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER], ids=lambda spec: spec.name)
def test_exactly_the_wanted_gradients_are_computed(kernels, spec):
    chosen = spec.typical
    tensors = spec.inputs(chosen)
    arguments = chosen, tensors, spec.gradient(chosen, tensors["x"])
    everything = launch(kernels, *arguments)
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        needs = dict(zip(tensors, wanted, strict=True))
        expected = {name: everything[name] for name in everything if needs.get(name.removeprefix("grad_"), True)}
        assert same_bits(launch(kernels, *arguments, needs=needs), expected), needs


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
@pytest.mark.parametrize("spec", [DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER], ids=lambda spec: spec.name)
def test_offsets_beyond_32_bits(kernels, spec, dimension):
    """Along one dimension, the third entry of every map lies beyond 2³¹ elements."""
    shape = [2, 2, 2, 2]
    shape[dimension] = 3
    for dtype, layout in ((BFLOAT16, "contiguous"), (FLOAT16, "channels_last")):
        chosen = case(*shape, 3, dtype, layout, features=3, bias=1)
        tensors = spec.inputs(chosen)
        arguments = chosen, tensors, spec.gradient(chosen, tensors["x"])
        expected = launch(kernels, *arguments)
        kernels("spread_maps", dimension)
        try:
            assert same_bits(launch(kernels, *arguments), expected), layout
        finally:
            kernels("spread_maps", -1)


def test_what_no_kernel_takes_is_an_error(kernels):
    x, sizes = torch.zeros(1, 1, 1, 1), np.array([1, 3, 1, 1, 1, 1, 0, 1, 0, 0], np.int64)
    maps = *map_arguments(x), *map_arguments(x), *map_arguments(x)
    with pytest.raises(KernelFault, match="dtype: allowed are float32, bfloat16 and float16"):
        kernels("dynamic_filter_forward", sizes, *maps)
    sizes[:2] = 0, 4
    with pytest.raises(KernelFault, match="kernel_size: allowed are 1, 3, 5 and 7"):
        kernels("dynamic_filter_forward", sizes, *maps)
    sizes[1], sizes[5] = 3, 2**40
    with pytest.raises(KernelFault, match="is more than CUDA kernels take"):
        kernels("dynamic_filter_forward", sizes, *maps)


def work(chosen: Case) -> int:
    """About what the emulation of ``chosen`` costs: taps of the tiles' filters, times features."""
    sizes = chosen.sizes
    tiles = sizes["batch"] * -(-sizes["height"] // 4) * -(-sizes["width"] // 32)
    return tiles * sizes["channels"] * sizes["kernel_size"] ** 2 * sizes.get("features", 10)


def sweep(kernels, spec, cases, most_work):
    ratios = []
    chosen = (spec.random_case(seed, DTYPES) for seed in itertools.count())
    for one in itertools.islice((one for one in chosen if work(one) <= most_work), cases):
        tf32 = spec is PREDICTED_DYNAMIC_FILTER and one.dtype == FLOAT32 and one.seed % 2 == 0
        errors = compared(kernels, spec, one, tf32=tf32, order=Order.RANDOM, seed=one.seed)
        assert not failures(errors), f"{one} {tf32}: {failures(errors)}"
        ratios += [error / eager for error, eager, _ in errors.values() if eager]
    assert statistics.median(ratios) <= 1.5


@pytest.mark.parametrize("spec", [DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER], ids=lambda spec: spec.name)
def test_random_cases_equal_the_truth(kernels, spec):
    sweep(kernels, spec, 10, 10_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("spec", [DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER], ids=lambda spec: spec.name)
def test_many_random_cases_equal_the_truth(kernels, spec):
    sweep(kernels, spec, 150, 200_000)


@pytest.mark.exhaustive
def test_sanitizers_find_nothing():
    with HostKernels(*SOURCES, sanitize=True, timeout=900) as kernels:
        for spec, chosen, tf32 in (parameters.values for parameters in CASES):
            assert not failures(compared(kernels, spec, chosen, tf32=tf32)), chosen


PREDICTED_KERNELS = "dynamic_filter/predicted_dynamic_filter_kernels.cuh"
FAULTS = {
    "a barrier is missing": (PREDICTED_KERNELS, "    if (chunk > 0) __syncthreads();\n", ""),
    "taps are not mirrored": (PREDICTED_KERNELS, "transposed ? K * K - 1 - offset : offset", "offset"),
    "the bias is added for every chunk": (PREDICTED_KERNELS, "step == 0 && chunk == 0", "step == 0"),
    "a row of bias sums is not written": (
        PREDICTED_KERNELS,
        "ends_sample && ends_run && tile + 1",
        "false && tile + 1",
    ),
    "offsets have 32 bits": (
        "common/map_tile.cuh",
        "data + n * stride_n + c * stride_c",
        "data + static_cast<int>(n * stride_n + c * stride_c)",
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    name, old, new = FAULTS[fault]
    with HostKernels(*SOURCES, replace={name: [(old, new)]}) as kernels:
        if "32 bits" in fault:
            with pytest.raises((AssertionError, KernelFault)):
                test_offsets_beyond_32_bits(kernels, PREDICTED_DYNAMIC_FILTER, 0)
            return
        orders = [{"order": order} for order in Order]
        assert any(
            failures(compared(kernels, spec, chosen, tf32=tf32, **order))
            for order in orders
            for spec, chosen, tf32 in (parameters.values for parameters in CASES)
            if spec is PREDICTED_DYNAMIC_FILTER
        )
