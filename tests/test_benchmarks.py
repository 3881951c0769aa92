"""The benchmarks measure what they say, and refuse to time what is wrong."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from PIL import Image, ImageColor
from rich.console import Console

from benchmarks import bench, gpu_report, measure, models, ops, plots, resources, summary, work
from mitnet_fast.ops import _backends
from mitnet_fast.specs import PREDICTED_DYNAMIC_FILTER

SMALL = replace(
    PREDICTED_DYNAMIC_FILTER.benchmark_cases[0],
    sizes=PREDICTED_DYNAMIC_FILTER.benchmark_cases[0].sizes | {"height": 24, "width": 20},
)


def test_implementations_take_turns_and_are_told_apart():
    order = []

    def call(name, seconds):
        return lambda turn: (order.append((name, turn)), time.sleep(seconds))

    timings = measure.take_turns({"fast": call("fast", 0.002), "slow": call("slow", 0.02)}, "cpu", seconds=0.1)
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
    monkeypatch.setattr(ops, "_memory_in_own_process", lambda *_: 0.0)

    def implementations(spec, case, device, compiled):
        def right(**tensors):
            return spec.run(case, tensors, "reference")

        return {"eager": right, "wrong": lambda **tensors: 1.001 * right(**tensors)}

    monkeypatch.setattr(ops, "implementations", implementations)
    rows = ops.benchmark(PREDICTED_DYNAMIC_FILTER, SMALL, "cpu", 0.01, False)
    assert [(row.implementation, row.direction) for row in rows] == [
        ("eager", "forward"),
        ("wrong", "forward"),
        ("eager", "forward + backward"),
        ("wrong", "forward + backward"),
    ]
    for row in rows:
        assert row.correct == (row.implementation == "eager")
        assert (row.median_ms is None) == (row.speedup_over_eager is None) == (row.implementation == "wrong")
        assert row.case == "[2, 20, 24, 20] kernel_size=3 features=20 bias=2"


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


def test_the_report_names_its_parts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path / "report"), "--part", "nothing"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "verify" in capsys.readouterr().err


# operators and gigabytes of a training step at batch 8, 256×256, float32: what is reached must not be lost
WORK = {"MITNet": (528, 35.5), "DCMPNet": (1758, 137.6)}


@pytest.mark.parametrize("network", WORK)
def test_the_work_of_a_training_step_does_not_grow(network):
    published, plain, fused = work.rows(network)
    assert (published.operators, published.gigabytes) == work.PUBLISHED[network]
    assert fused.operators <= WORK[network][0]
    assert fused.gigabytes <= WORK[network][1]
    assert fused.operators < plain.operators
    assert fused.gigabytes < plain.gigabytes


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
    monkeypatch.setattr(models, "memory_in_own_process", lambda *_: 1.0)
    rows = models.measure("MITNet", "inference", 1, 16, "cpu", 0.01)
    assert [row.implementation for row in rows] == list(models.IMPLEMENTATIONS)
    for row in rows:
        fused = row.implementation.startswith("fused")
        assert row.correct != fused
        assert row.problem == ("fails its check" if fused else None)
        assert (row.median_ms is None) == (row.speedup_over_plain is None) == fused
    assert max(row.speedup_over_plain for row in rows if row.correct) == 1.0


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
        assert row.correct
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.bandwidth_share == pytest.approx(row.gigabytes_per_second / rates["copy_gb_per_s"])
        assert row.matrix_rate_share == pytest.approx(row.gigaflops / rates["matrix_float32_gflops"])
    for name in ("speedups", "roofline"):
        assert (folder / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        with Image.open(folder / f"{name}.png") as picture:
            drawn = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        assert drawn >= {ImageColor.getrgb(plots.COLOURS[kind]) for kind in ("plain", "kernel")}


def test_the_summary_holds_the_rows_and_goes_into_a_readme(quick_run, tmp_path):
    folder, rows = quick_run
    text = summary.markdown(folder, "pictures")
    best = next(row for row in rows if row.implementation == "cpp" and row.work == "forward + backward")
    assert f"| cpp | {best.median_ms:.1f} ({best.p20_ms:.1f}–{best.p80_ms:.1f}) | {best.speedup:.2f} |" in text
    assert "](pictures/speedups.png)" in text
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
