"""Verification of what can run here: what it checks, what it finds, and what it says about the rest."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mitnet_fast import _C
from mitnet_fast import verify as verification
from mitnet_fast.cli import app
from mitnet_fast.ops import _backends
from mitnet_fast.specs import DYNAMIC_FILTER, LAYOUTS, NORMALIZED_QKV, SPECS
from mitnet_fast.verify import KERNELS, verify

COMPUTED = _C.dynamic_filter_forward
SMALL = replace(DYNAMIC_FILTER, cases=(replace(DYNAMIC_FILTER.typical, seed=3),))


@pytest.fixture
def small(monkeypatch):
    """One case of one operator, in every dtype and layout."""
    monkeypatch.setattr(verification, "SPECS", (SMALL,))


def inexact(*arguments):
    return 1.001 * COMPUTED(*arguments)


def leaves_a_column_out(x, filters, residual):
    y = torch.empty_like(x)
    y[..., 1:] = COMPUTED(x, filters, residual)[..., 1:]
    return y


def raises(*arguments):
    raise RuntimeError("out of shared memory")


class Wavers:
    """One unit in the last place more at every second call: within the tolerance, and not the same."""

    calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        y = COMPUTED(*arguments)
        return y if self.calls % 2 else torch.nextafter(y, torch.full_like(y, torch.inf))


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (inexact, "y: error 1.00e-03, allowed"),
        (leaves_a_column_out, "y: error inf, allowed"),
        (raises, "RuntimeError: out of shared memory"),
        (Wavers(), "y: the same call gave other bits the second time"),
    ],
    ids=["inexact", "not written", "raises", "not repeatable"],
)
def test_a_kernel_that_is_wrong_is_found_and_said(small, monkeypatch, tmp_path, kernel, problem):
    monkeypatch.setattr(_C, "dynamic_filter_forward", kernel)
    words = ["verify", "--family", "dynamic_filter", "--backend", "cpp", "--json", str(tmp_path / "checks.json")]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 1, answer.output
    failed = [line for line in answer.output.splitlines() if line.startswith("failed: dynamic_filter on cpp, batch=2 ")]
    assert any(problem in line for line in failed)
    written = json.loads((tmp_path / "checks.json").read_text())
    assert not written["passed"]
    found = {(check["dtype"], check["tensor"]) for check in written["checks"] if not check["passed"]}
    assert ("float32", "y") in found
    assert "float64" in {dtype for dtype, _ in found}
    assert not {tensor for _, tensor in found} - {"y"}


def test_what_is_right_passes_and_every_check_is_written(small, tmp_path):
    words = ["verify", "--backend", "cpp", "--random", "2", "--json", str(tmp_path / "checks.json")]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    written = json.loads((tmp_path / "checks.json").read_text())
    assert written["passed"]
    fixed = 3 * len(LAYOUTS)  # dtypes
    assert len({check["case"] for check in written["checks"]}) == fixed + 2
    assert {check["tensor"] for check in written["checks"]} == {"y", "grad_x", "grad_filters"}
    for check in written["checks"]:
        assert check["error"] <= check["allowed"]
        assert check["problem"] is None


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_plain_pytorch_is_held_to_its_own_rule(monkeypatch, spec):
    monkeypatch.setattr(verification, "SPECS", (replace(spec, cases=(spec.typical,)),))
    checked = verify(spec.family, "reference", devices=["cpu"])
    assert checked.passed, checked.failures
    dtypes = {"float64", "float32"} | ({"bfloat16", "float16"} if spec.casts_like_convolution else set())
    assert {check.dtype for check in checked.checks} == dtypes


def test_an_empty_batch_is_no_reason_to_warn(monkeypatch, recwarn):
    empty = replace(NORMALIZED_QKV.typical, sizes=NORMALIZED_QKV.typical.sizes | {"batch": 0})
    monkeypatch.setattr(verification, "SPECS", (replace(NORMALIZED_QKV, cases=(empty,)),))
    assert verify("feature_mixing", "cpp", devices=["cpu"]).passed
    assert not recwarn.list


@pytest.mark.parametrize(
    ("family", "threads"),
    [
        ("amplitude_phase", 2),
        *(pytest.param(family, 3, marks=pytest.mark.exhaustive) for family in _backends.FAMILIES),
    ],
)
def test_kernels_pass_whatever_number_of_threads_plain_pytorch_rounds_with(family, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checked = verify(family, "cpp", devices=["cpu"])
    finally:
        torch.set_num_threads(before)
    assert checked.passed, checked.failures


@pytest.mark.parametrize("family", _backends.FAMILIES)
def test_every_operator_of_a_family_is_called_in_every_dtype_and_layout(family):
    """Counted, not run: no time is left for any call."""
    said = []
    checked = verify(family, "cpp", devices=["cpu"], random_cases=5, seconds=0, progress=lambda *n: said.append(n))
    calls = sum(
        len(spec.cases) * len(KERNELS[spec.name].dtypes["cpp", "cpu"]) * len(LAYOUTS) + 5
        for spec in SPECS
        if spec.family == family
    )
    assert checked.not_run == {f"the last {calls} of {calls} calls": "0 s are over"}
    assert checked.checks == ()
    assert not checked.passed
    assert said == []


def test_a_gpu_is_checked_in_float32_and_in_tf32(monkeypatch):
    monkeypatch.setattr(verification, "why_not", lambda *_: [])
    called = []
    monkeypatch.setattr(verification, "check_call", lambda spec, case, *where: called.append((spec, case, where)) or [])
    verify(None, "triton", devices=["cuda"])
    for spec in SPECS:
        cases = [case for of, case, where in called if (of, where) == (spec, ("triton", "cuda"))]
        exact = [case for case in cases if not case.tf32]
        kernels = KERNELS[spec.name].dtypes.get(("triton", "cuda"), frozenset())
        assert len(exact) == len(spec.cases) * len(kernels) * len(LAYOUTS)
        in_tf32 = [case for case in exact if case.dtype == torch.float32 and spec.multiplies]
        assert [case for case in cases if case.tf32] == [replace(case, tf32=True) for case in in_tf32]
        assert all("tf32" in str(case) for case in cases if case.tf32)


def test_what_cannot_run_is_said_with_its_reasons(small, monkeypatch):
    monkeypatch.setitem(_backends.UNAVAILABLE, ("triton", "cuda"), ("Triton is not installed",))
    checked = verify(None, "triton", devices=["cuda"])
    assert checked.not_run == {"dynamic_filter on triton, cuda": "Triton is not installed"}
    assert not checked.passed
    answer = CliRunner().invoke(app, ["verify", "--backend", "cpp", "--seconds", "0"])
    assert answer.exit_code == 1
    assert "nothing could run here" in answer.output
