"""Which backend a call gets, and what is said when one asked for by name cannot run."""

import json
import logging
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mitnet_fast import ops
from mitnet_fast.ops import _backends
from mitnet_fast.ops._backends import Kernels, choose, why_not
from mitnet_fast.specs import SPECS
from mitnet_fast.verify import KERNELS

ROOT = Path(__file__).parents[2]
EVERYWHERE = frozenset({torch.float32})


@pytest.fixture
def kernels(monkeypatch):
    """A family with kernels in both compiled backends, all available, cpp preferred on the CPU."""
    monkeypatch.setattr(_backends, "UNAVAILABLE", {})
    monkeypatch.setitem(_backends.PREFERENCES["dynamic_filter"], "cpu", {"order": ["cpp", "triton", "reference"]})
    return Kernels("dynamic_filter", {("cpp", "cpu"): EVERYWHERE, ("triton", "cpu"): frozenset({torch.float16})})


def test_the_first_of_the_preference_that_can_run_is_taken(kernels):
    assert choose(kernels, None, "cpu", torch.float32) == "cpp"
    assert choose(kernels, None, "cpu", torch.float16) == "triton"
    assert choose(kernels, None, "cpu", torch.float64) == "reference"
    assert choose(kernels, None, "xpu", torch.float32) == "reference"


def test_a_backend_asked_for_runs_or_raises_with_every_reason(kernels, monkeypatch):
    assert choose(kernels, "triton", "cpu", torch.float16) == "triton"
    assert choose(kernels, "reference", "cpu", torch.float64) == "reference"
    monkeypatch.setattr(_backends, "UNAVAILABLE", {("triton", "cpu"): ("Triton is not installed",)})
    with pytest.raises(ops.BackendError, match=r"'triton' .*Triton is not installed; dtype float32 .*allowed: float16"):
        choose(kernels, "triton", "cpu", torch.float32)
    with pytest.raises(ops.BackendError, match="no kernels of this dynamic_filter operator for cuda tensors"):
        choose(kernels, "cpp", "cuda", torch.float32)
    with pytest.raises(ValueError, match="got 'cudnn', allowed are None and 'reference', 'cpp', 'triton'"):
        choose(kernels, "cudnn", "cpu", torch.float32)


def test_an_operator_without_kernels_says_so():
    with pytest.raises(ops.BackendError, match="triton has no kernels of this amplitude_phase operator"):
        choose(Kernels("amplitude_phase"), "triton", "cpu", torch.float32)


def test_reasons_are_empty_only_for_what_runs(kernels):
    assert why_not(kernels, "cpp", "cpu", torch.float32) == []
    assert len(why_not(kernels, "cpp", "cpu", torch.int8)) == 1


def test_a_size_that_kernels_do_not_take_is_a_reason(kernels):
    limited = replace(kernels, limits={("cpp", "cpu"): {"channels": 8, "pixels": 100}})
    assert choose(limited, None, "cpu", torch.float32, {"channels": 8, "pixels": 100}) == "cpp"
    assert choose(limited, None, "cpu", torch.float32, {"channels": 9, "pixels": 100}) == "reference"
    assert choose(limited, None, "cpu", torch.float16, {"channels": 9, "pixels": 101}) == "triton"
    message = "'cpp' .* channels 9 is more than cpp takes on cpu: at most 8; pixels 101 is more .* at most 100"
    with pytest.raises(ops.BackendError, match=message):
        choose(limited, "cpp", "cpu", torch.float32, {"channels": 9, "pixels": 101})
    assert why_not(limited, "cpp", "cpu", torch.float32) == []


PIXELS = "pixels per image"
ATTENTION = {"window_size": 16, "channels per head": 64, "channels per head of windows above 8×8": 32, PIXELS: 2**30}
CHANNELS = {"channels": 256, "hidden channels": 256, "output channels": 256, PIXELS: 2**30}


