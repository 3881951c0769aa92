"""Window attention in C++ on the CPU: tiles and their seams, threads, instruction sets, extreme scores, memory.

What holds for the compiled kernels of every operator is in test_kernels.py, on smaller maps.
"""

import itertools

import pytest
import torch

from mitnet_fast import _C, ops
from mitnet_fast.reference.window_attention import padding
from mitnet_fast.specs import WINDOW_ATTENTION, Case, allowed_error, compare, outputs_and_gradients, relative_error
from mitnet_fast.verify import poisoned_memory
from tests.ops.instruction_sets import assert_nothing_fails, every_narrower_set
from tests.ops.memory import highest_held

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def case_of(batch, heads, head_size, height, width, window_size, shift, seed=0):
    sizes = {"batch": batch, "channels": heads * head_size, "height": height, "width": width}
    return Case(sizes, {"num_heads": heads, "window_size": window_size, "shift": shift}, seed=seed)


# Maps that are cut into several tiles, up and down and side by side, with and without padding on every side;
# windows that fill no whole vector; more tiles than groups whose table gradients are summed apart.
CASES = [
    case_of(1, 2, 12, 40, 299, 8, 4, seed=1),
    case_of(2, 1, 8, 33, 264, 8, 0, seed=2),
    case_of(1, 3, 5, 31, 143, 7, 3, seed=3),
    case_of(1, 1, 20, 22, 150, 4, 2, seed=4),
    case_of(1, 1, 12, 70, 50, 16, 8, seed=5),
    case_of(2, 2, 3, 100, 7, 3, 1, seed=6),
    case_of(40, 1, 4, 17, 18, 4, 3, seed=7),
    case_of(1, 1, 64, 18, 50, 8, 7, seed=8),
    case_of(1, 1, 64, 20, 40, 16, 8, seed=9),  # in float64, two windows alone fill the second-level cache
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def variant(case, dtype, layout):
    return Case(case.sizes, case.options, dtype, layout, case.seed)


def failures(case):
    return [f"{case}: {result}" for result in compare(WINDOW_ATTENTION, case, "cpp") if not result.passed]


@every_case
def test_tiles_fit_together(case):
    layouts = dict(zip(DTYPES, ("contiguous", "strided", "channels_last"), strict=True))
    with poisoned_memory():
        for dtype in DTYPES:
            assert not failures(variant(case, dtype, layouts[dtype]))
        assert not failures(variant(case, torch.float32, "channels_last"))


@pytest.mark.parametrize("window_size", [4, 7, 8])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_size_from_the_smallest_that_reflection_allows(window_size, shifted):
    shift = window_size // 2 if shifted else 0
    sides = [side for side in range(1, 2 * window_size + 2) if max(padding(side, window_size, shift)) < side]
    assert sides[0] <= window_size
    with poisoned_memory():
        for side in sides:
            for size in ((side, sides[0]), (sides[1], side)):
                case = case_of(1, 2, 3, *size, window_size, shift)
                assert not failures(variant(case, torch.float64, "contiguous"))


@pytest.mark.parametrize("head_size", [8, 12, 16, 20, 24, 32, 40, 48, 64])
def test_every_head_size(head_size):
    with poisoned_memory():
        assert not failures(variant(case_of(1, 2, head_size, 11, 9, 8, 4), torch.float32, "contiguous"))


def call(case, needs=(True,) * 3):
    """Result and gradients of the launchers themselves; a gradient that is not needed is None."""
    tensors = list(WINDOW_ATTENTION.inputs(case).values())
    gradient = WINDOW_ATTENTION.gradient(case, tensors[1])
    options = (*case.options.values(), False)
    y = _C.window_attention_forward(*tensors, *options)
    return y, *_C.window_attention_backward(gradient, *tensors, *options, *needs)


def same_bits(results, expected):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_case
def test_bits_depend_neither_on_threads_nor_on_layouts_nor_on_what_else_is_asked(case):
    before = torch.get_num_threads()
    expected = call(case)
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert same_bits(call(case), expected), threads
    finally:
        torch.set_num_threads(before)
    for layout in ("channels_last", "strided"):
        assert same_bits(call(variant(case, torch.float32, layout)), expected), layout
    with poisoned_memory():
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
            wanted = [expected[0], *(e if n else None for e, n in zip(expected[1:], needs, strict=True))]
            assert same_bits(call(case, needs), wanted), needs


ELSEWHERE = """
import torch
from mitnet_fast import _C
from mitnet_fast.verify import poisoned_memory
from tests.ops.test_window_attention_cpp import CASES, DTYPES, failures, variant
torch.set_num_threads(1)
print(_C.cpu_capability())
with poisoned_memory():
    for number, case in enumerate(CASES):
        for dtype in (torch.float32, DTYPES[1 + number % 2]):
            print(*failures(variant(case, dtype, "channels_last")), sep="\\n", end="")
"""


@every_narrower_set
def test_every_instruction_set_computes_the_same(wanted, narrower):
    assert_nothing_fails(ELSEWHERE, wanted, narrower)


def within_the_rule(tensors, gradient, case):
    """Result and gradients of given tensors, each with its error and what the rule allows."""

    def results(change, backend):
        changed = {name: change(tensor) for name, tensor in tensors.items()}
        return outputs_and_gradients(WINDOW_ATTENTION, case, changed, change(gradient), backend)

    truth = results(torch.Tensor.double, "reference")
    eager = results(torch.clone, "reference")
    absolute = results(lambda tensor: tensor.double().abs(), "reference")
    for name, actual in results(torch.clone, "cpp").items():
        eager_error = relative_error(eager[name], truth[name])
        allowed = allowed_error(case.dtype, eager_error, truth[name], absolute[name])
        assert relative_error(actual, truth[name]) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", [0.0, 1e4, -1e4])
def test_scores_of_ten_thousand(dtype, table):
    """Scores of ±10⁴, from the products and from the table: softmax chooses one key, or a few that are equal."""
    case = variant(case_of(1, 2, 12, 13, 10, 8, 4), dtype, "contiguous")
    tensors = WINDOW_ATTENTION.inputs(case)
    tensors["qk"] = tensors["qk"] * 60
    tensors["bias_table"] = tensors["bias_table"] + table * (torch.arange(225)[:, None] % 7 == 3).to(dtype)
    within_the_rule(tensors, WINDOW_ATTENTION.gradient(case, tensors["v"]), case)


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_scores_average_the_values(value):
    case = case_of(1, 2, 12, 16, 16, 8, 0)
    tensors = WINDOW_ATTENTION.inputs(case)
    qk, table = torch.zeros_like(tensors["qk"]), torch.full_like(tensors["bias_table"], value)
    y = ops.window_attention(qk, tensors["v"], table, **case.options, backend="cpp")
    mean = torch.nn.functional.avg_pool2d(tensors["v"].double(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert (y - mean).abs().max() < 64 * torch.finfo(torch.float32).eps


def test_a_value_that_is_not_finite_reaches_its_window_and_no_other():
    case = case_of(1, 1, 12, 24, 24, 8, 0)
    tensors = WINDOW_ATTENTION.inputs(case)
    tensors["qk"][0, 3, 10, 11] = float("nan")  # a query
    y = ops.window_attention(**tensors, **case.options, backend="cpp")
    assert y[0, :, 10, 11].isnan().all()
    tensors["v"][0, 5, 20, 20] = float("inf")
    y = ops.window_attention(**tensors, **case.options, backend="cpp")
    assert (~y.isfinite()).sum() == 12 + 64


@pytest.mark.parametrize("layouts", list(itertools.product(("contiguous", "channels_last"), repeat=2)), ids=" ".join)
def test_every_gradient_has_the_layout_of_its_map(layouts):
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    first, second = (formats[layout] for layout in layouts)
    qk = torch.randn(2, 8, 9, 10).contiguous(memory_format=first)
    v = torch.randn(2, 4, 9, 10).contiguous(memory_format=second)
    table, grad = torch.randn(225, 2), torch.randn(2, 4, 9, 10)
    assert _C.window_attention_forward(qk, v, table, 2, 8, 4, False).is_contiguous(memory_format=second)
    grads = _C.window_attention_backward(grad, qk, v, table, 2, 8, 4, False, True, True, True)
    assert grads[0].is_contiguous(memory_format=first)
    assert grads[1].is_contiguous(memory_format=second)
    assert grads[2].is_contiguous()


@pytest.mark.parametrize(("size", "shift"), [((7, 7), 4), ((5, 9), 0)])
def test_gradients_are_those_of_finite_differences(size, shift):
    torch.manual_seed(0)
    shapes = [(1, 8, *size), (1, 4, *size), (225, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.window_attention(*tensors, num_heads=2, shift=shift, backend="cpp"), inputs, fast_mode=True
    )


def test_memory_is_a_tenth_of_eager():
    """Peak above inputs and results, forward and backward."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 48, 128, 128), (2, 24, 128, 128), (225, 2))]
    gradient = torch.randn(2, 24, 128, 128)
    results = 4 * (gradient.numel() + sum(leaf.numel() for leaf in leaves))

    def call(backend):
        y = ops.window_attention(*leaves, num_heads=2, shift=4, backend=backend)
        kept = torch.autograd.grad(y, leaves, gradient)
        assert len(kept) == 3
        return kept

    def peak(backend):
        return highest_held(lambda: call(backend)) - results

    assert 0 < peak("cpp") <= peak("reference") / 10


MAP = torch.zeros(1, 4, 9, 10)
BAD = [
    ({"v": torch.zeros(4, 9, 10)}, ValueError, r"v: expected a dense tensor \[B, C, H, W\], got shape \[4, 9, 10\]"),
    ({"v": torch.zeros(1, 0, 9, 10)}, ValueError, "v: needs at least one channel and one pixel"),
    ({"v": MAP.half()}, TypeError, "qk: expected dtype Half as v has, got Float"),
    ({"qk": torch.zeros(1, 4, 9, 10)}, ValueError, r"qk: expected shape \[1, 8, 9, 10\], got \[1, 4, 9, 10\]"),
    ({"qk": torch.zeros(1, 8, 9, 10).double()}, TypeError, "qk: expected dtype Float as v has, got Double"),
    ({"bias_table": torch.zeros(64, 2)}, ValueError, r"bias_table: expected shape \[225, 2\], got \[64, 2\]"),
    ({"num_heads": 3}, ValueError, "num_heads: must divide the 4 channels of v, got 3"),
    ({"num_heads": 0}, ValueError, "num_heads: must divide the 4 channels of v, got 0"),
    ({"window_size": 0}, ValueError, "window_size: must be at least 1, got 0"),
    ({"shift": 8}, ValueError, "shift: must be at least 0 and below window_size = 8, got 8"),
    ({"shift": -1}, ValueError, "shift: must be at least 0 and below window_size = 8, got -1"),
    ({"grad": torch.zeros(1, 4, 9, 9)}, ValueError, r"grad: expected shape \[1, 4, 9, 10\], got \[1, 4, 9, 9\]"),
    (
        {"qk": torch.zeros(1, 8, 9, 4), "v": torch.zeros(1, 4, 9, 4), "grad": torch.zeros(1, 4, 9, 4)},
        ValueError,
        "v: width 4 is too small to be padded by reflection to whole windows, needs at least 5 pixels",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_of_the_launchers_are_errors(change, error, message):
    good = {"grad": MAP, "qk": torch.zeros(1, 8, 9, 10), "v": MAP, "bias_table": torch.zeros(225, 2)}
    good |= {"num_heads": 2, "window_size": 8, "shift": 0, "tf32": False}
    with pytest.raises(error, match=message):
        _C.window_attention_backward(**good | change, needs_qk=True, needs_v=True, needs_bias_table=True)
    if change.keys() != {"grad"}:
        with pytest.raises(error, match=message):
            _C.window_attention_forward(**{name: value for name, value in (good | change).items() if name != "grad"})


def test_float16_is_an_error():
    tensors = [tensor.half() for tensor in (torch.zeros(1, 8, 9, 10), MAP, torch.zeros(225, 2))]
    with pytest.raises(TypeError, match="v: dtype Half is not supported on cpu, allowed: float32, float64, bfloat16"):
        _C.window_attention_forward(*tensors, 2, 8, 0, False)


def far_apart(values, dim):
    """A copy of ``values`` with 2²⁹ elements, never touched, between the entries of dimension ``dim``."""
    strides = list(values.contiguous().stride())
    strides[dim] = 2**29
    storage = torch.empty((values.shape[dim] - 1) * strides[dim] + values.numel(), dtype=values.dtype)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(dim):
    """Along one dimension, the entries from the fifth on lie beyond 2³¹ elements."""
    torch.manual_seed(0)
    batch, size = (5, (5, 5)) if dim == 0 else (1, (5, 6))
    channels = 5 if dim == 1 else 2
    qk, v, grad = (torch.randn(batch, c, *size).bfloat16() for c in (2 * channels, channels, channels))
    options = (torch.randn(225, 1).bfloat16(), 1, 8, 0, False)
    far = [far_apart(tensor, dim) for tensor in (grad, qk, v)]
    expected = _C.window_attention_forward(qk, v, *options)
    assert torch.equal(_C.window_attention_forward(far[1], far[2], *options), expected)
    expected = _C.window_attention_backward(grad, qk, v, *options, True, True, True)
    assert same_bits(_C.window_attention_backward(*far, *options, True, True, True), expected)
