"""The Triton kernels of 3×3 convolutions against the truth, and what they may read and write."""

import statistics
from functools import partial

import pytest
import torch
from mitnet_fast.triton_kernels import convolution as launchers
from mitnet_fast.triton_kernels._common import MAX_PIXELS, record_launches

from mitnet_fast import reference
from mitnet_fast.specs import CONV_RELU, DENSE_BLOCK, RESIDUAL_CONV, Case, compare
from mitnet_fast.verify import poisoned_memory

from .maps import inside_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, BFLOAT16, FLOAT16 = DTYPES


def case(batch, channels, height, width, dtype=FLOAT32, layout="contiguous", options=(), **more):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    return Case(sizes | more, dict(options), dtype, layout)


def residual(*sizes, scale=1.0, slope=0.2, **more):
    return case(*sizes, options={"identity_scale": scale, "negative_slope": slope}, **more)


# together, for every operator: every dtype and layout, one pixel, several tiles of either kind, one map and two; blocks
# of channels, groups of outputs
CASES = [
    (
        CONV_RELU,
        [
            case(1, 1, 1, 1, joined=0, out=1),
            case(2, 3, 4, 5, BFLOAT16, "channels_last", joined=2, out=4),
            case(2, 3, 9, 17, FLOAT16, "strided", joined=0, out=35),
            case(1, 20, 5, 7, FLOAT32, "channels_last", joined=17, out=18),
            case(2, 2, 13, 31, FLOAT32, "expanded", joined=3, out=3),
            case(0, 3, 4, 4, joined=0, out=3),
        ],
    ),
    (
        DENSE_BLOCK,
        [
            case(1, 1, 1, 1, growth=1),
            case(1, 3, 4, 5, BFLOAT16, "channels_last", growth=8),
            case(1, 17, 5, 3, FLOAT32, "strided", growth=5),
            case(2, 3, 7, 6, FLOAT16, "expanded", growth=4),
            case(1, 2, 11, 27, FLOAT32, "channels_last", growth=2),
            case(0, 3, 4, 4, growth=3),
        ],
    ),
    (
        RESIDUAL_CONV,
        [
            residual(1, 1, 1, 1, joined=0, out=1),
            residual(2, 3, 4, 5, dtype=BFLOAT16, layout="channels_last", joined=2, out=4),
            residual(2, 3, 7, 9, dtype=FLOAT16, layout="strided", joined=0, out=5, scale=2.0),
            residual(1, 17, 4, 6, joined=3, out=18, slope=0.0),
            residual(2, 2, 3, 2, layout="expanded", joined=1, out=3, scale=0.5),
            residual(1, 2, 11, 27, layout="channels_last", joined=3, out=2),
            residual(0, 3, 4, 4, joined=0, out=3),
        ],
    ),
]


def assert_equal_to_the_truth(spec, cases):
    """Every tensor within its tolerance, and in the middle as near as plain PyTorch."""
    ratios = []
    with poisoned_memory():
        for chosen in cases:
            results = compare(spec, chosen, "triton", DEVICE)
            assert len(results) == 1 + sum(shape is not None for shape in spec.shapes(chosen).values())
            assert all(result.passed for result in results), f"{chosen}: {results}"
            ratios += [result.ratio for result in results if result.eager_error]
    assert statistics.median(ratios) <= 1.5


@pytest.mark.parametrize(("spec", "cases"), CASES, ids=[spec.name for spec, _ in CASES])
def test_results_and_gradients_equal_the_truth(spec, cases):
    assert_equal_to_the_truth(spec, cases)


@pytest.mark.exhaustive
@pytest.mark.parametrize("spec", [spec for spec, _ in CASES], ids=lambda spec: spec.name)
def test_random_cases_equal_the_truth(spec):
    seeds = range(1000 if DEVICE == "cuda" else 20)
    assert_equal_to_the_truth(spec, [spec.random_case(seed, DTYPES) for seed in seeds])


def arguments(spec, chosen):
    """Incoming gradient, then the tensors and the options of the forward."""
    gradient = spec.gradient(chosen, spec.uninitialized(chosen, DEVICE))
    options = (chosen.options[name] for name in ("identity_scale", "negative_slope") if name in chosen.options)
    return gradient, *spec.inputs(chosen, DEVICE).values(), *options


