"""Feature mixing in C++ on the CPU: tiles and their seams, threads, layouts, instruction sets, distant memory.

What holds for the compiled kernels of every operator is in test_kernels.py, on smaller maps.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from mitnet_fast import _C
from mitnet_fast.specs import SPECS, compare, outputs_and_gradients
from mitnet_fast.verify import poisoned_memory
from tests.ops.instruction_sets import assert_nothing_fails, every_narrower_set
from tests.ops.test_dynamic_filter_cpp import far_apart

OPERATORS = ("pointwise_mlp", "local_mixing", "local_global_mixing", "normalized_qkv", "dense_block", "residual_conv")
FAMILY = {spec.name: spec for spec in SPECS if spec.name in OPERATORS}
# Maps that are cut into several tiles, up and down and side by side, also where the last one is cut off;
# channels that fill no whole vector; batches whose samples share a group of weight sums.
SIZES = [
    {"batch": 1, "channels": 20, "height": 37, "width": 130},
    {"batch": 2, "channels": 3, "height": 70, "width": 33},
    {"batch": 1, "channels": 17, "height": 3, "width": 300},
    {"batch": 67, "channels": 2, "height": 6, "width": 7},
    {"batch": 2, "channels": 5, "height": 140, "width": 64},
    {"batch": 1, "channels": 4, "height": 131, "width": 600},
]
WIDTHS = range(1, 42)  # channels: every remainder of the blocks in which products and sums are computed
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
every_operator = pytest.mark.parametrize("name", FAMILY)


def case_of(name, sizes, dtype=torch.float32, layout="contiguous"):
    typical = FAMILY[name].typical
    return replace(typical, sizes=typical.sizes | sizes, dtype=dtype, layout=layout, seed=1)


def of_width(name, channels):
    """Small cases of so many channels, in every map that may have them."""
    sizes = {"batch": 1, "channels": channels, "height": 5, "width": 6}
    typical = FAMILY[name].typical.sizes
    if "out" not in typical:
        return [case_of(name, sizes)]
    return [case_of(name, sizes | {"out": channels, "joined": joined}) for joined in (0, typical["joined"])]


def failures(name, case):
    return [f"{name} {case}: {result}" for result in compare(FAMILY[name], case, "cpp") if not result.passed]


@every_operator
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tiles_fit_together(name, sizes):
    layouts = dict(zip(DTYPES, ("contiguous", "strided", "channels_last"), strict=True))
    with poisoned_memory():
        for dtype in DTYPES:
            assert not failures(name, case_of(name, sizes, dtype, layouts[dtype]))
        assert not failures(name, case_of(name, sizes, layout="channels_last"))


@every_operator
def test_any_number_of_channels(name):
    with poisoned_memory():
        for channels in WIDTHS:
            for case in of_width(name, channels):
                assert not failures(name, case)


def results(name, case, needs=None):
    spec = FAMILY[name]
    tensors = spec.inputs(case)
    gradient = spec.gradient(case, spec.uninitialized(case))
    return outputs_and_gradients(spec, case, tensors, gradient, "cpp", needs)


def differing(found, expected):
    return [tensor for tensor, value in found.items() if not torch.equal(value, expected[tensor])]


@every_operator
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_layouts_nor_on_what_else_is_asked(name, sizes):
    case = case_of(name, sizes)
    expected = results(name, case)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert not differing(results(name, case), expected), threads
    finally:
        torch.set_num_threads(before)
    for layout in ("channels_last", "strided"):
        assert not differing(results(name, case_of(name, sizes, layout=layout)), expected), layout
    arguments = FAMILY[name].shapes(case)
    with poisoned_memory():
        for wanted in arguments:
            alone = results(name, case, {argument: argument == wanted for argument in arguments})
            assert alone.keys() == {*FAMILY[name].results, f"grad_{wanted}"}
            assert not differing(alone, expected), wanted


ELSEWHERE = """
import torch
from mitnet_fast import _C
from mitnet_fast.verify import poisoned_memory
from tests.ops.test_feature_mixing_cpp import DTYPES, FAMILY, SIZES, WIDTHS, case_of, failures, of_width
torch.set_num_threads(1)
print(_C.cpu_capability())
with poisoned_memory():
    for name in FAMILY:
        for sizes, dtype in zip(SIZES, DTYPES):
            print(*failures(name, case_of(name, sizes, dtype, "channels_last")), sep="\\n", end="")
        for channels in WIDTHS:
            for case in of_width(name, channels):
                print(*failures(name, case), sep="\\n", end="")
