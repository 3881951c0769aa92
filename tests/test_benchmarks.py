"""The benchmarks measure what they say, and refuse to time what is wrong."""

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageColor
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import (
    bench,
    gpu_report,
    measure,
    models,
    ops,
    plots,
    precision,
    resources,
    scaling,
    summary,
    targets,
    work,
)
from mitnet_fast.cli import app
from mitnet_fast.inference import CPU, restore
from mitnet_fast.models import DCMPNet, MITNet
from mitnet_fast.ops import _backends
from mitnet_fast.specs import PREDICTED_DYNAMIC_FILTER, expectations
from mitnet_fast.verify import KERNELS

ON_GPUS = {  # families with kernels there, and in which backends
    "dynamic_filter": ("cpp", "triton"),
    "amplitude_phase": ("cpp", "triton"),
    "window_attention": ("cpp", "triton"),
    "feature_mixing": ("triton",),
}
FEATURE_MIXING = {spec.name for spec in bench.SPECS if spec.family == "feature_mixing"}
SMALL = replace(
    PREDICTED_DYNAMIC_FILTER.benchmark_cases[0],
    sizes=PREDICTED_DYNAMIC_FILTER.benchmark_cases[0].sizes | {"height": 24, "width": 20},
)


def test_implementations_take_turns_and_are_told_apart(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        def run(turn):
            order.append((name, turn))
            clock[0] += next(seconds)

        return run

    fast, slow = cycle((0.002, 0.003, 0.004)), repeat(0.02)
    timings = measure.take_turns({"fast": call("fast", fast), "slow": call("slow", slow)}, "cpu", seconds=0.31)
    assert timings["slow"] == measure.Timing(*[pytest.approx(0.02)] * 3, 15)  # what fits into 0.31 s of the slower one
    assert timings["fast"] == measure.Timing(pytest.approx(0.003), pytest.approx(0.002), pytest.approx(0.004), 15)
    measured = order[-2 * timings["fast"].runs :]
    assert measured[:4] == [("fast", 0), ("slow", -1), ("fast", 1), ("slow", 0)]  # never the copy just used


def test_peak_memory_sees_what_is_freed_again():
    code = (
        "import torch; from benchmarks.measure import peak_memory;"
        "f = lambda n: torch.ones(n * 2**18).sum();"  # n MiB
        "f(1); print(peak_memory(lambda: f(64), 'cpu'))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 60 * 2**20 < int(printed) < 80 * 2**20


def test_every_request_gets_a_process_of_its_own():
    first, second = (measure.in_new_process(os.getpid) for _ in range(2))
    assert len({first, second, os.getpid()}) == 3
    assert measure.in_new_process(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(RuntimeError, match=r"math\.sqrt: ValueError: .*"):
        measure.in_new_process(math.sqrt, -1.0)
    with pytest.raises(RuntimeError, match="the process ended with status"):
        measure.in_new_process(os._exit, 3)
    assert measure.in_new_process(math.sqrt, 4.0) == 2.0


def test_results_are_the_same_in_both_files(tmp_path):
    @dataclass
    class Row:
        name: str
        value: float

    measure.write_results([Row("a", 1.5), Row("b", 2.0)], tmp_path / "new" / "results")
    with open(tmp_path / "new" / "results.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "a", "value": "1.5"}, {"name": "b", "value": "2.0"}]
    assert json.loads((tmp_path / "new" / "results.json").read_text())[1] == {"name": "b", "value": 2.0}


@pytest.mark.parametrize("mode", ["amplitude", "phase"])
def test_spectra_by_complex_numbers_are_the_same_operator(mode):
    (spec,) = (spec for spec in bench.SPECS if spec.name == "amplitude_phase_conv")
    case = replace(spec.typical, options=spec.typical.options | {"mode": mode}, dtype=torch.float64)
    fused = spec.inputs(case)
    weight, channels = fused["output_weight"], fused["x"].shape[1]
    assert weight.shape[1] == 2 * channels
    plain = fused | {"output_weight": None, "output_bias": None}
    for tensors in (fused, fused | {"output_weight": weight[:, :channels]}, plain):
        complex_form = ops.complex_amplitude_phase_conv(**tensors, **case.options)
        torch.testing.assert_close(complex_form, spec.run(case, tensors, "reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("work", [models.TRAINING, models.INFERENCE])
def test_the_plain_network_that_others_are_compared_with_is_right(work, monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    for name in models.PLAIN:
        assert models.is_correct("MITNet", work, models.IMPLEMENTATIONS[name], "cpu")


def test_shifted_slices_are_the_same_operator():
    tensors = PREDICTED_DYNAMIC_FILTER.inputs(replace(SMALL, dtype=torch.float64))
    expected = PREDICTED_DYNAMIC_FILTER.run(SMALL, tensors, "reference")
    torch.testing.assert_close(ops.shifted_slices(**tensors, **SMALL.options), expected)


def test_a_wrong_implementation_has_no_speed(monkeypatch):
    monkeypatch.setattr(ops, "in_new_process", lambda *_: 0.0)
    held_to = []
    monkeypatch.setattr(ops, "expectations", lambda *a: (held_to.append(a[-1]), expectations(*a))[1])

    def implementations(spec, case, device, compiled):
        def right(**tensors):
            return spec.run(case, tensors, "reference")

        return {"eager": right, "wrong": lambda **tensors: 1.001 * right(**tensors)}

    monkeypatch.setattr(ops, "implementations", implementations)
    rows = ops.benchmark(PREDICTED_DYNAMIC_FILTER, SMALL, "cpu", 0.01, False)
    assert [(row.implementation, row.work) for row in rows] == [
        ("eager", "forward"),
        ("wrong", "forward"),
        ("eager", "forward + backward"),
        ("wrong", "forward + backward"),
    ]
    for row in rows:
        assert row.problem == (None if row.implementation == "eager" else "fails its check")
        assert (row.median_ms is None) == (row.speedup is None) == (row.implementation == "wrong")
        assert row.case == "[2, 20, 24, 20] kernel_size=3 features=20 bias=2 residual=True"
    assert held_to == ["reference"]  # the truth is computed once


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 1.0),  # 16 blocks of 4 warps
        (64, 0, 4, 0.5),  # 65536 / (64 · 32 · 4) = 8 blocks
        (255, 0, 8, 8 / 64),  # 256 · 32 · 8 registers: one block
        (32, 100 * 1024, 4, 8 / 64),  # two blocks by shared memory
        (16, 0, 1, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy(registers, shared, warps, expected):
    assert resources.occupancy(90, registers, shared, warps) == expected


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        ("kernel<HalfAttention<__nv_bfloat16>, 16>", ["HalfAttention<__nv_bfloat16>", "16"]),
        ("kernel<FilterSizes<Tf32Products, 3, 4> >", ["FilterSizes<Tf32Products, 3, 4>"]),
        ("kernel<true, false>", ["true", "false"]),
        ("kernel", []),
    ],
)
def test_template_arguments(kernel, arguments):
    assert resources.template_arguments(kernel) == arguments


def test_the_table_of_resources_has_architectures_side_by_side(tmp_path):
    rows = [
        resources.Row("CUDA", "a<1>", "sm_80", 32, 0, 1536, 4, 1.0, "nvcc 13.0"),
        resources.Row("Triton", "b", "sm_90", 64, 8, 0, 8, 0.5, "Triton 3.6"),
        resources.Row("CUDA", "a<1>", "sm_90", 40, 0, 1536, 4, 0.75, "nvcc 13.0"),
    ]
    resources.write_table(rows, tmp_path / "table.md")
    text, _, *table, end = (tmp_path / "table.md").read_text().split("\n")
    assert text.startswith("Compiled by nvcc 13.0 and Triton 3.6, not run: ")
    assert end == ""
    assert table == [
        "| kernel | sm_80 | sm_90 |",
        "|---|---|---|",
        "| CUDA: `a<1>` | 32 regs, 0 B spilled, 1.5 KB, 4 warps, 100% | 40 regs, 0 B spilled, 1.5 KB, 4 warps, 75% |",
        "| Triton: `b` |  | 64 regs, 8 B spilled, 0.0 KB, 8 warps, 50% |",
    ]


def test_a_part_that_fails_leaves_the_others_standing(tmp_path, monkeypatch, capsys):
    python = sys.executable
    monkeypatch.setattr(
        gpu_report,
        "parts",
        lambda folder: [
            gpu_report.Part("missing", ("/no/such/program",), 6),
            gpu_report.Part("slow", (python, "-c", "import time; print('begun', flush=True); time.sleep(60)"), 6),
            gpu_report.Part("wrong", (python, "-c", "print('said'); raise SystemExit(3)"), 60),
            gpu_report.Part("good", (python, "-c", "print('fine')"), 60),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report")])
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main()
    assert stopped.value.code == 1
    results = {e["part"]: e["result"] for e in json.loads((tmp_path / "report" / "summary.json").read_text())["parts"]}
    assert results["missing"].startswith("could not start")
    assert results["slow"] == "stopped after 6 s"
    assert results["wrong"] == "failed with exit code 3"
    assert results["good"] == "passed"
    assert (tmp_path / "report" / "wrong.log").read_text() == "said\n"
    assert (tmp_path / "report" / "slow.log").read_text() == "begun\n"
    assert "| good | passed |" in (tmp_path / "report" / "summary.md").read_text()
    assert "good: passed" in capsys.readouterr().out


def test_checks_run_side_by_side_after_what_is_measured(tmp_path, monkeypatch):
    def part(name, waits_for, **options):
        code = (
            "import sys, time; from pathlib import Path; own, other = map(Path, sys.argv[1:]); own.touch()\n"
            "while not other.exists(): time.sleep(0.01)"
        )
        command = (sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / waits_for))
        return gpu_report.Part(name, command, 60, **options)

    monkeypatch.setattr(
        gpu_report,
        "parts",
        lambda folder: [
            part("a", "b"),
            part("b", "a"),
            part("measured", "measured", alone=True),
            part("c", "measured"),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report")])
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main()
    assert stopped.value.code == 0
    results = json.loads((tmp_path / "report" / "summary.json").read_text())["parts"]
    assert [entry["result"] for entry in results] == ["passed"] * 4
    assert results[0]["part"] == "measured"


def test_measuring_leaves_time_for_the_checks(tmp_path, monkeypatch):
    left = {}

    def run(part, folder, deadline):
        left[part.name] = deadline - time.monotonic()
        return {"part": part.name, "result": "passed", "seconds": 0.0}

    monkeypatch.setattr(gpu_report, "run_part", run)
    for words in ([], ["--part", "operators"]):
        monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path), "--minutes", "1", *words])
        with pytest.raises(SystemExit):
            gpu_report.main()
        expected = 60.0 if words else 36.0
        assert all(left[name] == pytest.approx(expected, abs=5) for name in left if name.startswith("operators"))
    assert {name: round(left[name], -1) for name in left if name.startswith("verify")} == dict.fromkeys(
        [f"verify-{family}-{backend}" for family, backends in ON_GPUS.items() for backend in backends], 60.0
    )
    assert {name for name in left if name.startswith("operators")} == {
        *(f"operators-{family}" for family in ON_GPUS),
        *(f"operators-{family}-bfloat16" for family in ON_GPUS if family != "amplitude_phase"),  # float32 alone
    }


def test_a_part_that_is_stopped_takes_along_what_it_started(tmp_path):
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); child.wait()"
    )
    part = gpu_report.Part("parent", (sys.executable, "-c", code), 6)
    result = gpu_report.run_part(part, tmp_path, time.monotonic() + 60)
    assert result["result"] == "stopped after 6 s"
    child = Path("/proc") / (tmp_path / "parent.log").read_text().strip() / "stat"
    for _ in range(100):  # a killed process stays as a zombie until its new parent looks
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the child is still there")


def test_the_sanitizers_tools_run_the_same_calls_without_cached_memory(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report"), "--part", "sanitizer"])
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main()
    assert stopped.value.code == 0
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        printed = (tmp_path / "report" / f"sanitizer-{tool}.log").read_text().split()
        assert printed[:5] == ["1", "--tool", tool, "--error-exitcode", "1"]
        assert printed[6:] == ["-m", "benchmarks.gpu_report", str(tmp_path / "report"), "--calls-for-sanitizer"]


def test_the_sanitizers_calls_reach_every_operator_and_both_ways_to_transform(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_report, "why_not", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Recorded:
        def __init__(self, spec):
            self.spec, self.name, self.family, self.typical = spec, spec.name, spec.family, spec.typical

        def inputs(self, case, device):
            assert device == "cuda"
            return self.spec.inputs(case, "cpu")

        def run(self, case, tensors, backend):
            seen.append((self.spec.name, backend, case.dtype, case.sizes["height"], case.sizes["width"], case.layout))
            return self.spec.run(case, tensors, "reference")

        def gradient(self, case, y):
            return self.spec.gradient(case, y)

    monkeypatch.setattr(gpu_report, "SPECS", [Recorded(spec) for spec in gpu_report.SPECS])
    monkeypatch.setattr(gpu_report, "outputs_and_gradients", lambda *_: None)
    gpu_report.calls_for_sanitizer()
    assert len(seen) == len(set(seen)) == 2 * (2 * (3 * 3 + 1) + 3 * len(FEATURE_MIXING))
    assert ("amplitude_phase_conv", "cpp", torch.float32, 16, 8, "channels_last") in seen
    others = {spec.name for spec in gpu_report.SPECS if spec.family != "feature_mixing"}
    assert {name for name, *_ in seen} == others | FEATURE_MIXING
    assert {backend for name, backend, *_ in seen if name in FEATURE_MIXING} == {"triton"}


def test_the_report_names_its_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report"), "--part", "nothing"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "verify" in capsys.readouterr().err


# of a training step at batch 8, 256×256, float32: operators and gigabytes on a CPU, kernels and gigabytes in Triton;
# what is reached must not be lost
WORK = {"MITNet": (336, 24.9, 773, 29.1), "DCMPNet": (814, 69.1, 2390, 82.4)}


@pytest.mark.parametrize("network", WORK)
def test_the_work_of_a_training_step_does_not_grow(network):
    published, plain, fused, in_triton = work.rows(network)
    assert (published.operators, published.gigabytes) == work.PUBLISHED[network]
    assert fused.operators <= WORK[network][0]
    assert fused.gigabytes <= WORK[network][1]
    assert fused.operators < plain.operators
    assert fused.gigabytes < plain.gigabytes
    assert in_triton.operators == fused.operators < in_triton.kernels <= WORK[network][2]
    assert in_triton.gigabytes <= WORK[network][3]
    for row in (fused, in_triton):
        parts = {each.part: each for each in work.parts(network) if each.implementation == row.implementation}
        assert sum(part.operators for part in parts.values()) == row.operators
        assert sum(part.gigabytes for part in parts.values()) == pytest.approx(row.gigabytes, abs=0.5)  # rounded each
        called = work.count(network, 8, 256, row.implementation).operators
        assert parts[work.CONVOLUTIONS].operators == called["convolution"] + called["convolution_backward"]
        fused_operators = {spec.name for spec in bench.SPECS} & set(called)
        assert all(parts[name].operators == called[name] + called[f"{name}_backward"] for name in fused_operators)
        assert len(fused_operators) >= 3


def test_fused_networks_run_on_gpus_by_the_kernels_that_there_are(monkeypatch):
    monkeypatch.setattr(_backends, "UNAVAILABLE", {})
    with models.IMPLEMENTATIONS["fused"].backends("cuda"):
        chosen = {name: _backends.choose(kernels, None, "cuda", torch.float32) for name, kernels in KERNELS.items()}
    assert {name for name, backend in chosen.items() if backend == "triton"} == FEATURE_MIXING
    assert {name for name, backend in chosen.items() if backend == "cpp"} == {
        spec.name for spec in bench.SPECS if spec.family != "feature_mixing"
    }


@pytest.mark.parametrize("network", WORK)
def test_networks_run_the_fused_operators_without_being_told(network):
    by_default = work.count(network, 8, 256, None).operators
    assert by_default == work.count(network, 8, 256, work.ON_CPU).operators
    assert sum(by_default[spec.name] for spec in bench.SPECS) > 10


def test_only_what_there_is_is_counted(monkeypatch):
    assert work.implementations() == list(work.BACKENDS)
    monkeypatch.setattr(work, "find_spec", lambda name: None)
    assert work.implementations() == [work.PLAIN, work.ON_CPU]
    monkeypatch.setitem(work.UNAVAILABLE, ("cpp", "cpu"), ("not built",))
    assert work.implementations() == [work.PLAIN]
    assert work.parts("MITNet") == []


def test_work_counts_operands_and_results_of_what_is_no_view():
    with work.WorkCounter() as counter:
        x = torch.ones(2, 3, 4)  # fill, in place of empty memory
        y = x.view(6, 4).t() @ torch.ones(6, 5)
        y.relu_()
    assert counter.operators == {"ones": 2, "mm": 1, "relu_": 1}
    assert counter.bytes == {"ones": 4 * (24 + 30), "mm": 4 * (24 + 30 + 20), "relu_": 4 * 20 * 2}


def forget_checks():
    for check in (models._truth, models.restores_alike, models._first_step, models.trains_alike, models.flops):
        check.cache_clear()


def test_a_network_that_is_wrong_has_no_speed(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        def forward(self, image):
            return SimpleNamespace(restored=self.layer(image))

        @torch.no_grad()
        def restore(self, image):
            wrong = image.dtype == torch.float32 and _backends._forced.get("dynamic_filter") != "reference"
            return self.layer(image) * (1.001 if wrong else 1)

    monkeypatch.setitem(models.NETWORKS, "MITNet", Network)
    monkeypatch.setattr(models, "measured_memory", lambda *_: 1.0)
    forget_checks()
    rows = models.measure("MITNet", "inference", 1, 16, "cpu", 0.01)
    assert [row.implementation for row in rows] == list(models.IMPLEMENTATIONS)
    for row in rows:
        fused = row.implementation.startswith("fused")
        assert row.problem == ("fails its check" if fused else None)
        assert (row.median_ms is None) == (row.speedup is None) == fused
    assert max(row.speedup for row in rows if row.problem is None) == 1.0
    forget_checks()


@contextmanager
def wrong_gradients(device):
    """Plain PyTorch, but convolutions pass on a little too much of their gradients."""

    def too_much(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * (1 + 1e-6))

    handle = torch.nn.modules.module.register_module_forward_hook(too_much)
    try:
        with _backends.use_backend("reference"):
            yield
    finally:
        handle.remove()


def test_training_steps_with_wrong_gradients_have_no_speed(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setitem(models.IMPLEMENTATIONS, "fused", models.Implementation(wrong_gradients))
    monkeypatch.setattr(models, "measured_memory", lambda *_: 1.0)
    forget_checks()
    rows = {row.implementation: row for row in models.measure("MITNet", models.TRAINING, 1, 16, "cpu", 0.01)}
    assert models.is_correct("MITNet", models.INFERENCE, models.IMPLEMENTATIONS["fused"], "cpu")
    assert rows["fused"].problem == "fails its check"
    assert rows["fused"].median_ms is rows["fused"].gigaflops is None
    for name in ("plain", "plain, channels_last", "fused, channels_last"):
        assert rows[name].problem is None
        assert rows[name].gigaflops == pytest.approx(
            models.flops("MITNet", models.TRAINING, 1, 16) / rows[name].median_ms / 1e6
        )
    forget_checks()


def test_operations_of_a_network_are_those_of_its_convolutions(monkeypatch):
    network = torch.nn.Conv2d(3, 5, 3, padding=1)
    monkeypatch.setattr(
        network, "forward", lambda x: SimpleNamespace(restored=network._conv_forward(x, *network.parameters()))
    )
    monkeypatch.setitem(models.NETWORKS, "MITNet", lambda: network)
    forget_checks()
    products = 2 * 2 * 8 * 8 * 3 * 5 * 9
    assert models.flops("MITNet", models.INFERENCE, 2, 8) == products
    assert models.flops("MITNet", models.TRAINING, 2, 8) == 2 * products  # no gradient of the image
    forget_checks()


def test_what_is_compiled_or_recorded_is_held_against_eager_steps(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    compiled = models.COMPILED["compile"]
    where = ("MITNet", models.TRAINING, compiled, 1, 16, "cpu", "float32")
    steps = models.turn("MITNet", models.TRAINING, models.IMPLEMENTATIONS["plain"], 1, 16, "cpu")
    assert models.runs_alike(steps, *where)
    for wrong in (1.02, float("nan")):
        steps = models.turn("MITNet", models.TRAINING, models.IMPLEMENTATIONS["plain"], 1, 16, "cpu")
        assert not models.runs_alike(
            lambda i, f=steps, w=wrong: {"total": f(i)["total"] * (w if i == 3 else 1)}, *where
        )


def test_float32_is_labelled_by_the_setting_that_an_operator_follows(monkeypatch):
    specs = {spec.name: spec for spec in bench.SPECS}
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="tf32"))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="none"))
    for name, expected in (("predicted_dynamic_filter", "TF32"), ("window_attention", "IEEE")):
        case = specs[name].benchmark_cases[0]
        assert ops.precision(specs[name], case, "cuda") == expected
        assert ops.precision(specs[name], case, "cpu") == "IEEE"
        assert ops.precision(specs[name], replace(case, dtype=torch.bfloat16), "cuda") == "IEEE"
    assert measure.float32_precision("cuda") == "TF32"


def test_inputs_are_copied_until_they_are_more_than_a_cache():
    small = {"x": torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "bias": None}
    copies = ops.copied(small)
    assert len(copies) == ops.COPIES[1]
    assert len({copy["x"].data_ptr() for copy in copies}) == len(copies)
    assert all(copy["x"].requires_grad and copy["bias"] is None for copy in copies)
    assert copies[0]["x"].stride() == small["x"].stride()
    assert len(ops.copied({"x": torch.empty(ops.ROTATED // 16)})) == 4
    assert len(ops.copied({"x": torch.empty(ops.ROTATED)})) == ops.COPIES[0]


def test_results_without_a_repository_name_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.environment("cpu")["commit"] == ""
    monkeypatch.undo()
    installed = tmp_path / "site-packages" / "benchmarks" / "measure.py"
    installed.parent.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # somebody else's
    monkeypatch.setattr(measure, "__file__", str(installed))
    assert measure.environment("cpu")["commit"] == ""


SMALL_MITNET = ("mitnet-its", "network.width=4", "network.depth=2")


def test_steps_with_data_read_photographs_from_disk(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setattr(models, "is_correct", lambda *_: True)
    rows = models.measure("MITNet", models.WITH_DATA, 2, 32, "cpu", 0.01)
    assert [row.implementation for row in rows] == ["plain, channels_last", "fused, channels_last"]
    for row in rows:
        assert (row.case, row.problem, row.memory_mb) == ("[2, 3, 32, 32] workers=0", None, None)
        assert row.runs >= 3
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
    assert rows[0].speedup == 1.0
    assert rows[1].speedup == pytest.approx(rows[0].median_ms / rows[1].median_ms)


def test_what_does_not_compile_is_a_row_without_a_time(monkeypatch):
    def fail(function, **_):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setattr(models, "is_correct", lambda *_: True)
    monkeypatch.setattr(models, "measured_memory", lambda *_: 1.0)
    monkeypatch.setattr(torch, "compile", fail)
    rows = models.measure("MITNet", models.TRAINING, 1, 16, "cpu", 0.01, compiled=True)
    assert [row.implementation for row in rows] == [*models.IMPLEMENTATIONS, "compile"]
    assert rows[-1].median_ms is None
    assert rows[-1].problem.startswith("does not compile: ")
    assert rows[-1].problem.endswith("RuntimeError: no compiler here")
    assert all(row.median_ms > 0 and row.problem is None for row in rows[:-1])


def result(name: str, work: str, implementation: str, ms: float | None, **others) -> dict:
    """A row of a run's results."""
    values = dict.fromkeys(measure.Result.__annotations__)
    values |= {"kind": "operator", "case": "[2, 20, 256, 256] more", "dtype": "float32", "layout": "contiguous"}
    return values | {"name": name, "work": work, "implementation": implementation, "median_ms": ms} | others


def test_targets_are_met_missed_or_not_measured():
    both = "forward + backward"
    rows = [
        result("predicted_dynamic_filter", both, "eager", 50.0, memory_mb=100.0),
        result("predicted_dynamic_filter", both, "cpp", 10.0, memory_mb=20.0),
        result("predicted_dynamic_filter", both, "compile", 25.0),
        result("predicted_dynamic_filter", both, "compile, shifted slices", 12.5),
        *(result("MITNet", "inference", name, ms, kind="network") for name, ms in (("plain", 30), ("fused", 25))),
        *(
            result("MITNet", "inference", f"{name}, channels_last", ms, kind="network", layout="channels_last")
            for name, ms in (("plain", 24), ("fused", 15))
        ),
    ]
    verdicts = {verdict.subject: verdict for verdict in targets.judge(rows, "cpu")}
    filter_ = "CPU: predicted_dynamic_filter [2, 20, 256, 256], forward + backward"
    expected = {
        f"{filter_}: time against eager": ("≥ 5.00×", "5.00×", "met"),
        f"{filter_}: memory against eager": ("≤ 0.100", "0.200", "missed"),
        f"{filter_}: time against compile": ("≥ 2.00×", "1.25×", "missed"),
        "CPU: MITNet, inference: time against plain": ("≥ 1.50×", "1.60×", "met"),
        "CPU: MITNet, training step: time against plain": ("≥ 1.30×", "", "not measured"),
    }
    for subject, (aim, found, word) in expected.items():
        verdict = verdicts[subject]
        assert (verdict.aim, verdict.result, verdict.word) == (aim, found, word)
    assert {verdict.word for verdict in targets.judge(rows, "cuda")} == {"not measured"}
    gpu = [verdict for verdict in verdicts.values() if verdict.subject.startswith("GPU")]
    assert len(gpu) == sum(target.device == "cuda" for target in targets.TARGETS)
    assert {verdict.word for verdict in gpu} == {"not measured"}
    counted = [{"network": "MITNet", "implementation": work.ON_CPU, "operators": 400, "gigabytes": 25.1}]
    assert [verdict.word for verdict in targets.judge_work(counted)] == ["met", "missed", *["not measured"] * 6]


def test_a_target_is_not_judged_before_every_baseline_has_run():
    both = "forward + backward"
    cases = [{"case": shape, "dtype": "bfloat16"} for shape in targets.ATTENTION_CASES]
    rows = [
        result("window_attention", both, name, ms, **each)
        for each in cases
        for name, ms in (("eager", 9.0), ("SDPA", 6.0), ("triton", 2.0))
    ]

    def judged(rows):
        of_half = [v for v in targets.judge(rows, "cuda") if "bfloat16" in v.subject]
        (verdict,) = (v for v in of_half if "against compile or SDPA" in v.subject)
        return verdict.word, verdict.result

    assert judged(rows) == ("not measured", "")
    failed = [result("window_attention", both, "compile", None, problem="does not run", **each) for each in cases]
    assert judged([*rows, *failed]) == ("not measured", "")
    compiled = [result("window_attention", both, "compile", 5.0, **each) for each in cases]
    assert judged([*rows, *failed, *compiled]) == ("met", "2.50×")


def test_a_target_holds_in_its_worst_case_and_layout():
    case = dict(zip(("case", "layout"), ("[8, 24, 256, 256]", "channels_last"), strict=True))
    rows = []
    for shape, share in (("[8, 24, 256, 256]", 0.9), ("[8, 48, 128, 128]", 0.72), ("[8, 96, 64, 64]", 0.8)):
        for layout, loss in (("contiguous", 1.0), ("channels_last", 0.99)):
            case = {"case": f"{shape} num_heads=2", "layout": layout}
            shares = {"bandwidth_share": 0.1, "matrix_rate_share": share * loss}
            rows += [result("window_attention", "forward + backward", "triton", 1.0, **case, **shares)]
    (verdict,) = (v for v in targets.judge(rows, "cuda") if "window" in v.subject and "limit" in v.subject and v.result)
    assert (verdict.result, verdict.word) == ("71%", "met")


def test_every_target_is_about_a_case_that_the_benchmarks_measure():
    cases = {spec.name: [ops._shape(case) for case in spec.benchmark_cases] for spec in bench.SPECS}
    for target in targets.TARGETS:
        if target.name in models.NETWORKS:
            assert target.work in models.WORK
            continue
        measured = [case.replace("[2,", "[8,") if target.device == "cuda" else case for case in cases[target.name]]
        assert all(any(case.startswith(wanted) for case in measured) for wanted in target.cases)


PLAIN_SIZES, FUSED_SIZES = scaling.COMPARED
MEASURED_AT = {"device": "cpu", "threads": "2", "torch": "2", "triton": "", "python": "3", "commit": "c"}


def size(network: str, name: str, batch: int, side: int, seconds: float, runs: int, memory_mb: float):
    """A row of a run over image sizes."""
    times = {"seconds": seconds, "p20_seconds": 0.9 * seconds, "p80_seconds": 1.2 * seconds}
    kinds = {"dtype": "float32", "layout": "channels_last", "precision": "IEEE"}
    sizes = {"batch": batch, "side": side, "runs": runs, "memory_mb": memory_mb}
    return scaling.Scaling(network=network, implementation=name, **sizes, **kinds, **times, **MEASURED_AT)


def sizes_measured(monkeypatch, seconds, megabytes, available=1e9, device="cpu", left=1e9, limit=math.inf):
    """Rows of a run, and what take turns, where calls last and take what these functions of name and pixels say.

    More than ``limit`` megabytes, of one call or of all that take turns, do not fit; only calls move the clock.
    """
    clock, turns = [0.0], []

    def call(name, pixels):
        if megabytes(name, pixels) > limit:
            raise torch.OutOfMemoryError
        clock[0] += seconds(name, pixels)
        return seconds(name, pixels), megabytes(name, pixels)

    def take_turns(calls, device, *, seconds, least):
        timed = {name: [call(name, pixels)[0] for _ in range(1 + least)][1:] for name, pixels in calls.items()}
        turns.append((pixels := next(iter(calls.values())), tuple(calls)))
        if sum(megabytes(name, pixels) for name in calls) > limit:
            raise torch.OutOfMemoryError
        return {name: measure.Timing(times[0], 0.9 * times[0], 1.1 * times[0], least) for name, times in timed.items()}

    monkeypatch.setattr(scaling, "once", lambda _, name, batch, side, device: call(name, batch * side**2))
    monkeypatch.setattr(scaling, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(scaling, "turn", lambda _, work, implementation, batch, side, device: batch * side**2)
    monkeypatch.setattr(scaling, "take_turns", take_turns)
    monkeypatch.setattr(scaling, "_available_mb", lambda: available)
    monkeypatch.setattr(scaling, "environment", lambda device: MEASURED_AT)
    monkeypatch.setattr(scaling, "float32_precision", lambda device: "TF32" if device == "cuda" else "IEEE")
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return list(scaling.measure("MITNet", device, left, batches=(1, 2))), turns


def sides(rows, name):
    return [row.side for row in rows if (row.implementation, row.batch) == (name, 1)]


def test_every_implementation_goes_on_until_its_own_memory_ends(monkeypatch):
    def megabytes(name, pixels):
        return pixels * (4e-3 if name == PLAIN_SIZES else 1e-3)

    available = 4 * megabytes(PLAIN_SIZES, 512**2) / scaling.MEMORY_SHARE
    for few, enough in ((512, available - 1), (1024, available + 1)):
        rows, _ = sizes_measured(monkeypatch, lambda *_: 0.1, megabytes, available=enough)
        assert sides(rows, PLAIN_SIZES) == [64 * 2**step for step in range(10) if 64 * 2**step <= few]
        assert sides(rows, FUSED_SIZES)[-1] == 2 * few
        assert [(row.implementation, row.batch, row.side) for row in rows[-2:]] == [
            (name, 2, 128) for name in scaling.COMPARED
        ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_long_calls_are_not_timed_again(device, monkeypatch):
    def seconds(name, pixels):
        return pixels * (3e-5 if name == PLAIN_SIZES else 1.5e-5)

    def measured(left):
        return sizes_measured(monkeypatch, seconds, lambda *_: 1.0, left=left, device=device)

    until_512 = sum(5 * seconds(name, side**2) for name in scaling.COMPARED for side in (64, 128, 256))
    fused, plain = 5 * seconds(FUSED_SIZES, 512**2), seconds(PLAIN_SIZES, 512**2)
    assert 3 < fused / 5 < scaling.REPEATED < plain < fused
    for left, largest in (
        (-1, (128, 256)),
        (fused - 1, (256, 256)),
        (fused + 1, (256, 512)),
        (fused + plain + 1, (512, 512)),
    ):
        rows, turns = measured(until_512 + left)
        assert (sides(rows, PLAIN_SIZES)[-1], sides(rows, FUSED_SIZES)[-1]) == largest
    rows, turns = measured(until_512 + fused + 1)
    assert turns == [
        *((pixels, scaling.COMPARED) for pixels in (64**2, 128**2, 256**2)),
        (512**2, (FUSED_SIZES,)),
        (2 * 128**2, scaling.COMPARED),
    ]
    assert {row.runs for row in rows} == {3}
    for row in rows:
        assert row.seconds == seconds(row.implementation, row.batch * row.side**2)
        assert (row.p20_seconds, row.p80_seconds) == (0.9 * row.seconds, 1.1 * row.seconds)
        assert (row.dtype, row.layout) == ("float32", "channels_last")
        assert row.precision == {"cpu": "IEEE", "cuda": "TF32"}[device]

    rows, turns = measured(150.0)
    single = [row for row in rows if row.runs == 1]
    assert [(row.implementation, row.side) for row in single] == [
        (PLAIN_SIZES, 512),
        (PLAIN_SIZES, 1024),
        (FUSED_SIZES, 1024),
    ]
    assert (512**2, (FUSED_SIZES,)) in turns
    assert all(row.p20_seconds == row.seconds == row.p80_seconds for row in single)


def test_larger_images_are_restored_in_tiles_as_long_as_there_is_time(monkeypatch):
    (tiles,) = models.TILED
    of_a_tile = 10.0  # seconds; smaller images take none

    def seconds(name, pixels):
        return of_a_tile * (pixels // 1024**2)

    def measured(largest_whole, left=1e9, much=2000.0):
        def megabytes(name, pixels):
            return 1.0 if name == tiles or pixels <= largest_whole**2 // 4 else much

        return sizes_measured(monkeypatch, seconds, megabytes, 3 * much / scaling.MEMORY_SHARE, left=left)[0]

    for whole, tiled in ((512, []), (1024, [2048, 4096, 8192]), (4096, [4096, 8192]), (8192, [8192])):
        rows = measured(whole)
        assert sides(rows, FUSED_SIZES)[-1] == whole
        assert sides(rows, tiles) == tiled
        assert [(row.side, row.batch) for row in rows[-2:]] == [(128, 2), (128, 2)]
    for left, tiled in ((9 * of_a_tile - 1, []), (9 * of_a_tile + 1, [2048])):  # three by three overlap
        assert sides(measured(1024, left=2 * of_a_tile + left), tiles) == tiled
    assert sides(measured(1024, much=1500.0), tiles) == [2048, 4096]  # of 8192² the image alone has 3,490 MB


@pytest.mark.parametrize("name", scaling.WAYS)
def test_a_call_of_every_implementation_is_timed(name):
    seconds, megabytes = scaling.once("MITNet", name, 1, 64, "cpu")
    assert 0 < seconds < 60
    assert 0 < megabytes < 1000


def test_tiles_are_those_of_dehaze(monkeypatch):
    monkeypatch.setattr(models, "OVERLAP", 16)
    (tiled,) = models.TILED.values()
    in_tiles = models.prepare("MITNet", models.INFERENCE, replace(tiled, tile=32), 1, 48, "cpu")()
    torch.manual_seed(0)
    network = models.NETWORKS["MITNet"]().to(memory_format=tiled.layout).eval()
    hazy = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(in_tiles, restore(network, hazy, device=CPU, tile=32, overlap=16)[0])
    assert not torch.allclose(in_tiles, restore(network, hazy, device=CPU)[0])


def test_the_picture_of_sizes_names_panels_and_lines():
    (tiles,) = models.TILED
    rows = [
        asdict(size("MITNet", name, batch, side, 1.0, 3, 100.0))
        for name, batch, side in ((FUSED_SIZES, 1, 64), (FUSED_SIZES, 2, 128), (FUSED_SIZES, 1, 128), (tiles, 1, 8192))
    ]
    axes = plots.scaling(rows).axes
    assert [each.get_title(loc="left") for each in axes] == [
        "seconds per image",
        "peak memory, MB",
        "seconds per image of 128²",
    ]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["MITNet, fused", "MITNet, tiles"]


def test_time_that_has_run_out_ends_at_the_first_size(monkeypatch):
    rows, _ = sizes_measured(monkeypatch, lambda *_: 0.1, lambda *_: 1.0, left=0.0)
    assert [(row.implementation, row.batch) for row in rows] == [(name, n) for n in (1, 2) for name in scaling.COMPARED]


def test_a_gpu_whose_memory_ends_stops_one_implementation(monkeypatch):
    def megabytes(name, pixels):
        return pixels * (4e-3 if name == PLAIN_SIZES else 1e-3)

    rows, turns = sizes_measured(monkeypatch, lambda *_: 0.1, megabytes, device="cuda", available=0.0, limit=4200.0)
    assert sides(rows, PLAIN_SIZES)[-1] == 1024
    assert sides(rows, FUSED_SIZES)[-1] == 2048
    assert {row.runs for row in rows} == {3}
    # together they need more than there is: each is timed by itself
    assert [names for pixels, names in turns if pixels == 1024**2] == [scaling.COMPARED, (PLAIN_SIZES,), (FUSED_SIZES,)]


def test_the_image_that_needs_a_gib_lies_between_measured_sizes():
    megabytes = {256: 128.0, 512: 460.0, 1024: 1180.0, 2048: 3660.0}  # less for every further pixel

    others = ((PLAIN_SIZES, 1), (FUSED_SIZES, 2))

    def found(*measured):
        rows = [asdict(size("MITNet", FUSED_SIZES, 1, side, 1.0, 3, megabytes[side])) for side in measured]
        rows += [asdict(size("MITNet", name, batch, 99, 1.0, 3, 9e4)) for name, batch in others]
        functions = (scaling.largest_side_per_gib, scaling.image_per_gib, scaling.bytes_per_further_pixel)
        return [function(rows, "MITNet", FUSED_SIZES) for function in functions]

    side = int((512**2 + (1024**2 - 512**2) * (2**30 / 1e6 - 460) / (1180 - 460)) ** 0.5)
    further = (3660e6 - 1180e6) / (2048**2 - 1024**2)
    assert 950 < side < 970
    assert found(2048, 256, 1024, 512) == [side, f"{side}²", pytest.approx(further)]
    assert found(256, 512) == [None, "more than 512²", pytest.approx((460e6 - 128e6) / (512**2 - 256**2))]
    assert found(1024, 2048) == [None, "", pytest.approx(further)]
    assert found(256) == [None, "more than 256²", None]
    assert found(1024) == [None, "", None]
    assert found() == [None, "", None]


def test_the_terminal_tells_single_calls():
    console = Console(width=80, file=io.StringIO())
    rows = [size("MITNet", PLAIN_SIZES, 1, 2048, 112.5, 1, 991.0), size("DCMPNet", FUSED_SIZES, 2, 128, 0.5, 4, 5.9e3)]
    scaling.show([asdict(row) for row in rows], console)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert [PLAIN_SIZES, "2048²", "112.500", "one call", "1", "991"] in lines
    assert [FUSED_SIZES, "2 × 128²", "0.500", "0.450–0.600", "4", "5900"] in lines


def test_the_summary_tells_how_far_images_and_precision_go(quick_run, tmp_path):
    folder, _ = quick_run
    for file in ("bench.json", "rates.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    sizes = [
        size(network, name, batch, side, side / 1e3, 1 if side == 128 else 3, 10.0 * side)
        for network in models.NETWORKS
        for name in scaling.COMPARED
        for batch, side in ((1, 64), (1, 128), (2, 128))
    ]
    measure.write_results(sizes, tmp_path / "scaling")
    row = precision.Row("MITNet", "phase stage", "bfloat16", 6, 25.0, -0.0125, 0.9, 3.2, **MEASURED_AT)
    measure.write_results([row], tmp_path / "precision")
    drawn = {file.name: file.read_bytes() for file in plots.draw(tmp_path)}
    assert drawn.keys() == {
        f"{name}.{suffix}" for name in ("operators", "roofline", "scaling") for suffix in ("png", "svg")
    }
    assert {file.name: file.read_bytes() for file in plots.draw(tmp_path)} == drawn
    text = summary.markdown(tmp_path)
    further = (1280e6 - 640e6) / (128**2 - 64**2)
    side = int((64**2 + (2**30 - 640e6) / further) ** 0.5)
    assert f"| DCMPNet | fused, channels_last | 128² | 1 | 7.81 | {further:,.0f} | {side}² |" in text
    assert "float32, IEEE; whole images up to where" in text
    assert "| MITNet | phase stage | bfloat16 | 25.000 | -0.013 | 3.2 |" in text
    missing = "CPU: predicted_dynamic_filter [2, 20, 256, 256], forward + backward: time against eager"
    assert f"| {missing} | ≥ 5.00× |  | not measured |" in text


def test_the_summary_says_what_was_counted_and_what_it_consists_of(quick_run, tmp_path):
    folder, _ = quick_run
    for file in ("bench.json", "rates.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    source = {"dtype": "float32", "torch": "2", "commit": "c"}
    counted = [
        work.Row("MITNet", name, "[8, 3, 256, 256]", 500, kernels, 24.0, **source)
        for name, kernels in ((work.ON_CPU, None), (work.IN_TRITON, 1234))
    ]
    measure.write_results(counted, tmp_path / "work")
    consists_of = [
        work.PartRow("MITNet", name, work.CONVOLUTIONS, 200, gigabytes, **source)
        for name, gigabytes in ((work.ON_CPU, 12.5), (work.IN_TRITON, 13.5))
    ]
    consists_of.append(work.PartRow("MITNet", work.IN_TRITON, "concatenations", 3, 0.5, **source))
    measure.write_results(consists_of, tmp_path / "work-parts")
    text = summary.markdown(tmp_path)
    assert "| MITNet [8, 3, 256, 256], float32 | fused, C++ on a CPU | 500 |  | 24.0 |" in text
    assert "| MITNet [8, 3, 256, 256], float32 | fused, Triton | 500 | 1,234 | 24.0 |" in text
    assert f"| MITNet | {work.CONVOLUTIONS} | 200 | 12.5 | 13.5 |" in text
    assert "| MITNet | concatenations | 3 |  | 0.5 |" in text
    assert "MITNet, fused, Triton: operators of a training step 500, ≤ 400 wanted" in text
    assert "| MITNet, fused, Triton: operators of a training step | ≤ 400 | 500 | missed |" in text
    assert "| MITNet, fused, Triton: GB of a training step | ≤ 25.0 | 24.0 | met |" in text
    assert "| DCMPNet, fused, Triton: GB of a training step | ≤ 90.0 |  | not measured |" in text


RECORDED = Path(summary.__file__).parent / "results" / "cpu"


def test_no_figure_of_the_readme_is_written_by_hand():
    whole = (RECORDED.parents[2] / "README.md").read_text()
    section = whole.partition(f"{summary.BEGIN}\n")[2].partition(summary.END)[0]
    assert section == summary.markdown(RECORDED, "benchmarks/results/cpu")
    assert (RECORDED / "summary.md").read_text() == summary.markdown(RECORDED)


def test_the_report_holds_what_its_parts_measured_against_targets(quick_run, tmp_path):
    folder, rows = quick_run
    assert list(gpu_report._measured(tmp_path)) == []
    bare = [replace(row, bandwidth_share=None, matrix_rate_share=None) for row in rows]
    measure.write_results(bare, tmp_path / "operators-dynamic_filter")
    (tmp_path / "rates.json").write_text((folder / "rates.json").read_text())
    (text,) = gpu_report._measured(tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads((folder / "bench.json").read_text())
    assert f"0 met, 0 missed, {len(targets.TARGETS) + 4 * len(targets.WORK_TARGETS)} not measured" in text
    assert (tmp_path / "operators.png").exists()


class TwoStages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.amplitude_stem = torch.nn.Conv2d(3, 3, 1)
        self.phase_stem = torch.nn.Conv2d(3, 3, 1)
        self.seen = []

    def restore(self, image):
        self.seen = [image.dtype]
        for layer in (self.amplitude_stem, self.phase_stem):
            image = layer(image)
            self.seen.append(image.dtype)
        return image


def test_autocast_within_a_part_leaves_the_rest_as_it_is():
    model = TwoStages()
    inside = []
    model.phase_stem.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    image = torch.rand(1, 3, 4, 4)
    exact = model.restore(image)
    with precision.autocast_within([model.phase_stem], torch.bfloat16, "cpu"):
        coarse = model.restore(image)
    assert inside == [torch.float32, torch.bfloat16]
    assert model.seen == [torch.float32] * 3
    assert 0 < (coarse - exact).abs().max() < 0.02
    assert torch.equal(model.restore(image), exact)
    with (
        pytest.raises(RuntimeError, match="none of the modules"),
        precision.autocast_within([torch.nn.Identity()], torch.bfloat16, "cpu"),
    ):
        model.restore(image)


def test_every_part_of_both_networks_can_be_computed_in_lower_precision():
    torch.manual_seed(0)
    image = [(torch.rand(3, 24, 24), torch.rand(3, 24, 24))]
    for model in (MITNet(width=4, depth=2), DCMPNet(widths=(4, 4, 4), depths=(1, 1, 1, 1, 1), heads=(1, 1, 1, 1, 1))):
        rows = precision.measure(model, image, "cpu")
        parts = precision.PARTS[type(model).__name__]
        assert [(row.part, row.precision) for row in rows] == [
            ("everything", "float32"),
            *((part, "bfloat16") for part in ("everything", *parts)),
        ]
        assert rows[0].psnr_change == rows[0].largest_change == 0
        for row in rows[1:]:
            assert 0 < row.largest_change < 60
            assert row.psnr_change == pytest.approx(row.psnr - rows[0].psnr)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    small = replace(PREDICTED_DYNAMIC_FILTER, benchmark_cases=(SMALL,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SPECS", (small,))
        patch.setattr(bench, "QUICK_SECONDS", 0.02)
        rows = bench.run(folder, quick=True, networks=(), console=Console(quiet=True))
    return folder, rows


def test_a_run_writes_every_row_and_its_pictures(quick_run):
    folder, rows = quick_run
    written = json.loads((folder / "bench.json").read_text())
    assert written == [asdict(row) for row in rows]
    rates = json.loads((folder / "rates.json").read_text())
    assert rates["copy_gb_per_s"] > 0.1
    assert rates["matrix_float32_gflops"] > 1
    assert {(row.implementation, row.work) for row in rows} >= {
        ("eager", "forward"),
        ("cpp", "forward + backward"),
    }
    for row in rows:
        assert row.problem is None
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.bandwidth_share == pytest.approx(row.gigabytes_per_second / rates["copy_gb_per_s"])
        assert row.matrix_rate_share == pytest.approx(row.gigaflops / rates["matrix_float32_gflops"])
    for name in ("operators", "roofline"):
        assert (folder / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        with Image.open(folder / f"{name}.png") as picture:
            drawn = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        assert drawn >= {ImageColor.getrgb(plots.COLOURS[kind]) for kind in ("plain", "kernel")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [True, False]), ({"quick": True}, [False]), ({"compiled": True}, [True, True])],
)
def test_the_first_case_of_a_main_operator_is_held_against_torch_compile(
    options, expected, quick_run, tmp_path, monkeypatch
):
    _, rows = quick_run
    asked = []

    def benchmark(spec, case, device, seconds, compiled):
        asked.append(compiled)
        return rows

    two_cases = replace(PREDICTED_DYNAMIC_FILTER, benchmark_cases=(SMALL, replace(SMALL, seed=1)))
    monkeypatch.setattr(bench, "SPECS", (two_cases,))
    monkeypatch.setattr(bench, "machine_rates", lambda _: {"copy_gb_per_s": 1.0, "matrix_float32_gflops": 1.0})
    monkeypatch.setattr(ops, "benchmark", benchmark)
    monkeypatch.setattr(plots, "draw", lambda _: [])
    bench.run(tmp_path, networks=(), console=Console(quiet=True), **options)
    assert asked == expected


def test_the_roofline_has_room_for_any_number_of_operators(quick_run):
    folder, rows = quick_run
    row = next(asdict(row) for row in rows if row.work == "forward + backward")
    names = [f"operator {number}" for number in range(2 * len(plots.MARKERS))]
    figure = plots.roofline([row | {"name": name} for name in names], json.loads((folder / "rates.json").read_text()))
    assert {text.get_text() for legend in figure.legends for text in legend.get_texts()} >= set(names)


def test_the_summary_holds_the_rows_and_goes_into_a_readme(quick_run, tmp_path):
    folder, rows = quick_run
    text = summary.markdown(folder, "pictures")
    best = next(row for row in rows if row.implementation == "cpp" and row.work == "forward + backward")
    assert f"| cpp | {best.median_ms:.1f} ({best.p20_ms:.1f}–{best.p80_ms:.1f}) | {best.speedup:.2f} |" in text
    assert "](pictures/operators.png)" in text
    assert "Not measured: anything on a GPU" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    summary.insert(readme, text)
    summary.insert(readme, text)
    assert readme.read_text() == f"before\n{summary.BEGIN}\n{text}{summary.END}\nafter\n"
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(ValueError, match="each of the marks"):
        summary.insert(tmp_path / "other.md", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ("fft",)}, "families: got fft, allowed are dynamic_filter"),
        ({"networks": ("UNet",)}, "networks: got UNet, allowed are MITNet, DCMPNet"),
        ({"device": "tpu"}, "device: got 'tpu', allowed are cpu, cuda"),
        ({"output": Path(__file__)}, "output: .*test_benchmarks.py is a file, expected a folder"),
    ],
)
def test_a_run_refuses_what_it_does_not_know(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**{"output": tmp_path / "bench"} | changes)
    assert not (tmp_path / "bench").exists()


def test_the_command_measures_what_it_is_told(monkeypatch):
    asked, selected = [], []
    monkeypatch.setattr("mitnet_fast.benchmarks.bench.run", lambda output, **options: asked.append((output, options)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    words = [
        "bench",
        "-o",
        "there",
        "--quick",
        "--family",
        "window_attention",
        "--network",
        "none",
        "--device",
        "cuda:1",
    ]
    assert CliRunner().invoke(app, words).exit_code == 0
    ((output, options),) = asked
    assert (output, options["device"], selected) == (Path("there"), "cuda", [1])
    assert (options["quick"], options["compiled"]) == (True, False)
    assert (list(options["families"]), list(options["networks"])) == (["window_attention"], [])
    assert CliRunner().invoke(app, ["bench", "--device", "cpu"]).exit_code == 0
    _, options = asked[1]
    assert (options["device"], list(options["networks"]), selected) == ("cpu", list(models.NETWORKS), [1])
    refused = CliRunner().invoke(app, ["bench", "--device", "cuda:2"])
    assert "but PyTorch sees 2 GPU" in str(refused.exception)
    assert len(asked) == 2
