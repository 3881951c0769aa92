"""The command line: ``mitnet-fast …``. Each command checks its words, calls the library, prints."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from . import __version__
from ._interrupt import STOPPED, interruptible

app = typer.Typer(
    name="mitnet-fast",
    help="Image dehazing with MITNet and DCMPNet: train, restore, evaluate, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data sets on disk.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()

EXPECTED = (ValueError, OSError, RuntimeError, MemoryError)
"""What users and their machines do wrong; any other exception is a defect."""

Weights = Annotated[
    Path, typer.Option("--weights", "-w", help="Weights: .safetensors, a run's checkpoint, or a published .pt / .pth.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Half = Annotated[bool, typer.Option("--half", help="Compute in bfloat16 where autocast allows it.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False) -> None:
    if version:
        console.print(f"mitnet-fast {__version__}")
        raise typer.Exit


@app.command()
def doctor() -> None:
    """Show what this machine can do, and why not more."""
    from .doctor import report

    report(console)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures, weights and tables.")] = Path(
        "demo"
    ),
    system: Annotated[str, typer.Option(help="mitnet or dcmpnet.")] = "mitnet",
    seed: Annotated[int, typer.Option(help="Of weights, crops and haze.")] = 0,
) -> None:
    """Train a small network on real photographs for some minutes and show what it learned."""
    from .demo import run_demo

    interruptible()

    run_demo(output, system=system, seed=seed, console=console)


@app.command()
def train(
    preset: Annotated[
        str | None,
        typer.Argument(
            help="A preset (mitnet-its, dcmpnet-its, …) or a YAML file; with --resume also the run's folder, or none: "
            "whatever is not given stays as the run has it."
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", "-r", help="Folder of the run [runs/PRESET].")] = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Training set, the same as -s data.root=…")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "-s", help="section.field=value, as often as needed.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder stopped.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="With --resume: from this file instead of the run's last.pt.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")] = False,
) -> None:
    """Train MITNet or DCMPNet."""
    from rich.syntax import Syntax

    from .training import PRESETS, load_changes, load_config, to_yaml
    from .training import train as run_training

    interruptible()

    if checkpoint and not resume:
        raise typer.BadParameter("a checkpoint is there to --resume from", param_hint="--checkpoint")
    if resume and preset is not None and preset not in PRESETS and Path(preset).is_dir():
        if run is not None:
            raise typer.BadParameter(f"the run's folder is given twice, {preset} and {run}", param_hint="--run")
        preset, run = None, Path(preset)
    if show and resume:
        raise typer.BadParameter("a resumed run's configuration is in its config.yaml", param_hint="--show")
    if preset is None and not resume:
        raise typer.BadParameter(
            f"expected a preset or a YAML file; presets are {', '.join(PRESETS)}", param_hint="PRESET"
        )
    if preset is None and run is None:
        raise typer.BadParameter("--resume without a preset needs the run's folder", param_hint="--run")
    # a JSON string is a YAML string, whatever is in it
    overrides = [*([f"data.root={json.dumps(str(data))}"] if data else []), *(override or [])]
    config = load_config(preset, overrides) if preset and not resume else None
    if show:
        text = to_yaml(config)
        if console.is_terminal:
            console.print(Syntax(text, "yaml", background_color="default"))
        else:
            sys.stdout.write(text)  # whole lines, whatever their length: to be saved and read again
        return
    folder = run or Path("runs") / Path(preset).stem
    result = run_training(
        config,
        folder,
        resume=checkpoint or resume,
        changes=load_changes(preset, overrides) if resume else None,
        overwrite=overwrite,
        max_steps=max_steps,
        console=console,
    )
    if not result.finished and max_steps is None:
        raise typer.Exit(STOPPED)


@app.command()
def dehaze(
    inputs: Annotated[list[Path], typer.Argument(help="Images and folders of images.")],
    weights: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the restored images.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist in the folder.")] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Take images from folders within folders too.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Added to the name of every result.")] = "",
    extension: Annotated[str | None, typer.Option(help="Format of the results, such as .png; as the input's.")] = None,
    tile: Annotated[
        str, typer.Option(help="Side of the tiles, pixels, or none; auto takes tiles where memory is short.")
    ] = "auto",
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that neighbouring tiles share; 64 or half a tile by default.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Report how far tiles are from whole images, by restoring these too.")
    ] = False,
    self_ensemble: Annotated[bool, typer.Option("--self-ensemble", help="Average over 8 flips and rotations.")] = False,
    device: Device = "auto",
    half: Half = False,
) -> None:
    """Restore hazy images of any size; one that fails does not stop the others."""
    import torch

    from .inference import dehaze_files
    from .weights import load_weights

    interruptible()

    if not re.fullmatch(r"auto|none|\d+", tile) or (tile.isdecimal() and int(tile) < 64):
        raise typer.BadParameter(f"expected auto, none, or pixels from 64 up, got {tile!r}", param_hint="--tile")
    model, card = load_weights(weights, _device(device))
    _describe(card)
    with _progress("dehazing") as advance:
        summary = dehaze_files(
            model,
            inputs,
            output,
            dtype=torch.bfloat16 if half else torch.float32,
            overwrite=overwrite,
            recursive=recursive,
            suffix=suffix,
            extension=extension,
            tile=int(tile) if tile.isdecimal() else {"none": None}.get(tile, tile),
            overlap=overlap,
            compare=compare,
            self_ensemble=self_ensemble,
            progress=advance,
        )
    console.print(summary)
    if summary.failures:
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A data set in any known layout.")],
    weights: Weights,
    split: Annotated[str, typer.Option(help="Split to score: test, train, or all.")] = "test",
    layout: Annotated[str | None, typer.Option(help="Layout, when it is not recognised.")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="Named protocols; all by default.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the scores of each image here.")] = None,
    device: Device = "auto",
    half: Half = False,
) -> None:
    """Score restored images against the truth, by the published protocols side by side."""
    import torch

    from .data import PairedImages
    from .evaluation import PROTOCOLS, check_csv_path
    from .evaluation import evaluate as run_evaluation
    from .weights import load_weights

    interruptible()

    if csv:
        check_csv_path(csv)
    dataset = PairedImages(folder, None if split == "all" else split, layout=layout)
    model, card = load_weights(weights, _device(device))
    _describe(card)
    with _progress("evaluating") as advance:
        evaluation = run_evaluation(
            model,
            dataset,
            protocols=protocol or tuple(PROTOCOLS),
            dtype=torch.bfloat16 if half else torch.float32,
            progress=advance,
        )
    console.print(evaluation)
    if csv:  # last: what was found is shown even if the disk is full
        evaluation.write_csv(csv)
        _line(f"scores of each image: {csv}")
    if evaluation.failures:
        raise typer.Exit(1)


@app.command()
def export(
    weights: Weights,
    output: Annotated[Path, typer.Option("--output", "-o", help="The package to write, NAME.pt2 or NAME.onnx.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the images that it takes, any.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Images of many sizes instead of one.")] = False,
    format: Annotated[
        str, typer.Option(help="torch (torch.export), aoti (compiled by AOTInductor) or onnx.")
    ] = "torch",
    backend: Annotated[
        str | None, typer.Option(help="reference: needs nothing but torch; or cpp, triton; the best by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    device: Device = "auto",
) -> None:
    """Write a network as a package that runs without its Python code."""
    from .export import check_format
    from .export import export as export_network
    from .weights import load_weights

    interruptible()

    check_format(format, backend)
    if (size is None) != dynamic:
        raise typer.BadParameter("expected either a size, such as 480x640, or --dynamic", param_hint="--size")
    sides = re.fullmatch(r"(\d+)[x×](\d+)", size or "1x1")
    if sides is None:
        raise typer.BadParameter(f"expected HEIGHTxWIDTH, such as 480x640, got {size!r}", param_hint="--size")
    model, card = load_weights(weights, _device(device))
    _describe(card)
    description = export_network(
        model,
        output,
        size=None if dynamic else (int(sides[1]), int(sides[2])),
        format=format,
        backend=backend,
        card=card,
        overwrite=overwrite,
    )
    image = description["image"]
    if dynamic:
        _line(
            f"{output} takes images [1, 3, H, W] in [0, 1], H and W multiples of {image['multiple']} from "
            f"{image['smallest']}: continue others by reflection at the right and bottom, and crop the result"
        )
    else:
        _line(f"{output} takes images [1, 3, {image['height']}, {image['width']}] in [0, 1]")
    _line(f"results differ from the network's own by {description['deviation']:.1e} at most, for a random image")
    if description["needs"]:
        operators = ", ".join(name.removesuffix(".default") for name in description["operators"])
        _line(f"it calls {operators}: `import mitnet_fast.ops` before loading it, or use --backend reference")
    elif format != "onnx":
        _line("it needs nothing but torch")
    load = {
        "torch": "torch.export.load(path).module()",
        "aoti": "torch._inductor.aoti_load_package(path), on this kind of processor",
        "onnx": "onnxruntime.InferenceSession(path)",
    }
    _line(f"load it by {load[format]}; made with torch {description['versions']['torch']} on {description['device']}")


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="The data set's folder.")],
    layout: Annotated[str | None, typer.Option(help="Layout, when it is not recognised.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, not only its header.")] = False,
) -> None:
    """Name the layout, count pairs, report what is missing, unreadable or does not fit."""
    from .data import check

    report = check(folder, layout, decode=decode)
    console.print(report)
    if not report.usable:
        raise typer.Exit(1)


@data_app.command("depth")
def data_depth(
    folder: Annotated[Path, typer.Argument(help="The data set's folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the maps [FOLDER/depth].")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Depth network of the Hugging Face hub, or a folder that holds one.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="What the teacher gives, disparity or depth; measured on a known picture.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Layout, when it is not recognised.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compute maps anew that are there.")] = False,
    device: Device = "auto",
) -> None:
    """Compute depth maps of the clear images with a pretrained network, and keep them; goes on where it stopped."""
    from .data.teacher import DEFAULT_TEACHER, estimate_depth, load_teacher

    interruptible()

    network = load_teacher(teacher or DEFAULT_TEACHER, _device(device))
    with _progress("estimating depth") as advance:
        summary = estimate_depth(
            folder, network, output=output, layout=layout, kind=kind, overwrite=overwrite, progress=advance
        )
    console.print(summary)
    if summary.failures:
        raise typer.Exit(1)
    _line(f"train with them: -s data.depth={summary.folder}")


@app.command()
def verify(
    family: Annotated[str | None, typer.Option(help="One kernel family.")] = None,
    backend: Annotated[str | None, typer.Option(help="One backend.")] = None,
    random_cases: Annotated[int, typer.Option("--random", min=0, help="Random cases on top of the fixed ones.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Begin no call after so many; all run by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every check here.")] = None,
) -> None:
    """Check every kernel that can run here against float64."""
    from .verify import verify as run_verification

    interruptible()

    with _progress("verifying") as advance:
        verification = run_verification(family, backend, random_cases=random_cases, seconds=seconds, progress=advance)
    console.print(verification.render())
    for name, reason in verification.not_run.items():
        _line(f"not run: {name}: {reason}")
    for check in verification.failures[:20]:
        what = check.problem or f"{check.tensor}: error {check.error:.2e}, allowed {check.allowed:.2e}"
        _line(f"failed: {check.operator} on {check.backend}, {check.case}: {what}", "red")
    if json_path:
        verification.write_json(json_path)
        _line(f"every check: {json_path}")
    if not verification.checks:
        console.print("[yellow]nothing could run here[/]")
    if not verification.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, files and pictures.")] = Path(
        "bench"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small cases for a short time, in less than two minutes.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile of plain PyTorch as a baseline; takes minutes.")
    ] = False,
    family: Annotated[list[str] | None, typer.Option(help="Kernel families; all by default.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="MITNet or DCMPNet, or none; both by default.")] = None,
    device: Device = "auto",
) -> None:
    """Measure operators and whole networks against plain PyTorch on this machine."""
    from .benchmarks import bench as benchmark
    from .benchmarks.models import NETWORKS
    from .ops._backends import FAMILIES

    interruptible()

    networks = tuple(NETWORKS) if network is None else tuple(name for name in network if name != "none")
    chosen, _, index = _device(device).partition(":")
    if index:
        import torch

        torch.cuda.set_device(int(index))
    benchmark.run(
        output,
        quick=quick,
        compiled=compiled,
        families=family or FAMILIES,
        networks=networks,
        device=chosen,
        console=console,
    )


def main() -> None:
    """Run the command line; what a user did wrong is one line and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a name that the encoding does not know is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (SystemExit, KeyboardInterrupt) as end:
        if not _interrupted(end):
            raise
        Console(stderr=True).print("stopped")
        sys.exit(STOPPED)
    except EXPECTED as error:
        message = Text.assemble(("error:", "bold red"), " ", str(error) or type(error).__name__)
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done


