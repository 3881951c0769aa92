"""Minutes from nothing to a network that dehazes: trained, compared and drawn on real photographs, offline.

Photographs come with scikit-image (`mitnet_fast.data.photographs`), one of them with measured depth, the others with a
planar ramp. Haze is made by the scattering model, I = J·t + A·(1 − t) with t = exp(−β·Z). In training colours are drawn
away from grey, and channels exchanged in half of the windows: six photographs have a hue, which would become that of
every result. Whole photographs are kept out of training, among them the one with measured depth; their haze is drawn
independently from the same ranges of β and A. All scores are those of the 8-bit files on disk, which
`mitnet-fast evaluate` reads as well:

    photographs/{train,test}/{gt,hazy}   the images that are scored; β and A are in the hazy files' names
    dehazed                              the network's results
    training                             the run, as `mitnet-fast train` leaves it
    SYSTEM-demo.safetensors              its weights, labelled as those of a demo
    demo.png, scores.csv                 the comparison as a picture and as numbers
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .data.files import atomic_write
from .data.haze import sample_haze
from .data.images import read_image, write_image
from .data.photographs import MEASURED, HazyPhotographs, Photograph, photographs
from .evaluation import Score, score
from .inference import dehaze_files
from .training import load_config, train
from .weights import load_weights, save_weights

TRAINING = ("astronaut", "coffee", "rocket", "camera", "brick", "grass")
HELD_OUT = ("motorcycle", "chelsea")
BETA = (0.3, 0.6)  # 1/m, at distances of 2 m to 5 m
AIRLIGHT = (0.8, 1.0)
SATURATION = (1.0, 2.0)  # in training: vivid colours are worth restoring
EXCHANGED = 0.5  # share of the training windows with channels in random order: no hue is the usual one
SHARE = (0.5, 1.0)  # side of a training window in units of the photograph's shorter side
TRAINING_SIDE = 512  # longer side of the photographs that windows are taken from, pixels
SIDE = 256  # longer side of the images that are scored, pixels
DRAWS = 3  # hazy versions of each of them
SCORING_SEED = 1  # with the run's seed: the haze that is scored is never that of training

DRAWN = ("motorcycle", "chelsea", "coffee")  # in the picture
INK, FAINT = "#1f2328", "#59636e"

MARKER = "demo.json"

RECIPES = {
    "mitnet": {
        "system": "mitnet",
        "network": {"width": 8, "depth": 3},
        "loss": {
            "mutual_information_weight": 0.0,
            "ssim_weight": 0.2,
        },  # the former gains nothing in so short a training
        "data": {"patch": 64, "batch": 2, "workers": 0},
        "optimizer": {"lr": 2e-3},
        "schedule": {"kind": "cosine", "cosine_minimum": 2e-5},
        "run": {"epochs": 25, "steps_per_epoch": 40},
        "validation": {"every": 0},
    },
    "dcmpnet": {
        "system": "dcmpnet",
        "network": {
            "widths": [12, 24, 48],
            "depths": [2, 2, 2, 1, 1],
            "heads": [1, 2, 3, 1, 1],
            "attention_ratios": [0.5, 0.5, 0.5, 0, 0],
            "prior_widths": [16, 32, 64, 64, 64],
            "depth_widths": [8, 16, 24, 32],
            "growth": 8,
        },
        "loss": {"contrastive_weight": 0.0},
        "data": {"patch": 64, "batch": 4, "workers": 0},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "cosine", "cosine_minimum": 1e-5},
        "run": {"epochs": 20, "steps_per_epoch": 20},
        "validation": {"every": 0},
    },
}
MINUTES = {"mitnet": 3, "dcmpnet": 4}  # of training, on one idle CPU core


@dataclass(frozen=True)
class Comparison:
    """One hazy photograph, and how far from the truth it and its two restorations are.

    Attributes:
        file: name of the hazy image and of the result.
        photograph: the photograph's name.
        held_out: whether training never saw the photograph.
        depth_kind: "measured" or "planar ramp".
        beta: scattering coefficient of its haze, 1/m.
        airlight: brightness of its haze, in [0, 1].
        hazy: scores of the hazy image.
        stretched: scores of the better min–max contrast stretch, per channel or joint.
        restored: scores of the network's result.
    """

    file: str
    photograph: str
    held_out: bool
    depth_kind: str
    beta: float
    airlight: float
    hazy: Score
    stretched: Score
    restored: Score


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and wrote.

    Attributes:
        comparisons: every image that was scored, those of held-out photographs first.
        weights: the trained weights.
        picture: the side-by-side PNG.
        scores: the CSV of all comparisons.
        training_seconds: how long training took.
    """

    comparisons: tuple[Comparison, ...]
    weights: Path
    picture: Path
    scores: Path
    training_seconds: float

    def mean(self, what: str, *, held_out: bool) -> Score:
        """Mean scores of ``what``, "hazy", "stretched" or "restored", over held-out or training photographs."""
        return _mean(self.comparisons, what, held_out)

    def gain(self, over: str, *, held_out: bool = True) -> float:
        """By how many dB the restored images' mean PSNR exceeds that of ``over``, "hazy" or "stretched"."""
        return self.mean("restored", held_out=held_out).psnr - self.mean(over, held_out=held_out).psnr


