"""The Triton kernels of window attention against the truth, and what they may read and write."""

import statistics

import pytest
import torch
from mitnet_fast.triton_kernels import window_attention as launchers
from mitnet_fast.triton_kernels._common import MAX_PIXELS, record_launches

from mitnet_fast.specs import WINDOW_ATTENTION, Case, compare
from mitnet_fast.verify import poisoned_memory

from .maps import inside_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, BFLOAT16, FLOAT16 = DTYPES


def case(batch, heads, head, height, width, window=8, shift=0, dtype=FLOAT32, layout="contiguous"):
    sizes = {"batch": batch, "channels": heads * head, "height": height, "width": width}
    return Case(sizes, {"num_heads": heads, "window_size": window, "shift": shift}, dtype, layout)


# together: every window and head size, dtype and layout, both shifts, several windows per program and
# several programs, padding at the bottom, at the right, and larger than the map less one pixel
CASES = [
    case(1, 1, 1, 1, 1, 1),
    case(2, 1, 8, 8, 8),
    case(1, 2, 12, 5, 5),
    case(1, 2, 12, 7, 7, shift=4, dtype=BFLOAT16),
    case(2, 1, 12, 13, 10, shift=4, layout="channels_last"),
    case(1, 2, 12, 9, 17, dtype=BFLOAT16, layout="channels_last"),
    case(1, 1, 16, 25, 8, shift=4, dtype=FLOAT16, layout="strided"),
    case(2, 1, 32, 9, 6, 4, 2, FLOAT16, "channels_last"),
    case(1, 2, 33, 6, 11, 4, 1, FLOAT32, "expanded"),
    case(2, 1, 24, 9, 11, 7, 3, BFLOAT16, "expanded"),
    case(1, 1, 64, 7, 9, 7, 0, FLOAT16),
    case(1, 1, 12, 17, 16, 16, 8, FLOAT32, "channels_last"),
    case(1, 1, 8, 16, 9, 16, 0, BFLOAT16),
    case(0, 2, 12, 9, 8, shift=4),
]


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_result_and_gradients_equal_the_truth(chosen):
    with poisoned_memory():
        results = compare(WINDOW_ATTENTION, chosen, "triton", DEVICE)
    assert [result.tensor for result in results] == ["y", "grad_qk", "grad_v", "grad_bias_table"]
    assert all(result.passed for result in results), results


@pytest.mark.exhaustive
def test_random_cases_equal_the_truth():
    ratios = []
    with poisoned_memory():
        for seed in range(1000 if DEVICE == "cuda" else 60):
            chosen = WINDOW_ATTENTION.random_case(seed, DTYPES)
            results = compare(WINDOW_ATTENTION, chosen, "triton", DEVICE)
            assert all(result.passed for result in results), f"{chosen}: {results}"
            ratios += [result.ratio for result in results if result.eager_error]
    assert statistics.median(ratios) <= 1.5


def arguments(chosen):
    """What the forward launcher takes, and the gradient of its result."""
    tensors = WINDOW_ATTENTION.inputs(chosen, DEVICE)
    return (*tensors.values(), *chosen.options.values(), False), WINDOW_ATTENTION.gradient(chosen, tensors["v"])


@pytest.mark.parametrize("queries", [64, 16], ids=["one query block", "several query blocks"])
def test_exactly_the_wanted_gradients_are_computed_the_same_every_time(queries, monkeypatch):
    queries_of_a_program(monkeypatch, queries)
    forward, grad = arguments(case(1, 1, 3, 8, 7, shift=2))
    everything = launchers.window_attention_backward(grad, *forward, True, True, True)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, True, True), (False,) * 3):
        gradients = launchers.window_attention_backward(grad, *forward, *wanted)
        for gradient, expected, needed in zip(gradients, everything, wanted, strict=True):
            assert torch.equal(gradient, expected) if needed else gradient is None
    assert torch.equal(launchers.window_attention_forward(*forward), launchers.window_attention_forward(*forward))


def queries_of_a_program(monkeypatch, count):
    """Let programs own so many queries at most."""
    tuned = launchers.configuration
    monkeypatch.setattr(launchers, "configuration", lambda *what: {**tuned(*what), "BLOCK_Q": count})