"""


@every_narrower_set
def test_every_instruction_set_computes_the_same(wanted, narrower):
    assert_nothing_fails(ELSEWHERE, wanted, narrower)


@every_operator
def test_gradients_are_those_of_finite_differences(name):
    spec, case = FAMILY[name], case_of(name, {"batch": 2, "channels": 2, "height": 4, "width": 3}, torch.float64)
    tensors = spec.inputs(case)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *values: spec.run(case, dict(zip(tensors, values, strict=True)), "cpp"), leaves, fast_mode=True
    )


@every_operator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_gradient_has_the_layout_of_its_map(name, layout):
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    found = results(name, case_of(name, {"batch": 2, "channels": 3, "height": 5, "width": 6}, layout=layout))
    maps = (tensor for tensor in FAMILY[name].results if found[tensor].dim() == 4)
    for tensor in (*maps, *(f"grad_{argument}" for argument in FAMILY[name].maps)):
        assert found[tensor].is_contiguous(memory_format=formats[layout]), tensor


@every_operator
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(name, dimension):
    """Along one dimension, the third entry of every map lies beyond 2³¹ elements."""
    spec = FAMILY[name]
    sizes = {"batch": 3 if dimension == 0 else 1, "channels": 3 if dimension == 1 else 2, "height": 3, "width": 3}
    case = case_of(name, sizes, torch.bfloat16)
    tensors = spec.inputs(case)
    gradient = spec.gradient(case, spec.uninitialized(case))
    expected = outputs_and_gradients(spec, case, tensors, gradient, "cpp")
    far = {argument: far_apart(t, dimension) if argument in spec.maps else t for argument, t in tensors.items()}
    assert all(far[argument].stride(dimension) == 3 * 2**29 for argument in spec.maps)
    far_gradient = tree_map(lambda g: far_apart(g, dimension) if g.dim() == 4 else g, gradient)
    found = outputs_and_gradients(spec, case, far, far_gradient, "cpp")
    assert not differing(found, expected)


@every_operator
def test_bad_arguments_of_the_launchers_are_errors(name):
    """Each argument in turn with another shape or type, one too many channels in a map and float16."""
    spec, case = FAMILY[name], case_of(name, {"batch": 2, "channels": 3, "height": 5, "width": 6})
    good, options = spec.inputs(case), case.options
    forward, backward = (getattr(_C, f"{name}_{direction}") for direction in ("forward", "backward"))
    grads, needs = tree_leaves(spec.uninitialized(case)), [True] * len(good)
    kept = 2 * grads if name == "residual_conv" else []  # the result and the hidden map

    def refused(error, message, grads=grads, kept=kept, needs=needs, options=options, **change):
        with pytest.raises(error, match=message):
            backward(*grads, *kept, *(good | change).values(), *options.values(), needs)
        if change or options is not case.options:
            with pytest.raises(error, match=message):
                forward(*(good | change).values(), *options.values(), *FAMILY[name].decided[0])

    first, *others = good
    for argument in others:
        longer = torch.cat([good[argument], good[argument][:1]])
        refused(ValueError, "expected shape", **{argument: longer})
        refused(
            TypeError,
            f"{argument}: expected dtype Float as {first} has, got Double",
            **{argument: longer.double()[:-1]},
        )
    refused(ValueError, f"{first}: expected a dense tensor", **{first: good[first][0]})
    refused(TypeError, f"{first}: dtype Half is not supported, allowed: float32", **{first: good[first].half()})
    for place, grad in enumerate(grads):
        wrong = [*grads[:place], grad[..., 1:], *grads[place + 1 :]]
        refused(ValueError, r"grad\w*: expected shape", grads=wrong)
    refused(ValueError, f"needs: expected {len(good)} entries, got {len(good) + 1}", needs=[*needs, True])
    if kept:
        refused(ValueError, "y: expected shape", kept=[kept[0][:, 1:], kept[1]])
        refused(ValueError, "hidden: expected shape", kept=[kept[0], kept[1][:, 1:]])
    if "negative_slope" in options:
        refused(ValueError, r"negative_slope: .*\[0, 1\), got 1", options=options | {"negative_slope": 1.0})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_residual_gradients_are_the_same_from_a_kept_and_from_a_computed_hidden_map(sizes, dtype):
    case = case_of("residual_conv", sizes, dtype)
    tensors, options = FAMILY["residual_conv"].inputs(case).values(), case.options.values()
    y, none = _C.residual_conv_forward(*tensors, *options, False)
    again, hidden = _C.residual_conv_forward(*tensors, *options, True)
    assert none is None
    assert torch.equal(again, y)
    gradient = FAMILY["residual_conv"].gradient(case, y)
    needs = [True] * len(tensors)
    found = _C.residual_conv_backward(gradient, y, hidden, *tensors, *options, needs)
    expected = _C.residual_conv_backward(gradient, y, y.new_empty(0), *tensors, *options, needs)
    for actual, truth in zip(found, expected, strict=True):
        if dtype == torch.bfloat16:  # which a kept map is rounded to
            assert (actual - truth).norm() <= 8 * torch.finfo(dtype).eps * truth.norm()
        else:
            assert torch.equal(actual, truth)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_conv_relu_depends_neither_on_threads_nor_on_layouts(sizes):
    spec = next(spec for spec in SPECS if spec.name == "conv_relu")
    case = replace(spec.typical, sizes=spec.typical.sizes | sizes | {"out": 50})
    assert all(result.passed for result in compare(spec, case, "cpp"))
    expected = spec.run(case, spec.inputs(case), "cpp")
    before = torch.get_num_threads()
    try:
        for threads, layout in itertools.product((1, 2, 3), ("contiguous", "channels_last", "strided")):
            torch.set_num_threads(threads)
            tensors = spec.inputs(replace(case, layout=layout))
            tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
            assert torch.equal(spec.run(case, tensors, "cpp"), expected), (threads, layout)
    finally:
        torch.set_num_threads(before)
