"""The Triton kernels of feature mixing against the truth, and what they may read and write."""

import statistics

import pytest
import torch
from mitnet_fast.triton_kernels import feature_mixing as launchers
from mitnet_fast.triton_kernels._common import MAX_PIXELS, record_launches
from torch.utils._pytree import tree_leaves, tree_map

from mitnet_fast.specs import (
    LOCAL_GLOBAL_MIXING,
    LOCAL_MIXING,
    NORMALIZED_QKV,
    POINTWISE_MLP,
    Case,
    allowed_error,
    compare,
    expectations,
    outputs_and_gradients,
    relative_error,
)
from mitnet_fast.verify import poisoned_memory

from .maps import inside_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, BFLOAT16, FLOAT16 = DTYPES
OPERATORS = (POINTWISE_MLP, LOCAL_MIXING, LOCAL_GLOBAL_MIXING, NORMALIZED_QKV)
every_operator = pytest.mark.parametrize("spec", OPERATORS, ids=lambda spec: spec.name)


def case(batch, channels, height, width, dtype=FLOAT32, layout="contiguous", **more):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    return Case(sizes | more, {}, dtype, layout)


# together: every dtype and layout, one pixel, several blocks of channels, hidden and output channels, several
# samples per partial sum (batch 9); in float32, where little is hidden by rounding, several tiles up and down and side
# by side with mirror images on either side of a seam, and several partial sums per sample
CASES = [
    (POINTWISE_MLP, case(1, 1, 1, 1, hidden=1)),
    (POINTWISE_MLP, case(2, 3, 5, 7, FLOAT16, "channels_last", hidden=5)),
    (POINTWISE_MLP, case(1, 20, 17, 33, hidden=48)),
    (POINTWISE_MLP, case(1, 24, 10, 13, BFLOAT16, "channels_last", hidden=70)),
    (POINTWISE_MLP, case(9, 2, 3, 4, FLOAT32, "strided", hidden=6)),
    (POINTWISE_MLP, case(2, 3, 9, 8, FLOAT16, "expanded", hidden=3)),
    (POINTWISE_MLP, case(0, 3, 4, 4, hidden=3)),
    (LOCAL_MIXING, case(1, 1, 3, 3)),
    (LOCAL_MIXING, case(2, 3, 4, 5, FLOAT16, "channels_last")),
    (LOCAL_MIXING, case(1, 2, 18, 34)),
    (LOCAL_MIXING, case(1, 36, 5, 6, BFLOAT16, "channels_last")),
    (LOCAL_MIXING, case(1, 3, 6, 3, FLOAT32, "strided")),
    (LOCAL_MIXING, case(2, 3, 3, 7, FLOAT16, "expanded")),
    (LOCAL_MIXING, case(0, 3, 4, 4)),
    (LOCAL_GLOBAL_MIXING, case(1, 1, 3, 3, BFLOAT16)),
    (LOCAL_GLOBAL_MIXING, case(2, 3, 5, 4, FLOAT32, "expanded")),
    (LOCAL_GLOBAL_MIXING, case(1, 2, 17, 35)),
    (LOCAL_GLOBAL_MIXING, case(1, 34, 4, 6, FLOAT32, "channels_last")),
    (LOCAL_GLOBAL_MIXING, case(2, 3, 6, 5, FLOAT16, "strided")),
    (LOCAL_GLOBAL_MIXING, case(0, 3, 4, 4)),
    (NORMALIZED_QKV, case(1, 1, 1, 3)),
    (NORMALIZED_QKV, case(2, 3, 4, 5, FLOAT16, "channels_last")),
    (NORMALIZED_QKV, case(2, 20, 17, 33)),
    (NORMALIZED_QKV, case(1, 40, 9, 31, BFLOAT16, "channels_last")),
    (NORMALIZED_QKV, case(1, 3, 40, 33, FLOAT32, "strided")),
    (NORMALIZED_QKV, case(9, 2, 3, 4, FLOAT32, "expanded")),
    (NORMALIZED_QKV, case(0, 3, 4, 4)),
]