def residual_backward(grad, *call, keeps=True):
    """All of the backward of residual_conv, behind a forward that has kept what lies between or not."""
    *forward, _, tf32 = call
    y, hidden = launchers.residual_conv_forward(*forward, keeps, tf32)
    return launchers.residual_conv_backward(grad, y, grad.new_empty(0) if hidden is None else hidden, *call)


BACKWARD = [
    (launchers.dense_block_backward, DENSE_BLOCK, case(1, 1, 2, 3, growth=1)),
    (residual_backward, RESIDUAL_CONV, residual(1, 2, 2, 3, joined=1, out=2)),
    (partial(residual_backward, keeps=False), RESIDUAL_CONV, residual(1, 2, 2, 3, joined=0, out=2)),
]


@pytest.mark.parametrize(("backward", "spec", "chosen"), BACKWARD, ids=lambda value: getattr(value, "name", None))
def test_exactly_the_wanted_gradients_are_computed(backward, spec, chosen):
    call = arguments(spec, chosen)
    there = [shape is not None for shape in spec.shapes(chosen).values()]
    everything = backward(*call, there, False)
    one_each = [[place == i for i in range(len(there))] for place in range(len(there) + 1)]  # the last is none at all
    for wanted in one_each:
        needs = [needed and present for needed, present in zip(wanted, there, strict=True)]
        for gradient, expected, needed in zip(backward(*call, needs, False), everything, needs, strict=True):
            assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_kept_is_what_would_be_computed_again(layout):
    grad, *call = arguments(RESIDUAL_CONV, residual(2, 3, 4, 5, layout=layout, joined=2, out=4))
    kept = residual_backward(grad, *call, [True] * 8, False)
    computed = residual_backward(grad, *call, [True] * 8, False, keeps=False)
    for gradient, expected in zip(kept, computed, strict=True):
        assert torch.equal(gradient, expected)


def test_a_partial_sum_of_weights_may_have_several_samples():
    grad, x, joined, *rest = arguments(RESIDUAL_CONV, residual(9, 2, 3, 2, joined=1, out=3, scale=0.5))
    with poisoned_memory():
        needs = [False] * 6 + [True] * 2
        *_, weight, bias = residual_backward(grad, x, joined, *rest, needs, False)
    torch.testing.assert_close(weight, 0.5 * torch.einsum("bohw,bchw->oc", grad, torch.cat([x, joined], 1)))
    torch.testing.assert_close(bias, 0.5 * grad.sum((0, 2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_are_read_in_place_and_nothing_around_them(layout):
    grad, x, joined, *rest = arguments(RESIDUAL_CONV, residual(2, 3, 3, 4, joined=2, out=3))
    maps = [inside_nan(tensor, layout) for tensor in (grad, x, joined)]
    with record_launches() as launches:
        launchers.residual_conv_forward(*maps[1:], *rest, False, False)
    read = [argument.data_ptr() for argument in launches[0].arguments[:2]]
    assert read == [tensor.data_ptr() for tensor in maps[1:]]
    actual = residual_backward(*maps, *rest, [True] * 8, False)
    expected = residual_backward(grad, x, joined, *rest, [True] * 8, False)
    for gradient, near in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, near)


def test_layers_of_a_dense_block_lie_side_by_side():
    """Each layer writes where the next ones read: nothing is concatenated."""
    chosen = case(1, 3, 4, 5, growth=2)
    _, *tensors = arguments(DENSE_BLOCK, chosen)
    with record_launches() as launches:
        launchers.dense_block_forward(*tensors, False)
    *layers, fusion = (dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) for launch in launches)
    first = layers[0]["y_ptr"].data_ptr()
    assert [layer["y_ptr"].data_ptr() - first for layer in layers] == [8 * number for number in range(5)]
    assert {layer["x_ptr"].data_ptr() for layer in (*layers, fusion)} == {tensors[0].data_ptr()}
    assert layers[0]["joined_ptr"] is None
    assert {layer["joined_ptr"].data_ptr() for layer in (*layers[1:], fusion)} == {first}


def test_weights_of_any_strides():
    _, x, joined, weight, scale, shift = arguments(CONV_RELU, CONV_RELU.typical)
    strided = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), scale[:1].expand(4), shift.repeat(2)[::2]
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = launchers.conv_relu_forward(x, joined, *strided, False)
    contiguous = (tensor.contiguous() for tensor in strided)
    assert torch.equal(actual, launchers.conv_relu_forward(x, joined, *contiguous, False))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's library