def test_windows_may_be_shared_by_several_query_blocks(monkeypatch):
    queries_of_a_program(monkeypatch, 16)
    with poisoned_memory():
        results = compare(WINDOW_ATTENTION, case(1, 1, 3, 9, 8, shift=3), "triton", DEVICE)
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_are_read_in_place_and_nothing_around_them(layout):
    (qk, v, *rest), grad = arguments(case(2, 1, 3, 5, 6, 4, 2))
    maps = [inside_nan(tensor, layout) for tensor in (grad, qk, v)]
    with record_launches() as launches:
        launchers.window_attention_forward(*maps[1:], *rest)
    assert [launches[0].arguments[index].data_ptr() for index in (0, 2)] == [map.data_ptr() for map in maps[1:]]
    torch.testing.assert_close(
        launchers.window_attention_forward(*maps[1:], *rest), launchers.window_attention_forward(qk, v, *rest)
    )
    actual = launchers.window_attention_backward(*maps, *rest, True, True, True)
    expected = launchers.window_attention_backward(grad, qk, v, *rest, True, True, True)
    for gradient, near in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, near)


def test_offsets_reach_beyond_two_to_the_31():
    (qk, v, *rest), grad = arguments(case(1, 1, 3, 4, 5, 4, 2, BFLOAT16))
    far = 2**30 + 64  # elements between channels; pages that nobody touches take no memory
    storage = torch.empty(5 * far + 96, dtype=BFLOAT16, device=DEVICE)

    def spread(tensor, start):
        return storage[start:].as_strided(tensor.shape, (0, far, 5, 1)).copy_(tensor)

    maps = [spread(tensor, 32 * place) for place, tensor in enumerate((grad, qk, v))]
    expected = launchers.window_attention_forward(qk, v, *rest)
    assert torch.equal(launchers.window_attention_forward(*maps[1:], *rest), expected)
    near = launchers.window_attention_backward(grad, qk, v, *rest, True, True, True)
    actual = launchers.window_attention_backward(*maps, *rest, True, True, True)
    for gradient, expected in zip(actual, near, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_choose_one_key(dtype):
    (qk, v, table, *rest), grad = arguments(case(1, 1, 8, 8, 8, dtype=dtype))
    table = torch.full_like(table, -1e4)
    table[8 * 15 + 7] = 1e4  # the key above the query; there is none above the first row
    y = launchers.window_attention_forward(qk, v, table, *rest)
    torch.testing.assert_close(y[:, :, 1:], v[:, :, :-1])
    assert torch.isfinite(y).all()
    grad_qk, grad_v, grad_table = launchers.window_attention_backward(
        grad * (torch.arange(8, device=DEVICE)[:, None] > 0), qk, v, table, *rest, True, True, True
    )
    assert not grad_qk.any()
    assert not grad_table.any()
    torch.testing.assert_close(grad_v[:, :, :-1], grad[:, :, 1:])


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [
        ((1, 2, MAX_PIXELS // 2 + 1), 8, f"v: .* at most {MAX_PIXELS} pixels per image, got 2×{MAX_PIXELS // 2 + 1}"),
        ((1, 40, 40), 17, "window_size: .* at most 16, got 17"),
        ((65, 8, 8), 8, "num_heads: .* at most 64 channels per head with window_size 8, got 65"),
        ((33, 16, 16), 9, "num_heads: .* at most 32 channels per head with window_size 9, got 33"),
    ],
)
def test_what_the_kernels_do_not_hold_is_refused(sizes, window, message):
    channels, height, width = sizes
    qk, v = (torch.empty(1, count, height, width, device="meta") for count in (2 * channels, channels))
    options = torch.empty((2 * window - 1) ** 2, 1, device="meta"), 1, window, 0, False
    with pytest.raises(ValueError, match=message):
        launchers.window_attention_forward(qk, v, *options)
    with pytest.raises(ValueError, match=message):
        launchers.window_attention_backward(v, qk, v, *options, True, False, False)


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [(FLOAT32, True, "tf32"), (FLOAT32, False, "ieee"), (BFLOAT16, True, "ieee"), (FLOAT16, False, "ieee")],
)
def test_tf32_is_used_for_float32_where_it_is_allowed(dtype, tf32, expected):
    qk, v = (torch.empty(1, channels, 24, 24, dtype=dtype, device="meta") for channels in (24, 12))
    table = torch.empty(225, 1, dtype=dtype, device="meta")
    with record_launches("default") as launches:
        launchers.window_attention_forward(qk, v, table, 1, 8, 0, tf32)
        launchers.window_attention_backward(v, qk, v, table, 1, 8, 0, tf32, True, True, False)
    assert [launch.constants["PRECISION"] for launch in launches] == [expected] * 2
