"""Wrong arguments of the public operators: the message names the argument, what came and what is allowed."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from mitnet_fast import ops


def filter_arguments(**changes):
    return {"x": torch.zeros(2, 3, 4, 5), "filters": torch.zeros(2, 27, 4, 5)} | changes


def predicted_arguments(**changes):
    arguments = {"x": torch.zeros(2, 3, 4, 5), "features": torch.zeros(2, 6, 4, 5), "weight": torch.zeros(27, 6)}
    return arguments | {"bias": torch.zeros(27)} | changes


def spectral_arguments(**changes):
    shapes = {"x": (2, 3, 4, 5), "weight1": (6, 3), "bias1": (6,), "weight2": (3, 6), "bias2": (3,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def fused_spectral_arguments(**changes):
    return spectral_arguments(output_weight=torch.zeros(3, 6), output_bias=torch.zeros(3)) | changes


def attention_arguments(**changes):
    arguments = {"qk": torch.zeros(2, 8, 9, 9), "v": torch.zeros(2, 4, 9, 9), "bias_table": torch.zeros(225, 2)}
    return arguments | {"num_heads": 2} | changes


def mlp_arguments(**changes):
    shapes = {"x": (2, 4, 5, 6), "weight1": (8, 4), "bias1": (8,), "weight2": (4, 8), "bias2": (4,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def dense_arguments(**changes):
    shapes = {"x": (2, 3, 5, 6), "dense_weight": (45 * 2 * 7,), "dense_bias": (10,), "fuse_weight": (3, 13)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {"fuse_bias": torch.zeros(3)} | changes


def mixing_arguments(**changes):
    shapes = {"x": (2, 4, 5, 6), "value_weight": (4, 4), "value_bias": (4,), "local_weight": (4, 5, 5)}
    shapes |= {"local_bias": (4,), "proj_weight": (4, 4), "proj_bias": (4,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def global_arguments(**changes):
    arguments = mixing_arguments(value=torch.zeros(2, 4, 5, 6), attended=torch.zeros(2, 4, 5, 6))
    del arguments["value_weight"], arguments["value_bias"]
    return arguments | {"rescale": torch.zeros(2, 4), "rebias": torch.zeros(2, 4)} | changes


def qkv_arguments(**changes):
    shapes = {"x": (2, 4, 5, 6), "norm_weight": (4,), "norm_bias": (4,), "value_weight": (4, 4), "value_bias": (4,)}
    shapes |= {"query_key_weight": (8, 4), "query_key_bias": (8,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def conv_arguments(**changes):
    tensors = {"x": torch.zeros(2, 3, 5, 6), "joined": torch.zeros(2, 2, 5, 6), "weight": torch.zeros(3, 5, 3, 3)}
    return tensors | {"scale": torch.zeros(3), "shift": torch.zeros(3)} | changes


def residual_arguments(**changes):
    shapes = {"x": (2, 3, 5, 6), "joined": (2, 2, 5, 6), "weight1": (3, 5, 3, 3), "bias1": (3,)}
    shapes |= {"weight2": (3, 3, 3, 3), "bias2": (3,), "identity_weight": (3, 5), "identity_bias": (3,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


WRONG = [
    (ops.dynamic_filter, filter_arguments(x=1.0), TypeError, r"x: expected a tensor \[B, C, H, W\], got float"),
    (ops.dynamic_filter, filter_arguments(x=torch.zeros(3, 4, 5)), ValueError, r"x: expected shape .*got \[3, 4, 5\]"),
    (ops.dynamic_filter, filter_arguments(x=torch.zeros(2, 3, 4, 5).long()), TypeError, "x: dtype int64 .*float32"),
    (ops.dynamic_filter, filter_arguments(x=torch.zeros(2, 3, 0, 5)), ValueError, "x: needs at least one"),
    (ops.dynamic_filter, filter_arguments(filters=torch.zeros(2, 28, 4, 5)), ValueError, "filters: .*27, 75, 147.*28"),
    (ops.dynamic_filter, filter_arguments(filters=torch.zeros(2, 12, 4, 5)), ValueError, "filters: .*K = 1, 3, 5, 7"),
    (ops.dynamic_filter, filter_arguments(filters=torch.zeros(1, 27, 4, 5)), ValueError, r"filters: .*\[2, 27, 4, 5\]"),
    (ops.dynamic_filter, filter_arguments(filters=torch.zeros(2, 27, 4, 5).half()), TypeError, "x float32.*float16"),
    (ops.dynamic_filter, filter_arguments(filters=torch.zeros(2, 27, 4, 5).to("meta")), ValueError, "filters on meta"),
    (ops.dynamic_filter, filter_arguments(backend="cuda"), ValueError, "backend: got 'cuda', allowed are None"),
    (ops.predicted_dynamic_filter, predicted_arguments(features=torch.zeros(2, 6, 4, 4)), ValueError, "features: "),
    (ops.predicted_dynamic_filter, predicted_arguments(weight=torch.zeros(27, 5)), ValueError, r"weight: .*27, 6"),
    (ops.predicted_dynamic_filter, predicted_arguments(weight=torch.zeros(26, 6)), ValueError, "weight: .*got 26"),
    (ops.predicted_dynamic_filter, predicted_arguments(bias=torch.zeros(3, 27)), ValueError, r"bias: .*\[2, 27\]"),
    (ops.predicted_dynamic_filter, predicted_arguments(bias=torch.zeros(1, 1, 27)), ValueError, r"bias: .*\[C·K²\] or"),
    (ops.amplitude_phase_conv, spectral_arguments(mode="both"), ValueError, "mode: got 'both', allowed"),
    (ops.amplitude_phase_conv, spectral_arguments(weight1=torch.zeros(6, 4)), ValueError, r"weight1: .*\[6, 3\]"),
    (ops.amplitude_phase_conv, spectral_arguments(weight2=torch.zeros(4, 6)), ValueError, r"weight2: .*\[3, 6\]"),
    (ops.amplitude_phase_conv, spectral_arguments(bias2=torch.zeros(6)), ValueError, r"bias2: .*\[3\]"),
    (
        ops.amplitude_phase_conv,
        spectral_arguments(output_weight=torch.zeros(7, 2)),
        ValueError,
        r"output_weight: expected shape \[Co, C\] or \[Co, 2C\] with C = 3, got \[7, 2\]",
    ),
    (
        ops.amplitude_phase_conv,
        spectral_arguments(output_weight=torch.zeros(7, 6), output_bias=torch.zeros(6)),
        ValueError,
        r"output_bias: expected shape \[Co\] = \[7\], got \[6\]",
    ),
    (ops.amplitude_phase_conv, spectral_arguments(output_bias=torch.zeros(3)), ValueError, "output_bias: .*only with"),
    (ops.amplitude_phase_conv, spectral_arguments(bias1=torch.zeros(6).double()), TypeError, "bias1 float64"),
    (ops.half_spectrum, {"x": torch.zeros(3)}, ValueError, r"x: expected shape \[\.\.\., H, W\]"),
    (ops.half_spectrum, {"x": torch.zeros(3, 3).int()}, TypeError, "x: expected a floating-point tensor"),
    (ops.amplitude_and_phase, {"x": torch.zeros(3, 0)}, ValueError, "at least one pixel"),
    (ops.recombine, {"amplitude_of": torch.zeros(3, 3), "phase_of": torch.zeros(3, 4)}, ValueError, "phase_of: .*3, 3"),
    (ops.window_attention, attention_arguments(qk=torch.zeros(2, 4, 9, 9)), ValueError, r"qk: .*\[2, 8, 9, 9\]"),
    (ops.window_attention, attention_arguments(num_heads=3), ValueError, "num_heads: must divide the 4 channels"),
    (ops.window_attention, attention_arguments(window_size=0), ValueError, "window_size: must be at least 1"),
    (ops.window_attention, attention_arguments(shift=8), ValueError, "shift: .*below window_size = 8, got 8"),
    (ops.window_attention, attention_arguments(shift=-1), ValueError, "shift: "),
    (ops.window_attention, attention_arguments(window_size=4), ValueError, r"bias_table: .*\[49, 2\]"),
    (
        ops.window_attention,
        attention_arguments(qk=torch.zeros(2, 8, 4, 9), v=torch.zeros(2, 4, 4, 9)),
        ValueError,
        "height 4 is too small .*at least 5",
    ),
    (
        ops.window_attention,
        attention_arguments(qk=torch.zeros(2, 8, 9, 6), v=torch.zeros(2, 4, 9, 6), shift=4),
        ValueError,
        "width 6 is too small .*at least 7",
    ),
    (ops.pointwise_mlp, mlp_arguments(weight1=torch.zeros(0, 4)), ValueError, "weight1: needs at least one hidden"),
    (ops.pointwise_mlp, mlp_arguments(weight1=torch.zeros(8, 3)), ValueError, r"weight1: .*\[8, 4\]"),
    (ops.pointwise_mlp, mlp_arguments(weight2=torch.zeros(8, 4)), ValueError, r"weight2: .*\[4, 8\]"),
    (ops.pointwise_mlp, mlp_arguments(bias1=torch.zeros(8).double()), TypeError, "bias1 float64"),
    (ops.pointwise_mlp, mlp_arguments(bias2=None), TypeError, r"bias2: expected a tensor \[C\], got NoneType"),
    (ops.local_mixing, mixing_arguments(x=torch.zeros(2, 4, 2, 6)), ValueError, "x: needs at least 3×3 .*got 2×6"),
    (ops.local_mixing, mixing_arguments(local_weight=torch.zeros(4, 3, 3)), ValueError, r"local_weight: .*\[4, 5, 5\]"),
    (ops.local_mixing, mixing_arguments(backend="cuda"), ValueError, "backend: got 'cuda', allowed are None"),
    (ops.dense_block, dense_arguments(dense_bias=torch.zeros(4)), ValueError, "dense_bias: needs at least one channel"),
    (ops.dense_block, dense_arguments(dense_bias=torch.zeros(11)), ValueError, r"dense_bias: .*\[10\], got \[11\]"),
    (ops.dense_block, dense_arguments(dense_weight=torch.zeros(9)), ValueError, r"dense_weight: .*\[630\]"),
    (ops.local_global_mixing, global_arguments(value=torch.zeros(2, 4, 5, 5)), ValueError, r"value: .*\[2, 4, 5, 6\]"),
    (ops.normalized_qkv, qkv_arguments(norm_bias=torch.zeros(3)), ValueError, r"norm_bias: .*\[4\], got \[3\]"),
    (ops.normalized_qkv, qkv_arguments(query_key_weight=torch.zeros(4, 4)), ValueError, r"query_key.*\[8, 4\]"),
    (ops.normalized_qkv, qkv_arguments(x=torch.zeros(2, 4, 0, 6)), ValueError, "x: needs at least one channel and one"),
    (ops.local_global_mixing, global_arguments(rescale=torch.zeros(4)), ValueError, r"rescale: .*\[B, C\]"),
    (ops.conv_relu, conv_arguments(joined=torch.zeros(2, 2, 5, 5)), ValueError, r"joined: .*\[2, 2, 5, 6\]"),
    (ops.conv_relu, conv_arguments(joined=None), ValueError, r"weight: .*\[3, 3, 3, 3\], got \[3, 5, 3, 3\]"),
    (ops.conv_relu, conv_arguments(weight=torch.zeros(0, 5, 3, 3)), ValueError, "weight: needs at least one output"),
    (ops.conv_relu, conv_arguments(shift=torch.zeros(4)), ValueError, r"shift: .*\[Co\] = \[3\]"),
    (ops.residual_conv, residual_arguments(joined=torch.zeros(1, 2, 5, 6)), ValueError, r"joined: .*\[2, 2, 5, 6\]"),
    (ops.residual_conv, residual_arguments(joined=None), ValueError, r"weight1: .*\[3, 3, 3, 3\], got \[3, 5, 3, 3\]"),
    (ops.residual_conv, residual_arguments(weight1=torch.zeros(0, 5, 3, 3)), ValueError, "weight1: needs at least one"),
    (ops.residual_conv, residual_arguments(weight2=torch.zeros(3, 5, 3, 3)), ValueError, r"weight2: .*\[3, 3, 3, 3\]"),
    (ops.residual_conv, residual_arguments(identity_weight=torch.zeros(3, 3)), ValueError, r"identity_w.*\[3, 5\]"),
    (ops.residual_conv, residual_arguments(bias2=torch.zeros(3).double()), TypeError, "bias2 float64"),
    (ops.residual_conv, residual_arguments(negative_slope=1.0), ValueError, r"negative_slope: .*\[0, 1\), got 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "arguments", "error", "message"), WRONG)
def test_wrong_arguments_are_named(operator, arguments, error, message):
    with pytest.raises(error, match=message):
        operator(**arguments)


RIGHT = [
    (ops.dynamic_filter, filter_arguments),
    (ops.predicted_dynamic_filter, predicted_arguments),
    (ops.amplitude_phase_conv, spectral_arguments),
    (ops.amplitude_phase_conv, fused_spectral_arguments),
    (ops.window_attention, attention_arguments),
    (ops.pointwise_mlp, mlp_arguments),
    (ops.local_mixing, mixing_arguments),
    (ops.local_global_mixing, global_arguments),
    (ops.normalized_qkv, qkv_arguments),
    (ops.dense_block, dense_arguments),
    (ops.conv_relu, conv_arguments),
    (ops.residual_conv, residual_arguments),
]


def has_samples(name, value):
    return (value.dim() == 4 and "weight" not in name) or name in ("rescale", "rebias")


def filled(arguments, dtype=torch.float32, batch=None):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            (batch, *value.shape[1:]) if batch is not None and has_samples(name, value) else value.shape,
            generator=generator,
        ).to(dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(("operator", "arguments"), RIGHT)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(operator, arguments):
    tensors = filled(arguments(), batch=0)
    for value in tensors.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    results = tree_leaves(operator(**tensors))
    map_name = "v" if "v" in tensors else "x"
    assert results[0].shape == tensors[map_name].shape
    assert not any(result.numel() for result in results)
    sum(result.sum() for result in results).backward()
    for value in tensors.values():
        if isinstance(value, torch.Tensor):
            assert value.grad.shape == value.shape
            assert not value.grad.any()


@pytest.mark.parametrize(("operator", "arguments"), RIGHT)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_keeps_its_dtype(operator, arguments, half):
    tensors = filled(arguments(), half)
    rounded = tree_leaves(operator(**tensors))
    exact = tree_leaves(operator(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}))
    for y, truth in zip(rounded, exact, strict=True):
        assert y.dtype == half
        # four roundings of the result: the inputs are the same
        assert (y.double() - truth).norm() <= 4 * torch.finfo(half).eps * truth.norm()


@pytest.mark.parametrize(("operator", "arguments"), RIGHT)
def test_autocast_decides_the_dtype(operator, arguments):
    tensors = filled(arguments())
    exact = tree_leaves(operator(**tensors))
    mixed = {k: v.bfloat16() if k in ("features", "filters", "v") else v for k, v in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tree_leaves(operator(**mixed))
    for y, truth in zip(rounded, exact, strict=True):
        assert y.dtype == (torch.float32 if operator is ops.amplitude_phase_conv else torch.bfloat16)
        assert (y.float() - truth).norm() <= 8 * torch.finfo(torch.bfloat16).eps * truth.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = operator(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()})
    assert all(y.dtype == torch.float64 for y in tree_leaves(double))