@pytest.mark.parametrize(
    ("operator", "sizes", "taken"),
    [
        ("window_attention", ATTENTION, ["cpp", "triton"]),
        ("window_attention", ATTENTION | {"window_size": 17}, []),
        ("window_attention", ATTENTION | {"channels per head": 65}, []),
        ("window_attention", ATTENTION | {"channels per head of windows above 8×8": 33}, ["cpp"]),
        ("window_attention", ATTENTION | {PIXELS: 2**30 + 1}, ["cpp"]),
        ("amplitude_phase_conv", CHANNELS, ["cpp", "triton"]),
        ("amplitude_phase_conv", CHANNELS | {"channels": 257}, []),
        ("amplitude_phase_conv", CHANNELS | {"hidden channels": 257}, ["triton"]),
        ("amplitude_phase_conv", CHANNELS | {"output channels": 257}, ["triton"]),
        ("amplitude_phase_conv", CHANNELS | {PIXELS: 2**30 + 1}, ["cpp"]),
        ("dynamic_filter", {PIXELS: 2**30}, ["cpp", "triton"]),
        ("dynamic_filter", {PIXELS: 2**30 + 1}, ["cpp"]),
        *(
            (operator, {"channels": channels, PIXELS: pixels}, ["triton"] if taken else [])
            for operator in ("pointwise_mlp", "local_mixing", "local_global_mixing", "normalized_qkv")
            for channels, pixels, taken in ((128, 2**30, True), (129, 2**30, False), (128, 2**30 + 1, False))
        ),
    ],
    ids=str,
)
def test_what_no_gpu_kernel_takes_runs_in_plain_pytorch(monkeypatch, operator, sizes, taken):
    monkeypatch.setattr(_backends, "UNAVAILABLE", {})
    kernels = KERNELS[operator]
    for order in (["cpp", "triton", "reference"], ["triton", "cpp", "reference"]):
        monkeypatch.setitem(_backends.PREFERENCES[kernels.family], "cuda", {"order": order})
        expected = next((backend for backend in order if backend in taken), "reference")
        assert choose(kernels, None, "cuda", torch.float32, sizes) == expected


def test_calls_say_their_sizes(monkeypatch):
    monkeypatch.setattr(_backends, "UNAVAILABLE", {})
    for family in _backends.FAMILIES:
        monkeypatch.setitem(_backends.PREFERENCES[family], "cpu", {"order": ["triton", "reference"]})
    qk, v, table = torch.randn(1, 66, 17, 17), torch.randn(1, 33, 17, 17), torch.randn(33**2, 1)
    options = {"num_heads": 1, "window_size": 17}
    expected = ops.window_attention(qk, v, table, **options, backend="reference")
    assert torch.equal(ops.window_attention(qk, v, table, **options), expected)
    message = "window_size 17 is more than triton takes on cpu: at most 16; channels per head of windows .* 33 is more"
    with pytest.raises(ops.BackendError, match=message):
        ops.window_attention(qk, v, table, **options, backend="triton")
    x = torch.randn(1, 257, 2, 2)
    weights = torch.randn(3, 257), torch.randn(3), torch.randn(257, 3), torch.randn(257)
    expected = ops.amplitude_phase_conv(x, *weights, backend="reference")
    assert torch.equal(ops.amplitude_phase_conv(x, *weights), expected)
    with pytest.raises(ops.BackendError, match="channels 257 is more than triton takes on cpu: at most 256"):
        ops.amplitude_phase_conv(x, *weights, backend="triton")
    x = torch.randn(1, 129, 3, 3)
    weights = torch.randn(3, 129), torch.randn(3), torch.randn(129, 3), torch.randn(129)
    assert torch.equal(ops.pointwise_mlp(x, *weights), ops.pointwise_mlp(x, *weights, backend="reference"))
    with pytest.raises(ops.BackendError, match="channels 129 is more than triton takes on cpu: at most 128"):
        ops.pointwise_mlp(x, *weights, backend="triton")


def test_context_forces_and_restores(kernels):
    with ops.use_backend("reference"):
        assert choose(kernels, None, "cpu", torch.float32) == "reference"
        with ops.use_backend(dynamic_filter="cpp"):
            assert choose(kernels, None, "cpu", torch.float32) == "cpp"
            with pytest.raises(ops.BackendError):
                choose(kernels, None, "cpu", torch.float16)
        assert choose(kernels, "cpp", "cpu", torch.float32) == "cpp"
        assert choose(kernels, None, "cpu", torch.float32) == "reference"
    assert choose(kernels, None, "cpu", torch.float32) == "cpp"
    with pytest.raises(ValueError, match="attention: no such kernel family"), ops.use_backend(attention="cpp"):
        pass
    with pytest.raises(ValueError, match="backend: got 'fast'"), ops.use_backend("fast"):
        pass
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert choose(kernels, None, "cpu", torch.float32) == "cpp"


