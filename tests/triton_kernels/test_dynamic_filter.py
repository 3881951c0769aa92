"""The Triton kernels of the dynamic filter against the truth, and what they may read and write."""

import itertools
import statistics

import pytest
import torch
from mitnet_fast.triton_kernels import dynamic_filter as launchers
from mitnet_fast.triton_kernels._common import MAX_PIXELS, record_launches

from mitnet_fast.specs import DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER, Case, compare
from mitnet_fast.verify import poisoned_memory

from .maps import inside_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, BFLOAT16, FLOAT16 = DTYPES


def case(batch, channels, height, width, kernel_size=3, dtype=FLOAT32, layout="contiguous", **more):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "kernel_size": kernel_size}
    return Case(sizes | more, {"residual": height % 2 == 0}, dtype, layout)


# together: every K, dtype and layout, one pixel, several pixel tiles, channel groups and feature blocks,
# several samples per partial sum (batch 9), every kind of bias
CASES = [
    (DYNAMIC_FILTER, case(1, 1, 1, 1, 7)),
    (DYNAMIC_FILTER, case(2, 3, 5, 7, 1, BFLOAT16, "channels_last")),
    (DYNAMIC_FILTER, case(2, 7, 6, 9, 3, FLOAT16, "strided")),
    (DYNAMIC_FILTER, case(1, 18, 9, 31, 3, FLOAT32, "channels_last")),
    (DYNAMIC_FILTER, case(2, 2, 9, 11, 5, FLOAT16, "expanded")),
    (DYNAMIC_FILTER, case(1, 2, 12, 13, 7, BFLOAT16)),
    (DYNAMIC_FILTER, case(0, 3, 4, 4)),
    (PREDICTED_DYNAMIC_FILTER, case(1, 1, 1, 1, features=1, bias=0)),
    (PREDICTED_DYNAMIC_FILTER, case(2, 3, 5, 7, 1, FLOAT16, "channels_last", features=4, bias=2)),
    (PREDICTED_DYNAMIC_FILTER, case(2, 7, 6, 9, 3, BFLOAT16, "channels_last", features=5, bias=2)),
    (PREDICTED_DYNAMIC_FILTER, case(2, 3, 10, 53, 3, FLOAT32, "contiguous", features=4, bias=1)),
    (PREDICTED_DYNAMIC_FILTER, case(1, 20, 5, 6, 3, FLOAT32, "channels_last", features=20, bias=2)),
    (PREDICTED_DYNAMIC_FILTER, case(9, 2, 2, 3, 3, FLOAT32, "strided", features=3, bias=2)),
    (PREDICTED_DYNAMIC_FILTER, case(2, 3, 9, 8, 5, FLOAT16, "expanded", features=2, bias=1)),
    (PREDICTED_DYNAMIC_FILTER, case(1, 2, 6, 7, 7, BFLOAT16, "contiguous", features=3, bias=1)),
    (PREDICTED_DYNAMIC_FILTER, case(0, 3, 4, 4, 3, FLOAT32, "contiguous", features=3, bias=2)),
]


