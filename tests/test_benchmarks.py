"""The benchmarks measure what they say, and refuse to time what is wrong."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from rich.console import Console

from benchmarks import (
    bench,
    gpu_report,
    graph_steps,
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
from mitnet_fast.models import DCMPNet, MITNet
from mitnet_fast.ops import _backends
from mitnet_fast.specs import PREDICTED_DYNAMIC_FILTER, expectations

ON_GPUS = {"dynamic_filter", "amplitude_phase", "window_attention"}  # families with kernels there
SMALL = replace(
    PREDICTED_DYNAMIC_FILTER.benchmark_cases[0],
    sizes=PREDICTED_DYNAMIC_FILTER.benchmark_cases[0].sizes | {"height": 24, "width": 20},
)


def test_implementations_take_turns_and_are_told_apart():
    order = []

    def call(name, seconds):
        return lambda turn: (order.append((name, turn)), time.sleep(seconds))

    timings = measure.take_turns({"fast": call("fast", 0.002), "slow": call("slow", 0.02)}, "cpu", seconds=0.2)
    assert timings["slow"].median > 5 * timings["fast"].median >= 5 * 0.002
    assert timings["fast"].p20 <= timings["fast"].median <= timings["fast"].p80
    assert timings["fast"].runs == timings["slow"].runs >= 5
    measured = order[-2 * timings["fast"].runs :]
    assert measured[:4] == [("fast", 0), ("slow", 0), ("fast", 1), ("slow", 1)]


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
        assert row.case == "[2, 20, 24, 20] kernel_size=3 features=20 bias=2"
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
        [f"verify-{family}-{backend}" for family in ON_GPUS for backend in ("cpp", "triton")], 60.0
    )


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
    assert len(seen) == len(set(seen)) == 2 * 2 * (3 * 3 + 1)
    assert ("amplitude_phase_conv", "cpp", torch.float32, 16, 8, "channels_last") in seen
    assert {name for name, *_ in seen} == {spec.name for spec in gpu_report.SPECS if spec.family in ON_GPUS}


def test_the_report_names_its_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report"), "--part", "nothing"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "verify" in capsys.readouterr().err


# operators and gigabytes of a training step at batch 8, 256×256, float32: what is reached must not be lost
WORK = {"MITNet": (540, 33.9), "DCMPNet": (814, 69.1)}


@pytest.mark.parametrize("network", WORK)
def test_the_work_of_a_training_step_does_not_grow(network):
    published, plain, fused = work.rows(network)
    assert (published.operators, published.gigabytes) == work.PUBLISHED[network]
    assert fused.operators <= WORK[network][0]
    assert fused.gigabytes <= WORK[network][1]
    assert fused.operators < plain.operators
    assert fused.gigabytes < plain.gigabytes
    parts = {row.part: row for row in work.parts(network)}
    assert parts.keys() == {*work.PARTS, work.FUSED, work.ELSE}
    assert sum(part.operators for part in parts.values()) == fused.operators
    assert sum(part.gigabytes for part in parts.values()) == pytest.approx(fused.gigabytes, abs=0.35)  # rounded each
    called = work.count(network, 8, 256, "cpp").operators
    assert parts[work.CONVOLUTIONS].operators == called["convolution"] + called["convolution_backward"]
    assert parts[work.FUSED].operators >= 2 * sum(called[spec.name] for spec in bench.SPECS) > 20


@pytest.mark.parametrize("network", WORK)
def test_networks_run_the_fused_operators_without_being_told(network):
    by_default = work.count(network, 8, 256, None).operators
    assert by_default == work.count(network, 8, 256, "cpp").operators
    assert sum(by_default[spec.name] for spec in bench.SPECS) > 10


def test_work_counts_operands_and_results_of_what_is_no_view():
    with work.WorkCounter() as counter:
        x = torch.ones(2, 3, 4)  # fill, in place of empty memory
        y = x.view(6, 4).t() @ torch.ones(6, 5)
        y.relu_()
    assert counter.operators == {"ones": 2, "mm": 1, "relu_": 1}
    assert counter.bytes == {"ones": 4 * (24 + 30), "mm": 4 * (24 + 30 + 20), "relu_": 4 * 20 * 2}


def test_a_network_that_is_wrong_has_no_speed(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        @torch.no_grad()
        def restore(self, image):
            wrong = image.dtype == torch.float32 and _backends._forced.get("dynamic_filter") != "reference"
            return self.layer(image) * (1.001 if wrong else 1)

    monkeypatch.setitem(models.NETWORKS, "MITNet", Network)
    monkeypatch.setattr(models, "measured_memory", lambda *_: 1.0)
    models._truth.cache_clear()
    models.is_correct.cache_clear()
    rows = models.measure("MITNet", "inference", 1, 16, "cpu", 0.01)
    assert [row.implementation for row in rows] == list(models.IMPLEMENTATIONS)
    for row in rows:
        fused = row.implementation.startswith("fused")
        assert row.problem == ("fails its check" if fused else None)
        assert (row.median_ms is None) == (row.speedup is None) == fused
    assert max(row.speedup for row in rows if row.problem is None) == 1.0
    models._truth.cache_clear()
    models.is_correct.cache_clear()


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


def test_graph_steps_are_compared_term_by_term(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setattr(graph_steps, "SIDE", 16)
    once, again = (graph_steps.losses("MITNet", "eager", "cpu") for _ in range(2))
    assert len(once) == graph_steps.STEPS
    assert once == again
    assert [graph_steps.difference(values, expected) for values, expected in zip(once, again, strict=True)] == [0] * 5
    assert graph_steps.difference({"total": 1.02, "restored": 0.5}, {"total": 1.0, "restored": 0.5}) == pytest.approx(
        0.02
    )
    with pytest.raises(RuntimeError, match="the run computes on cpu"):
        graph_steps.losses("MITNet", "cuda_graph", "cpu")


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
    counted = [{"network": "MITNet", "implementation": "fused", "operators": 400, "gigabytes": 25.1}]
    assert [verdict.word for verdict in targets.judge_work(counted)] == ["met", "missed"]


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


def test_larger_images_are_measured_until_time_or_memory_ends(monkeypatch):
    asked = []

    def once(network, name, batch, side, device):
        asked.append((batch, side))
        return 2.0, 1e-6 * 100 * side**2 + 5

    monkeypatch.setattr(scaling, "in_new_process", lambda function, *arguments: once(*arguments))
    monkeypatch.setattr(scaling, "_available_mb", lambda: 4 * (1e-6 * 100 * 256**2 + 5) / 0.7 - 1e-3)
    rows = [asdict(row) for row in scaling.measure("MITNet", "cpu", 100.0, batches=(1, 2))]
    assert list(dict.fromkeys(asked)) == [(1, 64), (1, 128), (1, 256), (2, 128)]
    assert [row["runs"] for row in rows] == [1] * 8
    assert scaling.bytes_per_pixel(rows, "MITNet", "fused, channels_last") == pytest.approx(100)
    assert scaling.largest_side_per_gib(100) == 3276
    asked.clear()
    monkeypatch.setattr(scaling, "_available_mb", lambda: 1e9)
    assert len(list(scaling.measure("MITNet", "cpu", 0.0, batches=(1,)))) == 2
    assert asked == [(1, 64)] * 2


def test_the_summary_tells_how_far_images_and_precision_go(quick_run, tmp_path):
    folder, _ = quick_run
    for file in ("bench.json", "rates.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    where = {"device": "cpu", "threads": "2", "torch": "2", "triton": "", "python": "3", "commit": "c"}
    sizes = [
        scaling.Scaling(network, f"{kind}, channels_last", batch, side, side / 1e3, 3, side / 10, **where)
        for network in models.NETWORKS
        for kind in ("plain", "fused")
        for batch, side in ((1, 64), (1, 128), (2, 128))
    ]
    measure.write_results(sizes, tmp_path / "scaling")
    row = precision.Row("MITNet", "phase stage", "bfloat16", 6, 25.0, -0.0125, 0.9, 3.2, **where)
    measure.write_results([row], tmp_path / "precision")
    assert {file.name for file in plots.draw(tmp_path)} == {
        f"{name}.{suffix}" for name in ("operators", "roofline", "scaling") for suffix in ("png", "svg")
    }
    text = summary.markdown(tmp_path)
    per_pixel = (12.8e6 - 6.4e6) / (128**2 - 64**2)
    side = int((2**30 / per_pixel) ** 0.5)
    assert f"| DCMPNet | fused, channels_last | 128² | 7.81 | {per_pixel:,.0f} | {side:,}² |" in text
    assert "| MITNet | phase stage | bfloat16 | 25.000 | -0.013 | 3.2 |" in text
    missing = "CPU: predicted_dynamic_filter [2, 20, 256, 256], forward + backward: time against eager"
    assert f"| {missing} | ≥ 5.00× |  | not measured |" in text


def test_the_summary_says_why_counted_work_misses_its_goal(quick_run, tmp_path):
    folder, _ = quick_run
    for file in ("bench.json", "rates.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    counted = [
        work.Row(network, "fused", "[8, 3, 256, 256]", operators, gigabytes)
        for network, operators, gigabytes in (("MITNet", 500, 24.0), ("DCMPNet", 1000, 90.0))
    ]
    parts = [
        work.PartRow("MITNet", work.CONVOLUTIONS, 200, 12.5),
        work.PartRow("MITNet", "concatenations", 70, 1.5),
        work.PartRow("MITNet", work.ELSE, 230, 10.0),
        work.PartRow("DCMPNet", work.CONVOLUTIONS, 900, 80.0),
    ]
    measure.write_results(counted, tmp_path / "work")
    measure.write_results(parts, tmp_path / "work-parts")
    text = summary.markdown(tmp_path)
    assert "| what is left of MITNet's step | operators | GB |" in text
    assert "| concatenations | 70 | 1.5 |" in text
    assert "misses its goal of 400 operators and 25 GB because its convolutions, PyTorch's own, are 200" in text
    assert "430 operators and 22.5 GB would be left at best" in text
    assert "left of DCMPNet" not in text


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
    assert f"0 met, 0 missed, {len(targets.TARGETS)} not measured" in text
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
    ],
)
def test_a_run_refuses_what_it_does_not_know(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.run(tmp_path / "bench", **changes)
    assert not (tmp_path / "bench").exists()