def test_a_backend_named_for_all_families_holds_where_there_are_kernels(kernels):
    partial = Kernels("feature_mixing", {("cpp", "cpu"): EVERYWHERE})
    with ops.use_backend("cpp"):
        assert choose(partial, None, "cpu", torch.float32) == "cpp"
        assert choose(partial, None, "cuda", torch.float32) == "reference"
        with pytest.raises(ops.BackendError, match="dtype float16 is not supported"):
            choose(partial, None, "cpu", torch.float16)
        with pytest.raises(ops.BackendError, match="no kernels of this feature_mixing operator for cuda"):
            choose(partial, "cpp", "cuda", torch.float32)
        with (
            ops.use_backend(feature_mixing="triton"),
            pytest.raises(ops.BackendError, match="triton has no kernels of this feature_mixing operator"),
        ):
            choose(partial, None, "cpu", torch.float32)
        assert choose(partial, None, "cuda", torch.float32) == "reference"
    with (
        ops.use_backend(feature_mixing="cpp"),
        pytest.raises(ops.BackendError, match="no kernels of this feature_mixing operator for cuda"),
    ):
        choose(partial, None, "cuda", torch.float32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference reference"), ("window_attention=cpp, dynamic_filter=triton", "triton cpp")],
)
def test_environment_forces(value, expected):
    code = "from mitnet_fast.ops._backends import _forced as f; print(f['dynamic_filter'], f['window_attention'])"
    assert _python(code, value).stdout.split() == expected.split()


@pytest.mark.parametrize("value", ["fast", "dynamic_filter=fast", "filter=cpp"])
def test_wrong_environment_is_an_error(value):
    answer = _python("import mitnet_fast.ops", value)
    assert answer.returncode != 0
    assert f"MITNET_FAST_BACKEND: got '{value}'" in answer.stderr


def test_one_debug_line_for_each_kind_of_call(kernels, caplog):
    _backends._log.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="mitnet_fast"):
        for _ in range(3):
            choose(kernels, None, "cpu", torch.float32)
    assert [record.message for record in caplog.records] == ["dynamic_filter on cpu float32 runs on backend cpp"]


def test_preferences_name_backends_and_what_they_rest_on():
    assert set(_backends.PREFERENCES) == set(_backends.FAMILIES)
    for devices in _backends.PREFERENCES.values():
        for entry in devices.values():
            assert set(entry["order"]) <= set(ops.BACKENDS)
            assert entry["order"][-1] == "reference"
            assert entry["rests_on"]


def test_a_kernel_is_preferred_where_it_was_measured_to_be_faster():
    for family, devices in _backends.PREFERENCES.items():
        for device, entry in devices.items():
            first = entry["order"][0]
            if first == "reference":  # nothing was measured that could be preferred
                assert not Path(entry["rests_on"]).suffix
                continue
            rows = json.loads((ROOT / entry["rests_on"]).read_text())
            operators = {spec.name for spec in SPECS if spec.family == family}
            measured = [row for row in rows if row["name"] in operators and row["implementation"] == first]
            assert measured, (family, device)
            assert statistics.median(row["speedup"] for row in measured) > 1.0, (family, device)


class OnGpu:
    """What the choice of precision looks at."""

    def __init__(self, dtype=torch.float32, is_cuda=True):
        self.dtype, self.is_cuda = dtype, is_cuda


@pytest.mark.parametrize(
    ("allowed", "setting", "other"),
    [
        (_backends.convolution_tf32, torch.backends.cudnn.conv, torch.backends.cuda.matmul),
        (_backends.matmul_tf32, torch.backends.cuda.matmul, torch.backends.cudnn.conv),
    ],
    ids=["convolution", "matmul"],
)
def test_tf32_follows_the_setting_of_what_a_kernel_replaces(allowed, setting, other):
    before = setting.fp32_precision, other.fp32_precision
    try:
        for setting.fp32_precision, other.fp32_precision in (("ieee", "tf32"), ("tf32", "ieee")):
            assert allowed(OnGpu()) is (setting.fp32_precision == "tf32")
            assert not allowed(OnGpu(torch.bfloat16))
            assert not allowed(OnGpu(is_cuda=False))
    finally:
        setting.fp32_precision, other.fp32_precision = before


def _python(code, value):
    environment = {**os.environ, "MITNET_FAST_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