@pytest.mark.parametrize(("spec", "chosen"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_result_and_gradients_equal_the_truth(spec, chosen):
    with poisoned_memory():
        results = compare(spec, chosen, "triton", DEVICE)
    assert len(results) == 1 + sum(shape is not None for shape in spec.shapes(chosen).values())
    assert all(result.passed for result in results), results


@pytest.mark.exhaustive
@pytest.mark.parametrize("spec", [DYNAMIC_FILTER, PREDICTED_DYNAMIC_FILTER], ids=lambda spec: spec.name)
def test_random_cases_equal_the_truth(spec):
    ratios = []
    with poisoned_memory():
        for seed in range(1000 if DEVICE == "cuda" else 60):
            chosen = spec.random_case(seed, DTYPES)
            results = compare(spec, chosen, "triton", DEVICE)
            assert all(result.passed for result in results), f"{chosen}: {results}"
            ratios += [result.ratio for result in results if result.eager_error]
    assert statistics.median(ratios) <= 1.5


def predicted_arguments(chosen):
    tensors = PREDICTED_DYNAMIC_FILTER.inputs(chosen, DEVICE)
    return PREDICTED_DYNAMIC_FILTER.gradient(chosen, tensors["x"]), *tensors.values(), True, False


def test_exactly_the_wanted_gradients_are_computed():
    arguments = predicted_arguments(case(2, 2, 3, 4, features=3, bias=2))
    everything = launchers.predicted_dynamic_filter_backward(*arguments, True, True, True, True)
    for wanted in itertools.product((False, True), repeat=4):
        gradients = launchers.predicted_dynamic_filter_backward(*arguments, *wanted)
        for gradient, expected, needed in zip(gradients, everything, wanted, strict=True):
            assert torch.equal(gradient, expected) if needed else gradient is None
    grad, x, *_ = arguments
    filters = torch.randn(2, 18, 3, 4, device=DEVICE)
    both = launchers.dynamic_filter_backward(grad, x, filters, True, True, True)
    assert torch.equal(launchers.dynamic_filter_backward(grad, x, filters, True, True, False)[0], both[0])
    assert torch.equal(launchers.dynamic_filter_backward(grad, x, filters, True, False, True)[1], both[1])
    assert launchers.dynamic_filter_backward(grad, x, filters, True, False, False) == (None, None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_are_read_in_place_and_nothing_around_them(layout):
    grad, x, features, weight, bias, *options = predicted_arguments(case(2, 3, 5, 6, features=4, bias=1))
    filters = torch.randn(2, 27, 5, 6, device=DEVICE)
    maps = [inside_nan(tensor, layout) for tensor in (grad, x, features, filters)]
    with record_launches() as launches:
        launchers.dynamic_filter_forward(maps[1], maps[3], False)
    assert [argument.data_ptr() for argument in launches[0].arguments[:2]] == [maps[1].data_ptr(), maps[3].data_ptr()]
    forward = launchers.predicted_dynamic_filter_forward
    torch.testing.assert_close(
        forward(*maps[1:3], weight, bias, *options), forward(x, features, weight, bias, *options)
    )
    wanted = (True, True, True, True)
    backward = launchers.predicted_dynamic_filter_backward
    actual = backward(*maps[:3], weight, bias, *options, *wanted)
    for gradient, expected in zip(actual, backward(grad, x, features, weight, bias, *options, *wanted), strict=True):
        torch.testing.assert_close(gradient, expected)
    actual = launchers.dynamic_filter_backward(maps[0], maps[1], maps[3], True, True, True)
    for gradient, expected in zip(
        actual, launchers.dynamic_filter_backward(grad, x, filters, True, True, True), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_offsets_reach_beyond_two_to_the_31():
    grad, x, features, weight, bias, *options = predicted_arguments(
        case(1, 3, 4, 5, dtype=BFLOAT16, features=3, bias=1)
    )
    far = 2**30 + 64  # elements between channels; pages that nobody touches take no memory
    storage = torch.empty(2 * far + 64, dtype=BFLOAT16, device=DEVICE)

    def spread(tensor, start):
        result = storage[start:].as_strided(tensor.shape, (0, far, 5, 1))
        return result.copy_(tensor)

    far_x, far_features = spread(x, 0), spread(features, 32)
    forward = launchers.predicted_dynamic_filter_forward
    expected = forward(x, features, weight, bias, *options)
    assert torch.equal(forward(far_x, far_features, weight, bias, *options), expected)
    wanted = (True, True, True, True)
    backward = launchers.predicted_dynamic_filter_backward
    actual = backward(far_x, far_x, far_features, weight, bias, *options, *wanted)
    for gradient, near in zip(actual, backward(x, x, features, weight, bias, *options, *wanted), strict=True):
        assert torch.equal(gradient, near)
    filters = torch.randn(1, 27, 4, 5, device=DEVICE).to(BFLOAT16)
    near = launchers.dynamic_filter_backward(grad, x, filters, False, True, True)
    actual = launchers.dynamic_filter_backward(grad, far_x, filters, False, True, True)
    for gradient, expected in zip(actual, near, strict=True):
        assert torch.equal(gradient, expected)


def test_more_pixels_than_the_kernels_can_count_are_refused():
    x = torch.empty(1, 1, 2, MAX_PIXELS // 2 + 1, device="meta")
    arguments = x, x.expand(1, 9, -1, -1), torch.empty(9, 9, device="meta"), None, False, False
    for call in (
        lambda: launchers.dynamic_filter_forward(x, arguments[1], False),
        lambda: launchers.dynamic_filter_backward(x, x, arguments[1], False, False, True),
        lambda: launchers.predicted_dynamic_filter_forward(*arguments),
        lambda: launchers.predicted_dynamic_filter_backward(x, *arguments, False, True, False, False),
        lambda: launchers.predicted_dynamic_filter_backward(x, *arguments, False, False, True, False),
    ):
        with pytest.raises(ValueError, match=rf"x: .* at most {MAX_PIXELS} pixels per image, got 2×{x.shape[3]}"):
            call()


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [(FLOAT32, True, "tf32"), (FLOAT32, False, "ieee"), (BFLOAT16, True, "ieee"), (FLOAT16, False, "ieee")],
)
def test_tf32_is_used_for_float32_where_it_is_allowed(dtype, tf32, expected):
    x = torch.empty(1, 20, 64, 64, dtype=dtype, device="meta")
    weight = torch.empty(180, 20, dtype=dtype, device="meta")
    with record_launches("default") as launches:
        launchers.predicted_dynamic_filter_forward(x, x, weight, None, True, tf32)
        launchers.predicted_dynamic_filter_backward(x, x, x, weight, None, True, tf32, True, True, True, False)
    assert [launch.constants["PRECISION"] for launch in launches] == [expected] * 4