@pytest.mark.parametrize(("spec", "chosen"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_results_and_gradients_equal_the_truth(spec, chosen):
    with poisoned_memory():
        results = compare(spec, chosen, "triton", DEVICE)
    assert len(results) == len(spec.results) + len(spec.shapes(chosen))
    assert all(result.passed for result in results), results


@pytest.mark.exhaustive
@every_operator
def test_random_cases_equal_the_truth(spec):
    ratios = []
    with poisoned_memory():
        for seed in range(1000 if DEVICE == "cuda" else 20):
            chosen = spec.random_case(seed, DTYPES)
            results = compare(spec, chosen, "triton", DEVICE)
            assert all(result.passed for result in results), f"{chosen}: {results}"
            ratios += [result.ratio for result in results if result.eager_error]
    assert statistics.median(ratios) <= 1.5


def arguments(spec, chosen):
    """What the forward launcher takes but the precision, and the gradients of its results."""
    tensors = spec.inputs(chosen, DEVICE)
    return list(tensors.values()), tree_leaves(spec.gradient(chosen, spec.uninitialized(chosen, DEVICE)))


def forward(spec, tensors, tf32=False):
    return tree_leaves(getattr(launchers, f"{spec.name}_forward")(*tensors, tf32))


def backward(spec, grads, tensors, needs=None, tf32=False):
    """Gradients, where ``needs`` does not say which those of all tensors but what has the incoming one for its own."""
    if needs is None:
        needs = [spec is not LOCAL_GLOBAL_MIXING or name != "x" for name in spec.shapes(spec.typical)]
    return getattr(launchers, f"{spec.name}_backward")(*grads, *tensors, needs, tf32)


@every_operator
def test_exactly_the_wanted_gradients_are_computed_the_same_every_time(spec):
    tensors, grads = arguments(spec, case(1, 2, 3, 4, hidden=3))
    everything = backward(spec, grads, tensors)
    given = [index for index, gradient in enumerate(everything) if gradient is not None]
    for wanted in (set(), *({index} for index in given), set(given)):
        gradients = backward(spec, grads, tensors, [index in wanted for index in range(len(tensors))])
        for index, gradient in enumerate(gradients):
            assert torch.equal(gradient, everything[index]) if index in wanted else gradient is None
    for once, again in zip(forward(spec, tensors), forward(spec, tensors), strict=True):
        assert torch.equal(once, again)


def test_hidden_channels_of_several_blocks_change_no_gradient_of_x(monkeypatch):
    tensors, grads = arguments(POINTWISE_MLP, case(1, 3, 4, 5, hidden=33))
    together = backward(POINTWISE_MLP, grads, tensors)
    tuned = launchers.configuration
    monkeypatch.setattr(launchers, "configuration", lambda *what: {**tuned(*what), "BLOCK_H": 16})
    for gradient, expected in zip(backward(POINTWISE_MLP, grads, tensors), together, strict=True):
        torch.testing.assert_close(gradient, expected)


@every_operator
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_are_read_in_place_and_nothing_around_them(spec, layout):
    tensors, grads = arguments(spec, case(1, 3, 3, 4, hidden=4))
    sliced, sliced_grads = tree_map(
        lambda tensor: inside_nan(tensor, layout) if tensor.dim() == 4 else tensor, [tensors, grads]
    )
    with record_launches() as launches:
        forward(spec, sliced)
    read = {argument.data_ptr() for argument in launches[0].arguments if isinstance(argument, torch.Tensor)}
    assert sliced[0].data_ptr() in read
    for y, expected in zip(forward(spec, sliced), forward(spec, tensors), strict=True):
        torch.testing.assert_close(y, expected)
    expected_gradients = backward(spec, grads, tensors)
    for gradient, expected in zip(backward(spec, sliced_grads, sliced), expected_gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected)


@every_operator
def test_offsets_reach_beyond_two_to_the_31(spec):
    tensors, grads = arguments(spec, case(1, 3, 3, 4, BFLOAT16, hidden=2))
    far = 2**30 + 64  # elements between channels; pages that nobody touches take no memory
    storage = torch.empty(6 * far + 128, dtype=BFLOAT16, device=DEVICE)
    starts = iter(range(0, 128, 16))

    def spread(tensor):
        if tensor.dim() != 4:
            return tensor
        return storage[next(starts) :].as_strided(tensor.shape, (0, far, 4, 1)).copy_(tensor)

    far_tensors, far_grads = tree_map(spread, [tensors, grads])
    for y, expected in zip(forward(spec, far_tensors), forward(spec, tensors), strict=True):
        assert torch.equal(y, expected)
    expected_gradients = backward(spec, grads, tensors)
    for gradient, expected in zip(backward(spec, far_grads, far_tensors), expected_gradients, strict=True):
        assert gradient is expected is None or torch.equal(gradient, expected)


def test_a_mean_far_from_zero_takes_away_no_bits():
    chosen = case(2, 3, 21, 29)
    tensors = NORMALIZED_QKV.inputs(chosen, DEVICE)
    tensors["x"] += 1000.0
    gradient = NORMALIZED_QKV.gradient(chosen, NORMALIZED_QKV.uninitialized(chosen, DEVICE))
    truth, absolute, eager = expectations(NORMALIZED_QKV, chosen, tensors, gradient, "triton")
    actual = outputs_and_gradients(NORMALIZED_QKV, chosen, tensors, gradient, "triton")
    for name, value in actual.items():
        allowed = allowed_error(FLOAT32, relative_error(eager[name], truth[name]), truth[name], absolute[name])
        assert relative_error(value, truth[name]) <= allowed, name


@every_operator
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, MAX_PIXELS // 2 + 1), f"x: .* at most {MAX_PIXELS} pixels per image, got 2×{MAX_PIXELS // 2 + 1}"),
        ((129, 8, 8), "x: .* at most 128 channels, got 129"),
    ],
)
def test_what_the_kernels_do_not_hold_is_refused(spec, sizes, message):
    tensors = [torch.empty(1, *sizes, device="meta") for _ in spec.shapes(spec.typical)]
    with pytest.raises(ValueError, match=message):
        forward(spec, tensors)
    with pytest.raises(ValueError, match=message):
        backward(spec, tensors[:1] * len(spec.results), tensors)


@every_operator
@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [(FLOAT32, True, "tf32"), (FLOAT32, False, "ieee"), (BFLOAT16, True, "ieee"), (FLOAT16, False, "ieee")],
)
def test_tf32_is_used_for_float32_where_it_is_allowed(spec, dtype, tf32, expected):
    chosen = case(1, 24, 16, 16, hidden=48)
    tensors, grads = (
        [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        for shapes in (
            spec.shapes(chosen).values(),
            [result.shape for result in tree_leaves(spec.uninitialized(chosen, "meta"))],
        )
    )
    with record_launches("default") as launches:
        forward(spec, tensors, tf32)
        backward(spec, grads, tensors, tf32=tf32)
    precisions = [launch.constants["PRECISION"] for launch in launches if "PRECISION" in launch.constants]
    assert len(precisions) >= 2
    assert set(precisions) == {expected}
