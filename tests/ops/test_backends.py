"""Which backend a call gets, and what is said when one asked for by name cannot run."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from mitnet_fast import ops
from mitnet_fast.ops import _backends
from mitnet_fast.ops._backends import Kernels, choose, why_not

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
    with pytest.raises(ops.BackendError, match="no kernels of the dynamic_filter family for cuda tensors"):
        choose(kernels, "cpp", "cuda", torch.float32)
    with pytest.raises(ValueError, match="got 'cudnn', allowed are None and 'reference', 'cpp', 'triton'"):
        choose(kernels, "cudnn", "cpu", torch.float32)


def test_a_family_without_kernels_says_so():
    with pytest.raises(ops.BackendError, match="triton has no kernels of the amplitude_phase family"):
        choose(Kernels("amplitude_phase"), "triton", "cpu", torch.float32)


def test_reasons_are_empty_only_for_what_runs(kernels):
    assert why_not(kernels, "cpp", "cpu", torch.float32) == []
    assert len(why_not(kernels, "cpp", "cpu", torch.int8)) == 1


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
        with pytest.raises(ops.BackendError, match="no kernels of the feature_mixing family for cuda"):
            choose(partial, "cpp", "cuda", torch.float32)
        with (
            ops.use_backend(feature_mixing="triton"),
            pytest.raises(ops.BackendError, match="triton has no kernels of the feature_mixing family"),
        ):
            choose(partial, None, "cpu", torch.float32)
        assert choose(partial, None, "cuda", torch.float32) == "reference"
    with (
        ops.use_backend(feature_mixing="cpp"),
        pytest.raises(ops.BackendError, match="no kernels of the feature_mixing family for cuda"),
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


def _python(code, value):
    environment = {**os.environ, "MITNET_FAST_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