def run_demo(
    output_dir: str | PathLike[str] = "demo",
    *,
    system: str = "mitnet",
    seed: int = 0,
    overrides: Iterable[str] = (),
    side: int = SIDE,
    draws: int = DRAWS,
    console: Console | None = None,
) -> DemoResult:
    """Train a small network on hazy photographs, compare it on photographs it never saw, and show all of it.

    Args:
        output_dir: where everything goes; a new or empty folder, or that of an earlier demo, which is replaced.
        system: "mitnet" or "dcmpnet".
        seed: of weights, windows and haze, at least 0.
        overrides: changes to the recipe, ``section.field=value`` as for `load_config`.
        side: longer side of the images that are scored, pixels.
        draws: hazy versions of each photograph that are scored.
        console: where to print; None makes one.

    Returns:
        Scores and files.

    Raises:
        ValueError: an argument outside what is allowed, or a folder that holds something else.
        KeyboardInterrupt: training was stopped; nothing is scored then.
    """
    if system not in RECIPES:
        raise ValueError(f"system: expected one of {', '.join(RECIPES)}, got {system!r}")
    if side < 32 or draws < 1 or seed < 0:
        raise ValueError(f"expected side ≥ 32, draws ≥ 1 and seed ≥ 0, got {side=}, {draws=}, {seed=}")
    config = load_config(RECIPES[system], [*overrides, f"run.seed={seed}"])
    console = console or Console()
    folder = Path(output_dir)
    _claim(folder, {"system": system, "seed": seed, "side": side, "draws": draws})

    training, held_out = photographs(TRAINING, max_side=TRAINING_SIDE), photographs(HELD_OUT, max_side=side)
    _introduce(console, _title(system), training, held_out)
    images = _write_images(folder, held_out, photographs(TRAINING, max_side=side), draws, seed)

    steps = config.run.epochs * (config.run.steps_per_epoch or 1)
    dataset = HazyPhotographs(
        training,
        patch=config.data.patch,
        views=-(-config.data.batch * (config.run.steps_per_epoch or 1) // len(training)),
        share=SHARE,
        beta=BETA,
        airlight=AIRLIGHT,
        saturation=SATURATION,
        exchanged=EXCHANGED,
        seed=seed,
    )
    console.print(
        f"\n[bold]training[/] {_title(system)} for {steps} steps of {config.data.batch} windows, "
        f"{config.data.patch}×{config.data.patch} pixels; about {MINUTES[system]} minutes on one idle CPU core",
        highlight=False,
    )
    card = {
        "demo": True,
        "data": f"scikit-image's photographs {', '.join(TRAINING)}; synthetic haze",
        "held_out": list(HELD_OUT),
    }
    started = time.perf_counter()
    with _one_thread():
        result = train(
            config, folder / "training", overwrite=True, datasets=(dataset, None), card=card, console=console
        )
    seconds = time.perf_counter() - started
    if not result.finished:
        raise KeyboardInterrupt("the demo's training was stopped")
    weights = folder / f"{system}-demo.safetensors"
    save_weights(weights, load_weights(result.weights)[0], card)

    with _one_thread():
        comparisons = _compare(folder, weights, images, console)
    demo = DemoResult(comparisons, weights, folder / "demo.png", folder / "scores.csv", seconds)
    _write_scores(demo.scores, comparisons)
    _draw(demo, folder, _title(system))
    console.print(_table(comparisons, _title(system)))
    _conclude(console, demo, folder)
    return demo


def contrast_stretch(image: torch.Tensor, *, per_channel: bool) -> torch.Tensor:
    """Map the least value of an image to 0 and the greatest to 1: what restoration has to beat.

    Args:
        image: [3, H, W], floating point.
        per_channel: stretch every channel by itself, which also removes the cast of the haze.

    Returns:
        The stretched image, in [0, 1]; a constant image (or channel) is returned as it is.
    """
    axes = (-2, -1) if per_channel else (-3, -2, -1)
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    span = high - low
    return torch.where(span > 0, (image - low) / torch.where(span > 0, span, 1), image)


def best_stretch(hazy: torch.Tensor, clear: torch.Tensor) -> tuple[torch.Tensor, Score]:
    """The stretch, per channel or joint, that is nearer to the truth by PSNR, and its scores."""
    candidates = [contrast_stretch(hazy, per_channel=per_channel) for per_channel in (False, True)]
    return max(((image, score(image, clear)) for image in candidates), key=lambda pair: pair[1].psnr)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: on maps this small more of them gain little, and lose much on a machine that is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Image:
    """A hazy image on disk, before it is scored."""

    hazy: Path
    clear: Path
    photograph: Photograph
    held_out: bool
    beta: float
    airlight: float


def _claim(folder: Path, settings: dict[str, object]) -> None:
    """Take a folder for the demo; refuse one that holds anything but an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ValueError(f"output_dir: {folder} holds something that is not a demo's; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / MARKER) as stream:
        stream.write(json.dumps(settings, indent=2).encode())


def _write_images(
    folder: Path, held_out: Sequence[Photograph], training: Sequence[Photograph], draws: int, seed: int
) -> list[_Image]:
    """Write the images that are scored, in the layout of Haze4K, and forget those of an earlier demo."""
    for stale in (*folder.glob("photographs/*/*/*.png"), *folder.glob("dehazed/*.png")):
        stale.unlink()
    images = []
    generator = torch.Generator().manual_seed((seed << 8) + SCORING_SEED)
    for split, chosen in (("test", held_out), ("train", training)):
        places = {name: folder / "photographs" / split / name for name in ("gt", "hazy")}
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        for photo in chosen:
            clear = places["gt"] / f"{photo.name}.png"
            write_image(clear, photo.rgb)
            for draw in range(1, draws + 1):
                hazy, haze = sample_haze(photo.rgb, photo.depth, beta=BETA, airlight=AIRLIGHT, generator=generator)
                beta, airlight = float(haze.beta), float(haze.airlight[0])
                path = places["hazy"] / f"{photo.name}_{draw}_{beta:.3f}_{airlight:.3f}.png"
                write_image(path, hazy)
                images.append(_Image(path, clear, photo, split == "test", beta, airlight))
    return images


def _compare(folder: Path, weights: Path, images: Sequence[_Image], console: Console) -> tuple[Comparison, ...]:
    """Dehaze the hazy files as `mitnet-fast dehaze` does, and score what is then on disk."""
    model, _ = load_weights(weights)
    columns = TextColumn("dehazing"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(images))
        summary = dehaze_files(
            model,
            [image.hazy for image in images],
            folder / "dehazed",
            overwrite=True,
            progress=lambda done, *_: progress.update(task, completed=done),
        )
    for failure in summary.failures:
        raise RuntimeError(f"{failure.input}: {failure.error}")
    comparisons = []
    for image, result in zip(images, summary.results, strict=True):
        hazy, clear, restored = (read_image(path).rgb for path in (image.hazy, image.clear, result.output))
        comparisons.append(
            Comparison(
                image.hazy.name,
                image.photograph.name,
                image.held_out,
                image.photograph.depth_kind,
                image.beta,
                image.airlight,
                score(hazy, clear),
                best_stretch(hazy, clear)[1],
                score(restored, clear),
            )
        )
    return tuple(comparisons)


def _mean(comparisons: Iterable[Comparison], what: str, held_out: bool) -> Score:
    scores = [getattr(each, what) for each in comparisons if each.held_out == held_out]
    return Score(*(statistics.fmean(values) for values in zip(*scores, strict=True)))


def _write_scores(path: Path, comparisons: Sequence[Comparison]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    measures = [f"{what} {measure}" for what in ("hazy", "stretched", "restored") for measure in Score._fields]
    table.writerow(["file", "photograph", "held out", "depth", "beta", "airlight", *measures])
    for each in comparisons:
        split = "yes" if each.held_out else "no"
        scores = [*each.hazy, *each.stretched, *each.restored]
        table.writerow([each.file, each.photograph, split, each.depth_kind, each.beta, each.airlight, *scores])
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode("utf-8"))


def _title(system: str) -> str:
    return {"mitnet": "MITNet", "dcmpnet": "DCMPNet"}[system]


def _introduce(console: Console, title: str, training: Sequence[Photograph], held_out: Sequence[Photograph]) -> None:
    console.print(f"[bold]mitnet-fast demo[/]: {title} on real photographs, offline, with synthetic haze\n")
    for heading, chosen in (("held out, never trained on", held_out), ("trained on", training)):
        console.print(f"[bold]{heading}[/]")
        for photo in chosen:
            kind = "[green]measured depth[/]" if photo.depth_kind == MEASURED else "planar ramp instead of depth"
            console.print(f"  {photo.name}: {kind} ({escape(photo.credit)})", highlight=False)
    console.print(
        f"[bold]haze[/]\n  I = J·t + A·(1 − t), t = exp(−β·Z), Z from 2 m to 5 m; drawn for every image, β from "
        f"{BETA[0]:g} to {BETA[1]:g} per metre, A from {AIRLIGHT[0]:g} to {AIRLIGHT[1]:g}, independently for training "
        f"and for what is scored; in training also colours up to {SATURATION[1]:g} times as vivid, and channels in "
        f"random order in {EXCHANGED:.0%} of the windows",
        highlight=False,
    )


def _table(comparisons: Sequence[Comparison], title: str) -> Table:
    """Scores of every image and their means, held-out photographs first."""
    table = Table(
        title="PSNR in dB and SSIM against the haze-free photograph", box=None, padding=(0, 1), pad_edge=False
    )
    for heading, justify in (
        ("photograph", "left"),
        ("depth", "left"),
        ("β", "right"),
        ("A", "right"),
        ("hazy", "right"),
        ("stretched¹", "right"),
        (title, "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)

    def cells(*scores: Score) -> list[str]:
        return [f"{each.psnr:5.2f} {each.ssim:.3f}" for each in scores]

    for held_out in (True, False):
        table.add_section()
        table.add_row("[bold]held out[/]" if held_out else "[bold]trained on[/]")
        for each in comparisons:
            if each.held_out == held_out:
                kind = "measured" if each.depth_kind == MEASURED else "ramp"
                scores = cells(each.hazy, each.stretched, each.restored)
                table.add_row(each.photograph, kind, f"{each.beta:.2f}", f"{each.airlight:.2f}", *scores)
        means = (_mean(comparisons, what, held_out) for what in ("hazy", "stretched", "restored"))
        table.add_row("mean", "", "", "", *cells(*means), style="bold")
    table.caption = "¹ min–max contrast stretch of each image, per channel or joint, whichever is nearer to the truth"
    return table


def _conclude(console: Console, demo: DemoResult, folder: Path) -> None:
    console.print(
        f"\nOn photographs it never saw the network gains [bold]{demo.gain('hazy'):+.2f} dB[/] over the hazy images "
        f"and [bold]{demo.gain('stretched'):+.2f} dB[/] over the contrast stretch, after {demo.training_seconds:.0f} s "
        f"of training. SSIM: hazy {demo.mean('hazy', held_out=True).ssim:.3f}, stretched "
        f"{demo.mean('stretched', held_out=True).ssim:.3f}, restored {demo.mean('restored', held_out=True).ssim:.3f}.",
        highlight=False,
    )
    console.print("\n[bold]written[/]")
    for path, what in (
        (demo.picture, "hazy, stretched, restored and clear side by side"),
        (demo.scores, "the table, in full precision"),
        (demo.weights, "the weights: a demo's, for a look, not for use"),
        (folder / "dehazed", "what `mitnet-fast dehaze` makes of the hazy images with them"),
        (folder / "photographs", "hazy and clear images, a data set in Haze4K's layout"),
        (folder / "training", "configuration, losses and checkpoints of the run"),
    ):
        console.print(f"  {escape(str(path))}: {what}", highlight=False)
    console.print("\n[bold]next[/]")
    for command in (
        f"mitnet-fast dehaze PHOTO.jpg -o dehazed --weights {demo.weights}",
        f"mitnet-fast evaluate {folder / 'photographs'} --weights {demo.weights}",
        "mitnet-fast train mitnet-its --data ITS    (a real data set, a GPU, days: weights for use)",
    ):
        console.print(f"  {escape(command)}", highlight=False, soft_wrap=True)


def _draw(demo: DemoResult, folder: Path, title: str) -> None:
    """Draw the first hazy version of `DRAWN`, each beside its restorations and the truth."""
    rows = [next(each for each in demo.comparisons if each.photograph == name) for name in DRAWN]
    pictures = [_pictures(folder, row) for row in rows]
    # all in inches
    width, gap, caption, header, margin, label = 3.2, 0.08, 0.34, 0.42, 0.15, 0.62
    heights = [width * images[0].shape[-2] / images[0].shape[-1] for images in pictures]
    size = (label + 4 * width + 3 * gap + margin, header + sum(heights) + caption * len(rows) + margin)
    figure = Figure(figsize=size, dpi=120, facecolor="white")

    def write(x: float, y: float, text: str, **style: object) -> None:
        figure.text(x / size[0], y / size[1], text, **{"ha": "center", "va": "center", "color": INK, **style})

    for column, heading in enumerate(("hazy", "contrast stretch", title, "haze-free")):
        centre = label + column * (width + gap) + width / 2
        write(centre, size[1] - header / 2, heading, fontsize=14, fontweight="bold")
    top = size[1] - header
    for row, images, height in zip(rows, pictures, heights, strict=True):
        bottom = top - height
        write(0.2, bottom + height / 2, row.photograph, fontsize=13, fontweight="bold", rotation=90)
        split = "held out" if row.held_out else "trained on"
        depth = "measured depth" if row.depth_kind == MEASURED else "planar ramp"
        write(0.44, bottom + height / 2, f"{split} · {depth}", fontsize=9.5, rotation=90, color=FAINT)
        haze = f"β {row.beta:.2f}/m, A {row.airlight:.2f}"
        scored = (row.hazy, row.stretched, row.restored)
        best = Score(*(max(values) for values in zip(*scored, strict=True)))
        for column, image in enumerate(images):
            left = label + column * (width + gap)
            axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="lanczos", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()
            centre, line = left + width / 2, bottom - caption * 0.42
            if column == len(scored):
                write(centre, line, haze, fontsize=11, color=FAINT)
                continue
            found = scored[column]
            for x, ha, text, leads in (
                (centre - 0.12, "right", f"{found.psnr:.1f} dB", found.psnr == best.psnr),
                (centre + 0.12, "left", f"SSIM {found.ssim:.2f}", found.ssim == best.ssim),
            ):
                write(x, line, text, fontsize=11, ha=ha, fontweight="bold" if leads else "normal")
        top = bottom - caption
    with atomic_write(demo.picture) as stream:
        figure.savefig(stream, format="png")


def _pictures(folder: Path, row: Comparison) -> list[torch.Tensor]:
    """Hazy, stretched, restored and clear image of a comparison, from their files."""
    place = folder / "photographs" / ("test" if row.held_out else "train")
    hazy, restored, clear = (
        read_image(path).rgb
        for path in (place / "hazy" / row.file, folder / "dehazed" / row.file, place / "gt" / f"{row.photograph}.png")
    )
    return [hazy, best_stretch(hazy, clear)[0], restored, clear]