def test_what_is_not_finite_stays_visible():
    x = torch.zeros(1, 1, 5, 7, device=DEVICE)
    x[0, 0, 1, 1], x[0, 0, 3, 5] = float("nan"), float("-inf")
    one = torch.ones(1, device=DEVICE)
    tensors = x, None, torch.ones(1, 1, 3, 3, device=DEVICE), one, one
    y = launchers.conv_relu_forward(*tensors, False)
    torch.testing.assert_close(y, reference.conv_relu(*tensors), equal_nan=True)
    assert y.isnan().sum() == 9  # and 9 of −∞ are 0


def test_offsets_reach_beyond_two_to_the_31():
    grad, x, joined, *rest = arguments(RESIDUAL_CONV, residual(1, 3, 2, 3, dtype=BFLOAT16, joined=3, out=3))
    far = 2**30 + 64  # elements between channels; pages that nobody touches take no memory
    storage = torch.empty(2 * far + 64, dtype=BFLOAT16, device=DEVICE)

    def spread(tensor, start):
        return storage[start:].as_strided(tensor.shape, (0, far, 3, 1)).copy_(tensor)

    distant = [spread(tensor, 16 * place) for place, tensor in enumerate((grad, x, joined))]
    near = residual_backward(grad, x, joined, *rest, [True] * 8, False)
    for gradient, expected in zip(residual_backward(*distant, *rest, [True] * 8, False), near, strict=True):
        assert torch.equal(gradient, expected)
    near, hidden = launchers.residual_conv_forward(x, joined, *rest, True, False)
    for actual, expected in zip(
        launchers.residual_conv_forward(*distant[1:], *rest, True, False), (near, hidden), strict=True
    ):
        assert torch.equal(actual, expected)


def on_meta(spec, chosen):
    return [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments(spec, chosen)]


def test_more_pixels_than_the_kernels_can_count_are_refused():
    x = torch.empty(1, 1, 2, MAX_PIXELS // 2 + 1, device="meta")
    message = rf"x: .* at most {MAX_PIXELS} pixels per image, got 2×{x.shape[3]}"
    _, _, _, *conv = on_meta(CONV_RELU, case(1, 1, 1, 1, joined=0, out=1))
    _, _, *dense = on_meta(DENSE_BLOCK, case(1, 1, 1, 1, growth=1))
    _, _, _, *blocks = on_meta(RESIDUAL_CONV, residual(1, 1, 1, 1, joined=0, out=1))
    for call in (
        lambda: launchers.conv_relu_forward(x, None, *conv, False),
        lambda: launchers.dense_block_forward(x, *dense, False),
        lambda: launchers.dense_block_backward(x, x, *dense, [True] * 5, False),
        lambda: launchers.residual_conv_forward(x, None, *blocks, False, False),
        lambda: launchers.residual_conv_backward(x, x, x, x, None, *blocks, [True, False, *[True] * 6], False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("side", "pixels"), [(256, 128), (128, 64), (80, 32), (8, 16)])
def test_small_maps_are_divided_among_more_programs(side, pixels):
    _, *tensors = on_meta(DENSE_BLOCK, case(2, 3, side, side, BFLOAT16, growth=32))
    with record_launches() as launches:
        launchers.dense_block_forward(*tensors, False)
    assert {launch.constants["BLOCK_P"] for launch in launches} == {pixels}


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [(FLOAT32, True, "tf32"), (FLOAT32, False, "ieee"), (BFLOAT16, True, "ieee"), (FLOAT16, False, "ieee")],
)
def test_tf32_is_used_for_float32_where_it_is_allowed(dtype, tf32, expected):
    grad, *tensors = on_meta(DENSE_BLOCK, case(1, 3, 8, 8, dtype, growth=4))
    with record_launches("default") as launches:
        launchers.dense_block_forward(*tensors, tf32)
        launchers.dense_block_backward(grad, *tensors, [True] * 5, tf32)
    assert [launch.constants["PRECISION"] for launch in launches] == [expected] * (6 + 6 + 6 + 7)
