"""The doctor's report: what it says about backends is what a call would meet, and nothing makes it fail."""

from __future__ import annotations

import importlib.metadata
import io

import pytest
import torch
from rich.console import Console

from mitnet_fast import doctor
from mitnet_fast.doctor import Ability, Finding, abilities, examine, report
from mitnet_fast.ops import _backends
from mitnet_fast.ops._backends import Kernels


def ability(family: str, backend: str, device: str = "cpu") -> Ability:
    (found,) = [a for a in abilities() if (a.family, a.backend, a.device) == (family, backend, device)]
    return found


def shown(width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    report(console)
    return console.file.getvalue()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_reason_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_forced", {})
    monkeypatch.setitem(_backends.UNAVAILABLE, ("cpp", "cpu"), ("not built [/here]",))
    assert ability("dynamic_filter", "cpp") == Ability("dynamic_filter", "cpp", "cpu", False, "not built [/here]")
    assert ability("dynamic_filter", "reference").state == "float32, float64, bfloat16, float16 (default)"
    assert "not built [/here]" in shown()


def test_dtypes_and_default_of_a_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_forced", {})
    monkeypatch.delitem(_backends.UNAVAILABLE, ("cpp", "cpu"), raising=False)
    assert ability("dynamic_filter", "cpp").state == "float32, float64, bfloat16 (default)"
    assert ability("dynamic_filter", "reference").state == "float32, float64, bfloat16, float16"


def test_forced_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_forced", {"window_attention": "cpp"})
    monkeypatch.setitem(_backends.UNAVAILABLE, ("cpp", "cpu"), ("there is no compiled half",))
    assert ability("window_attention", "reference").state == "float32, float64, bfloat16, float16"
    assert ability("window_attention", "cpp").state == "there is no compiled half"


def test_operators_of_a_family_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_forced", {})
    monkeypatch.delitem(_backends.UNAVAILABLE, ("cpp", "cpu"), raising=False)
    assert ability("feature_mixing", "cpp").state == "float32, float64, bfloat16 (default)"
    monkeypatch.setitem(doctor.KERNELS, "conv_relu", Kernels("feature_mixing"))
    found = ability("feature_mixing", "cpp")
    assert found.ready
    assert found.state == (
        "pointwise_mlp, local_mixing, local_global_mixing, normalized_qkv, dense_block, residual_conv: float32, "
        "float64, bfloat16 (default); conv_relu: cpp has no kernels of this feature_mixing operator"
    )


def test_without_a_gpu_no_backend_is_ready_for_one(no_gpu: None) -> None:
    on_gpu = [a for a in abilities() if a.device == "cuda"]
    assert [(a.family, a.ready, a.state) for a in on_gpu] == [
        (family, False, "PyTorch sees no GPU") for family in _backends.FAMILIES
    ]


def test_package_that_has_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (triton,) = [finding.found for finding in examine() if finding.subject == "Triton"]
    assert triton in ("installed, of unknown version", "not installed")
    assert doctor._package("pytest", "tests") == Finding("pytest", "installed, of unknown version")


def test_long_paths_are_shown_whole_and_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/opt/[/bold]" + "toolkit" * 12
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("nvcc", path)])
    cells = "".join(line.split("│")[3].strip() for line in shown(60).splitlines() if line.count("│") == 4)
    assert path in cells
