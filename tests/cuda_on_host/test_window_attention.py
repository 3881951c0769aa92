"""The CUDA kernels of window attention, run on a CPU, against the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mitnet_fast.specs import WINDOW_ATTENTION, Case, allowed_error, outputs_and_gradients, relative_error
from tests.cuda_on_host import Buffer, HostKernels, KernelFault, Order
from tests.cuda_on_host.harness import CSRC, HERE

SOURCES = (HERE / "window_attention.cpp", *sorted((CSRC / "window_attention").glob("*.cu")))
FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {FLOAT32: 0, BFLOAT16: 2, FLOAT16: 3}  # of the C++ enumeration
WORDS = {FLOAT32: torch.float32, BFLOAT16: torch.int16, FLOAT16: torch.int16}  # that numpy has a name for


@pytest.fixture(scope="module")
def kernels() -> Iterator[HostKernels]:
    with HostKernels(*SOURCES) as compiled:
        yield compiled


def case(batch, heads, head, height, width, window=8, shift=0, dtype=FLOAT32, layout="contiguous"):
    sizes = {"batch": batch, "channels": heads * head, "height": height, "width": width}
    return Case(sizes, {"num_heads": heads, "window_size": window, "shift": shift}, dtype, layout)


def buffer(tensor: torch.Tensor | None) -> Buffer | None:
    """The memory from the first to the last element of ``tensor``, shared with it."""
    if tensor is None or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Buffer(tensor.detach().as_strided((span,), (1,)).view(WORDS[tensor.dtype]).numpy())


def map_arguments(tensor: torch.Tensor | None) -> tuple[Buffer | None, np.ndarray]:
    return buffer(tensor), np.array((0,) * 4 if tensor is None else tensor.stride(), np.int64)


def launch(
    kernels: HostKernels,
    chosen: Case,
    tensors: Mapping[str, torch.Tensor],
    gradient: torch.Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    tf32: bool = False,
    **order: int,
) -> dict[str, torch.Tensor]:
    """Result and gradients of the launchers, under the names that the specification gives them."""
    qk, v, table = tensors.values()
    sizes = np.array([NUMBERS[v.dtype], *v.shape, *chosen.options.values(), tf32], np.int64)
    y = torch.full_like(v, float("nan"))
    gradients = [
        torch.full_like(tensor, float("nan")) if needed else None
        for tensor, needed in zip((qk, v, table), needs, strict=True)
    ]
    inputs = (*map_arguments(qk), *map_arguments(v), buffer(table))
    kernels("window_attention_forward", sizes, *inputs, *map_arguments(y), **order)
    results = (*map_arguments(gradients[0]), *map_arguments(gradients[1]), buffer(gradients[2]))
    kernels("window_attention_backward", sizes, *map_arguments(gradient), *inputs, *results, **order)
    named = dict(zip(("grad_qk", "grad_v", "grad_bias_table"), gradients, strict=True))
    return {"y": y} | {name: gradient for name, gradient in named.items() if gradient is not None}


def as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest value with 10 bits after the point, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Product(torch.autograd.Function):
    """A product of float32 matrices as tensor cores do it: both factors rounded, sums in float32."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return as_tf32(a) @ as_tf32(b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return as_tf32(grad) @ as_tf32(b).transpose(-1, -2), as_tf32(a).transpose(-1, -2) @ as_tf32(grad)