def _interrupted(error: BaseException) -> bool:
    """Whether an exception comes from Ctrl-C, of which typer makes an exit code."""
    before = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt) or (before is not None and _interrupted(before))


def _line(text: str, style: str = "") -> None:
    """Print words that may hold a path: as they are, never broken, never taken for markup."""
    console.print(Text(text, style), soft_wrap=True)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: got {name!r}, allowed are auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device: got {name!r}, but PyTorch sees {gpus or 'no'} GPU; `mitnet-fast doctor` says more")
    return name


def _describe(card: dict[str, object]) -> None:
    """Say what the weights are; those of the demo must never pass for trained ones."""
    known = [f"{name} {card[name]}" for name in ("system", "width", "data") if card.get(name) is not None]
    _line("weights: " + (", ".join(known) or "no card"))
    if card.get("demo"):
        console.print(
            "[yellow]these are demo weights: trained for minutes on a handful of photographs, to show that it works[/]"
        )


class _progress:
    """A progress bar as a context whose value is the callback ``(done, all)``."""

    def __init__(self, what: str) -> None:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self):
        self.progress.start()
        task = self.progress.add_task("", total=None)
        return lambda done, total, *_: self.progress.update(task, completed=done, total=total)

    def __exit__(self, *exception) -> None:
        self.progress.stop()
