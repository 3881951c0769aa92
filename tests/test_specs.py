"""What benchmarks count a call as, bytes and operations: by hand, as tensors show it, and as PyTorch counts it."""

from dataclasses import replace
from math import log2

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mitnet_fast import ops
from mitnet_fast.reference.feature_mixing import NORM_EPS
from mitnet_fast.specs import (
    AMPLITUDE_PHASE_CONV,
    NORMALIZED_QKV,
    SPECS,
    compare,
    expectations,
    outputs_and_gradients,
)

LARGE, MIDDLE, SMALL = 2 * 256 * 256, 2 * 128 * 128, 2 * 16 * 16  # pixels of a batch
FILTER = 180 * 20 + 2 * 180  # weight and bias of each sample, for 3×3 filters of 20 channels
SPECTRAL = 4 * 20 * 20 + 3 * 20  # two square weights and one over [X, Y], three biases
BINS = 2 * 256 * 129
PRODUCT = 2 * 33 * 33 * 24 * 2 * 64 * 64  # of all windows, 33² since they are shifted
BY_HAND = {  # operator, benchmark case: elements that forward and backward move, operations of forward and backward
    ("dynamic_filter", 0): (LARGE * (40 + 180), LARGE * (60 + 2 * 180), LARGE * 180 * 2, LARGE * 180 * 3),
    ("predicted_dynamic_filter", 0): (
        *(LARGE * 60 + FILTER, LARGE * 100 + 2 * FILTER),
        *(LARGE * 180 * (2 * 20 + 2), LARGE * 180 * (4 * 20 + 3)),
    ),
    ("amplitude_phase_conv", 0): (  # 40 transforms with 2.5·log2(256²) operations a pixel, six products a bin
        *(LARGE * 40 + SPECTRAL, LARGE * 60 + 2 * SPECTRAL - 20),  # output_bias is only added
        *(LARGE * 40 * 40 + BINS * 4 * 1200, LARGE * 40 * 40 + BINS * 8 * 1200),
    ),
    ("window_attention", 0): (LARGE * 96 + 450, LARGE * 168 + 2 * 450, 2 * PRODUCT, 4 * PRODUCT),
    ("pointwise_mlp", 0): (  # bias2 is only added
        *(LARGE * 48 + 2376, LARGE * 72 + 2352 + 2376),
        *(LARGE * 2 * 2304, LARGE * 4 * 2304),
    ),
    ("local_mixing", 0): (  # proj_bias is only added
        *(LARGE * 48 + 1824, LARGE * 72 + 1800 + 1824),
        *(LARGE * 2 * (2 * 576 + 600), LARGE * 4 * (2 * 576 + 600)),
    ),
    ("local_global_mixing", 0): (  # x and rebias are only added
        *(LARGE * 96 + 1320, LARGE * 120 + 1272 + 1320),
        *(LARGE * 2 * (576 + 600), LARGE * 4 * (576 + 600)),
    ),
    ("normalized_qkv", 0): (  # both biases are only added; a mean and a deviation of each sample
        *(LARGE * 96 + 1848 + 4, LARGE * 120 + 1776 + 1848 + 4),
        *(LARGE * 2 * 1728, LARGE * 4 * 1728),
    ),
    ("dense_block", 0): (  # of 3, 35, 67, 99 and 131 channels, 335 in all, and of all 163 the fusion
        *(MIDDLE * 6 + 97132, MIDDLE * 9 + 2 * 97132),
        *(MIDDLE * 2 * (9 * 32 * 335 + 3 * 163), MIDDLE * 4 * (9 * 32 * 335 + 3 * 163)),
    ),
    ("conv_relu", 0): (
        *(MIDDLE * 192 + 73856, MIDDLE * 320 + 2 * 73856),
        *(MIDDLE * 2 * 73728, MIDDLE * 4 * 73728),
    ),
    ("conv_relu", 2): (  # its weight is larger than its maps
        *(SMALL * 1024 + 2360320, SMALL * 1536 + 2 * 2360320),
        *(SMALL * 2 * 2359296, SMALL * 4 * 2359296),
    ),
    ("residual_conv", 1): (  # of both maps together; identity_bias is only added
        *(LARGE * 60 + 11660, LARGE * 100 + 11640 + 11660),
        *(LARGE * 2 * (7200 + 3600 + 800), LARGE * 4 * (7200 + 3600 + 800)),
    ),
}
SPEC_OF = {spec.name: spec for spec in SPECS}
every_operator = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def test_every_operator_is_counted_by_hand():
    assert {name for name, _ in BY_HAND} == set(SPEC_OF)


@pytest.mark.parametrize(("name", "number"), BY_HAND)
def test_bytes_and_operations_are_those_counted_by_hand(name, number):
    spec = SPEC_OF[name]
    case = spec.benchmark_cases[number]
    forward, backward, *operations = BY_HAND[name, number]
    assert spec.bytes_at_least(case) == (4 * forward, 4 * backward)
    assert spec.bytes_at_least(replace(case, dtype=torch.bfloat16)) == (2 * forward, 2 * backward)
    assert spec.flops(case) == tuple(operations)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.as_seen], ids=lambda spec: spec.name)