class Tf32(TorchFunctionMode):
    """Every product of matrices in TF32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            with torch._C.DisableTorchFunctionSubclass():
                return Tf32Product.apply(*args)
        return function(*args, **(kwargs or {}))


def check(kernels: HostKernels, chosen: Case, tf32: bool = False, **order: int) -> dict[str, torch.Tensor]:
    """Results of a launch, once they are within the rule."""
    tensors = WINDOW_ATTENTION.inputs(chosen)
    gradient = WINDOW_ATTENTION.gradient(chosen, tensors["v"])

    def formula(change):
        changed = {name: change(tensor) for name, tensor in tensors.items()}
        return outputs_and_gradients(WINDOW_ATTENTION, chosen, changed, change(gradient), "reference")

    truth, absolute = formula(torch.Tensor.double), formula(lambda tensor: tensor.double().abs())
    if tf32:
        with Tf32():
            eager = formula(lambda tensor: tensor)
    else:
        eager = formula(lambda tensor: tensor)
    dense = {name: tensor.contiguous() if chosen.layout == "strided" else tensor for name, tensor in tensors.items()}
    actual = launch(kernels, chosen, dense, gradient, tf32=tf32, **order)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        error, plain = relative_error(actual[name], expected), relative_error(eager[name], expected)
        allowed = max(4 * plain, 0 if tf32 else allowed_error(chosen.dtype, plain, expected, absolute[name]))
        assert error <= allowed, (name, error, plain)
    return actual


# together: every window and head size, dtype and layout, runs of several windows, several blocks, padding
# on every side
CASES = [
    case(1, 1, 1, 1, 1, 1),
    case(1, 2, 12, 5, 5, dtype=BFLOAT16),
    case(1, 1, 12, 7, 7, shift=4, dtype=FLOAT16),
    case(1, 2, 12, 13, 22, shift=4, dtype=BFLOAT16, layout="channels_last"),
    case(2, 1, 16, 9, 8, dtype=BFLOAT16, layout="strided"),
    case(1, 1, 12, 8, 13, shift=4),
    case(2, 1, 24, 6, 5, 4, 2, FLOAT16, "channels_last"),
    case(1, 1, 33, 6, 7, 4, 1, BFLOAT16, "expanded"),
    case(1, 1, 64, 8, 8, dtype=FLOAT16),
    case(1, 2, 8, 9, 11, 7, 3, BFLOAT16),
    case(1, 1, 12, 17, 16, 16, 8, BFLOAT16),
    case(1, 1, 3, 9, 8, 9, 0, FLOAT16),
]


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_result_and_gradients_equal_the_truth(kernels: HostKernels, chosen: Case) -> None:
    check(kernels, chosen)


@pytest.mark.parametrize(
    "chosen", [case(1, 1, 12, 7, 9, shift=4), case(1, 1, 33, 5, 6, 4, 1), case(1, 1, 8, 9, 9, 9)], ids=str
)
def test_tf32_is_as_exact_as_its_factors(kernels: HostKernels, chosen: Case) -> None:
    check(kernels, chosen, tf32=True)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_order_of_threads_and_blocks_does_not_matter(kernels: HostKernels, dtype: torch.dtype) -> None:
    chosen = case(1, 2, 12, 9, 8, shift=4, dtype=dtype)
    first = check(kernels, chosen)
    for order in (Order.REVERSE, Order.RANDOM):
        for name, result in check(kernels, chosen, order=order, seed=1).items():
            assert torch.equal(result, first[name])


def test_exactly_the_wanted_gradients_are_written(kernels: HostKernels) -> None:
    for chosen in (case(1, 1, 3, 5, 6, 4, 2, BFLOAT16), case(1, 1, 3, 9, 9, 9, 0, BFLOAT16)):
        tensors = WINDOW_ATTENTION.inputs(chosen)
        gradient = WINDOW_ATTENTION.gradient(chosen, tensors["v"])
        everything = launch(kernels, chosen, tensors, gradient)
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            for name, result in launch(kernels, chosen, tensors, gradient, needs).items():
                assert torch.equal(result, everything[name])


def test_large_logits_choose_one_key(kernels: HostKernels) -> None:
    chosen = case(1, 1, 8, 8, 8, dtype=BFLOAT16)
    tensors = WINDOW_ATTENTION.inputs(chosen)
    table = torch.full_like(tensors["bias_table"], -1e4)
    table[8 * 15 + 7] = 1e4  # the key above the query; there is none above the first row
    gradient = WINDOW_ATTENTION.gradient(chosen, tensors["v"]) * (torch.arange(8)[:, None] > 0)
    results = launch(kernels, chosen, tensors | {"bias_table": table}, gradient)
    torch.testing.assert_close(results["y"][:, :, 1:], tensors["v"][:, :, :-1])
    assert torch.isfinite(results["y"]).all()
    assert not results["grad_qk"].any()
    assert not results["grad_bias_table"].any()
    torch.testing.assert_close(results["grad_v"][:, :, :-1], gradient[:, :, 1:])


def test_no_samples_give_no_gradient(kernels: HostKernels) -> None:
    chosen = case(0, 2, 12, 9, 8, shift=4)
    tensors = WINDOW_ATTENTION.inputs(chosen)
    results = launch(kernels, chosen, tensors, torch.empty_like(tensors["v"]))
    assert not results["grad_bias_table"].any()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (case(1, 1, 1, 17, 17, 17), "window_size: CUDA kernels take at most 16"),
        (case(1, 1, 65, 4, 4, 4), "num_heads: CUDA kernels take at most 64 channels per head"),
    ],
    ids=["window", "head"],
)
def test_what_the_kernels_do_not_hold_is_refused(kernels: HostKernels, chosen: Case, message: str) -> None:
    tensors = WINDOW_ATTENTION.inputs(chosen)
    with pytest.raises(KernelFault, match=message):
        launch(kernels, chosen, tensors, tensors["v"])


@pytest.mark.exhaustive
def test_nothing_strays_under_sanitizers() -> None:
    with HostKernels(*SOURCES, sanitize=True) as kernels:
        for chosen in CASES:
            check(kernels, chosen)
            if chosen.dtype == FLOAT32:
                check(kernels, chosen, tf32=True)


@pytest.mark.exhaustive
def test_random_cases_equal_the_truth(kernels: HostKernels) -> None:
    for seed in range(60):
        chosen = WINDOW_ATTENTION.random_case(seed, (BFLOAT16, FLOAT16))
        check(kernels, replace(chosen, sizes={**chosen.sizes, "batch": 1}))
