"""The demo, small: what it writes, that its numbers are those of its files, and that held-out means held out."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mitnet_fast import demo
from mitnet_fast.data import PairedImages, check, read_image, synthesise_haze
from mitnet_fast.data.photographs import HazyPhotographs, photograph
from mitnet_fast.evaluation import evaluate, score
from mitnet_fast.weights import load_weights, read_card

TINY = ("run.epochs=2", "run.steps_per_epoch=2", "data.batch=2", "data.patch=32")
SIDE, DRAWS = 48, 2
COMPARED = ("hazy", "stretched", "restored")


class Run(NamedTuple):
    folder: Path
    result: demo.DemoResult
    text: str
    trained_on: list[str]


def run_tiny(folder: Path, system: str, *overrides: str, **arguments) -> tuple[demo.DemoResult, str]:
    console = Console(file=io.StringIO(), width=100)
    arguments = {"side": SIDE, "draws": DRAWS, **arguments}
    result = demo.run_demo(folder, system=system, overrides=(*TINY, *overrides), console=console, **arguments)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "out"
    names: list[str] = []
    give = HazyPhotographs.__getitem__

    def noted(self: HazyPhotographs, index: int) -> dict:
        item = give(self, index)
        names.append(item["name"])
        return item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HazyPhotographs, "__getitem__", noted)
        result, text = run_tiny(folder, "mitnet", "network.width=4")
    return Run(folder, result, text, names)


def files_of(run: Run, each: demo.Comparison) -> tuple[Path, Path, Path]:
    """Hazy, restored and clear file of a comparison."""
    place = run.folder / "photographs" / ("test" if each.held_out else "train")
    return place / "hazy" / each.file, run.folder / "dehazed" / each.file, place / "gt" / f"{each.photograph}.png"


def test_all_files_are_written(run):
    images = len(demo.TRAINING + demo.HELD_OUT) * DRAWS
    assert len(run.result.comparisons) == images
    assert len(list((run.folder / "dehazed").iterdir())) == images
    assert run.result.weights == run.folder / "mitnet-demo.safetensors"
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "dehazed",
        "demo.json",
        "demo.png",
        "mitnet-demo.safetensors",
        "photographs",
        "scores.csv",
        "training",
    ]
    assert json.loads((run.folder / "demo.json").read_text())["system"] == "mitnet"


def test_held_out_photographs_are_never_trained_on(run):
    assert not set(demo.TRAINING) & set(demo.HELD_OUT)
    assert "motorcycle" in demo.HELD_OUT  # the one with measured depth
    assert run.trained_on
    assert set(run.trained_on) <= set(demo.TRAINING)
    assert {each.photograph for each in run.result.comparisons if each.held_out} == set(demo.HELD_OUT)
    assert {each.photograph for each in run.result.comparisons if not each.held_out} == set(demo.TRAINING)


def test_scores_are_those_of_the_files(run):
    for each in run.result.comparisons:
        hazy, restored, clear = (read_image(path).rgb for path in files_of(run, each))
        assert each.hazy == score(hazy, clear)
        assert each.restored == score(restored, clear)
        stretches = [score(demo.contrast_stretch(hazy, per_channel=choice), clear) for choice in (True, False)]
        assert each.stretched == max(stretches, key=lambda found: found.psnr)


def test_scores_agree_with_scikit_image(run):
    each = run.result.comparisons[0]
    _, restored, clear = (read_image(path).rgb.permute(1, 2, 0).double().numpy() for path in files_of(run, each))
    assert each.restored.psnr == pytest.approx(peak_signal_noise_ratio(clear, restored, data_range=1), abs=1e-5)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    assert each.restored.ssim == pytest.approx(
        structural_similarity(clear, restored, channel_axis=2, **settings), abs=1e-5
    )


def test_haze_is_the_models_at_the_depth_of_the_photograph(run):
    for each in run.result.comparisons:
        photo = photograph(each.photograph, max_side=SIDE)
        expected = synthesise_haze(photo.rgb, photo.depth, each.beta, each.airlight)
        hazy, _, clear = (read_image(path).rgb for path in files_of(run, each))
        torch.testing.assert_close(hazy, expected, atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(clear, photo.rgb, atol=0.51 / 255, rtol=0)
        assert demo.BETA[0] <= each.beta <= demo.BETA[1]
        assert demo.AIRLIGHT[0] <= each.airlight <= demo.AIRLIGHT[1]
        assert each.depth_kind == ("measured" if each.photograph == "motorcycle" else "planar ramp")
    betas = [each.beta for each in run.result.comparisons]
    assert len(set(betas)) == len(betas)


def test_csv_holds_every_comparison(run):
    with run.result.scores.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.result.comparisons)
    for row, each in zip(rows, run.result.comparisons, strict=True):
        assert (row["file"], row["photograph"], row["depth"]) == (each.file, each.photograph, each.depth_kind)
        assert row["held out"] == ("yes" if each.held_out else "no")
        assert (float(row["beta"]), float(row["airlight"])) == (each.beta, each.airlight)
        for what in COMPARED:
            found = getattr(each, what)
            assert (float(row[f"{what} psnr"]), float(row[f"{what} ssim"])) == (found.psnr, found.ssim)


@pytest.mark.parametrize("held_out", [True, False])
def test_means_and_gains(run, held_out):
    chosen = [each for each in run.result.comparisons if each.held_out == held_out]
    means = {}
    for what in COMPARED:
        mean = run.result.mean(what, held_out=held_out)
        means[what] = sum(getattr(each, what).psnr for each in chosen) / len(chosen)
        assert mean.psnr == pytest.approx(means[what], rel=1e-12)
        assert mean.ssim == pytest.approx(sum(getattr(each, what).ssim for each in chosen) / len(chosen), rel=1e-12)
    for over in ("hazy", "stretched"):
        gain = run.result.gain(over, held_out=held_out)
        assert gain == pytest.approx(means["restored"] - means[over], abs=1e-9)


def test_table_prints_every_score_and_the_means(run):
    lines = [line.strip() for line in run.text.splitlines()]
    start = lines.index("held out")
    end = lines.index("trained on", start)
    sections = {True: lines[start + 1 : end], False: lines[end + 1 :]}
    for held_out, section in sections.items():
        for each in (each for each in run.result.comparisons if each.held_out == held_out):
            cells = [f"{found.psnr:.2f} {found.ssim:.3f}" for found in (each.hazy, each.stretched, each.restored)]
            kind = "measured" if each.depth_kind == "measured" else "ramp"
            assert any(
                line.startswith(each.photograph) and kind in line and all(cell in line for cell in cells)
                for line in section
            )
        mean = next(line for line in section if line.startswith("mean"))
        for what in COMPARED:
            found = run.result.mean(what, held_out=held_out)
            assert f"{found.psnr:.2f} {found.ssim:.3f}" in mean


def test_text_says_the_gains_and_what_comes_next(run):
    text = " ".join(run.text.split())
    assert f"{run.result.gain('hazy'):+.2f} dB over the hazy images" in text
    assert f"{run.result.gain('stretched'):+.2f} dB over the contrast stretch" in text
    ssim = [f"{run.result.mean(what, held_out=True).ssim:.3f}" for what in COMPARED]
    assert f"SSIM: hazy {ssim[0]}, stretched {ssim[1]}, restored {ssim[2]}." in text
    assert f"mitnet-fast dehaze PHOTO.jpg -o dehazed --weights {run.result.weights}" in text
    assert f"mitnet-fast evaluate {run.folder / 'photographs'} --weights {run.result.weights}" in text


def test_weights_are_labelled_and_give_the_dehazed_files(run):
    card = read_card(run.result.weights)
    assert card["demo"] is True
    assert card["held_out"] == list(demo.HELD_OUT)
    model, _ = load_weights(run.result.weights)
    hazy, restored, _ = files_of(run, run.result.comparisons[0])
    again = model.restore(read_image(hazy).rgb[None])[0].clamp(0, 1)
    torch.testing.assert_close(again, read_image(restored).rgb, atol=0.51 / 255, rtol=0)


def test_photographs_are_a_data_set_that_evaluate_reads(run):
    report = check(run.folder / "photographs")
    assert report.usable
    assert {name: len(split.pairs) for name, split in report.splits.items()} == {
        "train": len(demo.TRAINING) * DRAWS,
        "test": len(demo.HELD_OUT) * DRAWS,
    }
    held_out = PairedImages(run.folder / "photographs", "test")
    found = evaluate(load_weights(run.result.weights)[0], held_out, protocols=["full-rgb"]).mean("full-rgb")
    assert found.psnr == pytest.approx(run.result.mean("restored", held_out=True).psnr, abs=1e-3)


def test_picture_has_a_row_for_each_drawn_photograph(run):
    with Image.open(run.result.picture) as picture:
        width, height = picture.size
        colours = len(picture.convert("RGB").resize((64, 64)).getcolors(4096))
    assert width > 1200
    assert 0.4 < height / width < 0.8
    assert colours > 500
    assert set(demo.DRAWN) & set(demo.HELD_OUT)


def test_the_same_seed_gives_the_same_scores(run, tmp_path):
    again, _ = run_tiny(tmp_path, "mitnet", "network.width=4")
    assert again.comparisons == run.result.comparisons


@pytest.mark.exhaustive
def test_the_whole_demo_restores_photographs_it_never_saw_and_their_colours(tmp_path):
    result = demo.run_demo(tmp_path, console=Console(file=io.StringIO()))
    assert result.gain("hazy") > 3
    assert result.gain("stretched") > 1
    assert result.mean("restored", held_out=True).ssim > result.mean("stretched", held_out=True).ssim
    whole = Run(tmp_path, result, "", [])
    for each in result.comparisons:
        if each.held_out:
            images = (read_image(path).rgb for path in files_of(whole, each))
            hazy, restored, clear = (image.mean((1, 2)) - image.mean() for image in images)
            assert float((restored - clear).norm()) < float((hazy - clear).norm()), each.file


def test_an_earlier_demo_is_replaced_and_another_seed_gives_other_haze(tmp_path):
    first, _ = run_tiny(tmp_path, "mitnet", "network.width=4", "run.epochs=1", draws=2)
    second, _ = run_tiny(tmp_path, "mitnet", "network.width=4", "run.epochs=1", draws=1, seed=1)
    assert {each.beta for each in first.comparisons}.isdisjoint(each.beta for each in second.comparisons)
    dehazed = sorted(path.name for path in (tmp_path / "dehazed").iterdir())
    assert dehazed == sorted(each.file for each in second.comparisons)


def test_dcmpnet_learns_with_its_depth_network(tmp_path):
    result, text = run_tiny(tmp_path, "dcmpnet", "run.epochs=1", draws=1)
    assert "DCMPNet" in text
    card = read_card(result.weights)
    assert (card["system"], card["demo"]) == ("dcmpnet", True)
    with (tmp_path / "training" / "log.csv").open(encoding="utf-8", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["depth_gradient_norm"]) > 0
    assert float(row["dehazing_gradient_norm"]) > 0


def test_training_takes_one_core_and_gives_the_others_back(tmp_path, monkeypatch):
    during = []

    def interrupted(*_, **__):
        during.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path, "mitnet")
        assert during == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # what conftest set


def test_a_stopped_training_is_not_scored(tmp_path, monkeypatch):
    class Stopped:
        finished = False

    monkeypatch.setattr(demo, "train", lambda *_, **__: Stopped())
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, "mitnet")
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "scores.csv").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds something that is not a demo's"):
        run_tiny(tmp_path, "mitnet")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(ValueError, match="is a file"):
        run_tiny(tmp_path / "holiday.jpg", "mitnet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": "aod"}, "expected one of mitnet, dcmpnet, got 'aod'"),
        ({"side": 31}, "side"),
        ({"draws": 0}, "draws"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_tiny(tmp_path / "out", arguments.pop("system", "mitnet"), **arguments)
    assert not (tmp_path / "out").exists()


def test_stretch_by_hand():
    image = torch.tensor([[0.2, 0.6], [0.4, 0.5], [0.3, 0.3]]).view(3, 1, 2)
    joint = torch.tensor([[0.0, 1.0], [0.5, 0.75], [0.25, 0.25]]).view(3, 1, 2)
    each = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.3, 0.3]]).view(3, 1, 2)
    torch.testing.assert_close(demo.contrast_stretch(image, per_channel=False), joint)
    torch.testing.assert_close(demo.contrast_stretch(image, per_channel=True), each)
    constant = torch.full((3, 2, 2), 0.7)
    assert torch.equal(demo.contrast_stretch(constant, per_channel=False), constant)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_better_stretch_is_the_rival(per_channel):
    hazy = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 0.7, 0.9]).view(
        3, 1, 1
    )
    clear = demo.contrast_stretch(hazy, per_channel=per_channel)
    chosen, found = demo.best_stretch(hazy, clear)
    assert torch.equal(chosen, clear)
    assert found.psnr == float("inf")