def test_what_rounding_decides_takes_nothing_from_what_it_may_do_to_every_term(spec):
    tensors, case = spec.inputs(spec.typical), spec.typical
    gradient = spec.gradient(case, spec.uninitialized(case))
    truth, absolute, _ = expectations(spec, case, tensors, gradient, "reference")
    reference_alone = replace(spec, as_seen=lambda *call: spec.as_seen(*call)[:1])
    _, terms, _ = expectations(reference_alone, case, tensors, gradient, "reference")
    assert all((absolute[name] >= terms[name].abs()).all() for name in truth)


def test_no_terms_cancel_in_the_bound_of_a_norm():
    case = NORMALIZED_QKV.typical
    tensors = NORMALIZED_QKV.inputs(case)
    gradient = NORMALIZED_QKV.gradient(case, NORMALIZED_QKV.uninitialized(case))
    _, absolute, _ = expectations(NORMALIZED_QKV, case, tensors, gradient, "reference")
    size = {name: tensor.double().abs() for name, tensor in tensors.items()}
    projection = torch.cat([size["value_weight"], size["query_key_weight"]])
    grad_normalized = torch.einsum("oc,bohw->bchw", projection, torch.cat(gradient[:2], 1).double().abs())
    standardized = torch.group_norm(size["x"], 1, eps=NORM_EPS).abs()
    torch.testing.assert_close(absolute["grad_norm_weight"], (grad_normalized * standardized).sum((0, 2, 3)))
    torch.testing.assert_close(absolute["grad_norm_bias"], grad_normalized.sum((0, 2, 3)))


def rounded_to_tf32(tensor):
    """The nearest float32 with 10 bits after the point, with the gradient of the identity."""
    bits = (tensor.detach().view(torch.int32) + 0x1000) & ~0x1FFF
    return tensor + (bits.view(torch.float32) - tensor).detach()


@every_operator
def test_factors_of_ten_bits_are_within_what_tf32_may_differ_by_and_no_more(spec, monkeypatch):
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    computed, seen = getattr(ops, spec.name), []

    def in_tf32(*, backend, **arguments):
        if backend == "cpp":
            seen.append([setting.fp32_precision for setting in settings])
            tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
            arguments |= {name: rounded_to_tf32(tensor) for name, tensor in tensors.items()}
        return computed(**arguments, backend=backend)

    monkeypatch.setattr(ops, spec.name, in_tf32)
    case = replace(spec.typical, dtype=torch.float32)
    assert all(comparison.passed for comparison in compare(spec, replace(case, tf32=True), "cpp"))
    assert not all(comparison.passed for comparison in compare(spec, case, "cpp"))
    assert seen == [["tf32", "tf32"], ["ieee", "ieee"]]
    assert [setting.fp32_precision for setting in settings] == before


@every_operator
def test_bytes_are_those_of_what_a_call_takes_and_gives(spec):
    case = replace(spec.typical, dtype=torch.float64)
    tensors = {name: tensor for name, tensor in spec.inputs(case).items() if tensor is not None}
    others = spec.inputs(replace(case, seed=case.seed + 1))
    gradient = spec.gradient(case, spec.uninitialized(case))

    def call(**changed):
        values = dict.fromkeys(others) | tensors | changed
        found = outputs_and_gradients(spec, case, values, gradient, "reference")
        results = [found.pop(name) for name in spec.results]
        return results, found

    results, gradients = call()
    needed = [
        tensor
        for name, tensor in tensors.items()
        if any(
            not torch.allclose(other, gradients[of], rtol=1e-9, atol=1e-9)
            for of, other in call(**{name: others[name]})[1].items()
        )
    ]
    incoming = tree_leaves(gradient)
    written = [g for g in gradients.values() if not any(torch.equal(g, given) for given in incoming)]
    forward = sum(tensor.nbytes for tensor in (*tensors.values(), *results))
    backward = sum(tensor.nbytes for tensor in (*incoming, *needed, *written))
    assert spec.bytes_at_least(case) == (forward, backward)


def beside_products(spec, case):
    """Operations of forward and backward that PyTorch's counter of products leaves out, or counts too much."""
    batch, channels, height, width = (case.sizes[name] for name in ("batch", "channels", "height", "width"))
    pixels = batch * height * width
    if spec.family == "dynamic_filter":
        taps = pixels * channels * case.sizes["kernel_size"] ** 2
        return 2 * taps, 3 * taps
    if spec is AMPLITUDE_PHASE_CONV:
        transform = int(2.5 * pixels * log2(max(2, height * width)))
        transforms = (channels + (case.sizes["out"] or channels)) * transform
        return transforms, transforms
    if spec.name in ("local_mixing", "local_global_mixing"):  # it takes the weight of C channels for one of C²
        return 0, -2 * pixels * 25 * channels * (channels - 1)
    return 0, 0


@pytest.mark.parametrize(
    ("spec", "case"),
    [(spec, case) for spec in SPECS for case in spec.cases if case.sizes["batch"]],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_operations_are_those_that_pytorch_counts(spec, case):
    tensors = {name: t if t is None else t.requires_grad_() for name, t in spec.inputs(case).items()}
    with FlopCounterMode(display=False) as forward:
        results = tree_leaves(spec.run(case, tensors, "reference"))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(results, tree_leaves(spec.gradient(case, spec.uninitialized(case))))
    counted = forward.get_total_flops(), backward.get_total_flops()
    assert spec.flops(case) == tuple(map(sum, zip(counted, beside_products(spec, case), strict=True)))
