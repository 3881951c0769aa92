"""Time and memory of whole networks, the library's choice of kernels against plain PyTorch.

    python -m benchmarks.models [--network MITNet] [--size 128] [--batch 2] [--dtype bfloat16] [--compile]

Both networks at their published width, in three pieces of work:

    training step              the trainer's own: forward, losses, backward and Adam on a batch that is there
                               (DCMPNet with its L1 loss alone: its other losses run networks of their own)
    training step with data    the same, fed by the trainer's own loader from photographs on disk
    inference                  ``restore``

Plain PyTorch runs in NCHW and in channels_last, and speed-ups are given over the faster of the two;
``--compile`` adds torch.compile of it, which takes minutes; on a GPU the step as one CUDA graph comes on
top. ``--dtype bfloat16`` computes by autocast. All of them take turns in one process, but for steps with data
whose loaders have processes of their own, which would work during the others' turns; memory is measured in
processes of their own.

What does not give the plain network's numbers has no speed: restored images for inference, losses and all
gradients for training steps. What is compiled or recorded is held against the same steps run eagerly.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mitnet_fast import ops, reference
from mitnet_fast.data.haze import synthesise_haze
from mitnet_fast.data.images import write_image
from mitnet_fast.data.paired import PairedImages
from mitnet_fast.data.photographs import photographs
from mitnet_fast.inference import OVERLAP, restore_tiled
from mitnet_fast.models import DCMPNet, MITNet
from mitnet_fast.specs import TF32_EPS, relative_error
from mitnet_fast.training import Configuration, System, build_system, load_config
from mitnet_fast.training.loader import batches
from mitnet_fast.training.sampler import EpochBatches
from mitnet_fast.training.step import WARM_UP

from .measure import (
    TURNS,
    Result,
    Timing,
    environment,
    float32_precision,
    in_new_process,
    peak_memory,
    take_turns,
    times_of,
    write_results,
)
from .ops import complex_amplitude_phase_conv

TRAINING, WITH_DATA, INFERENCE = "training step", "training step with data", "inference"
WORK = (TRAINING, WITH_DATA, INFERENCE)
QUICK_TURNS = 3  # of each implementation, in a quick run
CHECKED_SIZE = 64  # pixels, side of the images on which results are compared
WARMED_SIZE = 32  # pixels, side of the images that start thread pools and libraries before memory is measured
CHECKED_SEEDS = 3  # problems; one may hold a phase at ±π that rounding flips, the median does not
# Largest relative difference of the gradients of a step. In float32, rounding alone turns ReLUs on and off.
GRADIENTS_DIFFER = {torch.float64: 1e-9, torch.float32: 0.05}
STEPS_DIFFER = 0.01  # of the same steps run in another way, relative: Adam enlarges what rounding leaves
COPIES = 3  # batches that the turns rotate through
TILE = 1024  # pixels, side of the tiles in which images are restored where whole ones end
DTYPES = ("float32", "bfloat16")
PHOTOGRAPH_SIDE = 620  # longer side of the photographs on disk, pixels: that of the indoor training set

NETWORKS: dict[str, Callable[[], nn.Module]] = {"MITNet": MITNet, "DCMPNet": DCMPNet}
PRESETS = {"MITNet": ("mitnet-its",), "DCMPNet": ("dcmpnet-its", "data.depth=none", "loss.contrastive_weight=0")}


@dataclass(frozen=True)
class Implementation:
    """A way to run a network.

    Attributes:
        backends: a context in which the network runs on a type of device.
        layout: memory format of its weights and images.
        step: how a training step runs, ``run.step`` of its configuration; "compile" is that for inference too.
        tile: side of the tiles in which larger images are restored, pixels; None: whole images.
    """

    backends: Callable[[str], AbstractContextManager]
    layout: torch.memory_format = torch.contiguous_format
    step: str = "eager"
    tile: int | None = None


def _reference(device: str) -> AbstractContextManager:
    return ops.use_backend("reference")


@contextmanager
def _plain(device: str) -> Iterator[None]:
    """Plain PyTorch, spectra by complex numbers as the published network has them, faster than the reference."""
    with _reference(device), patch.object(reference, "amplitude_phase_conv", complex_amplitude_phase_conv):
        yield


def _fused(device: str) -> AbstractContextManager:
    """What runs by default, but on a GPU, where that may be plain PyTorch, its kernels by name."""
    if device != "cuda":
        return nullcontext()
    return ops.use_backend("triton", dynamic_filter="cpp", amplitude_phase="cpp", window_attention="cpp")


REFERENCE = Implementation(_reference)  # whose numbers the others are held to
PLAIN = ("plain", "plain, channels_last")
IMPLEMENTATIONS = {
    "plain": Implementation(_plain),
    "plain, channels_last": Implementation(_plain, torch.channels_last),
    "fused": Implementation(_fused),
    "fused, channels_last": Implementation(_fused, torch.channels_last),
}
GRAPHED = {  # on GPUs, of training steps
    "plain, channels_last, CUDA graph": Implementation(_plain, torch.channels_last, "cuda_graph"),
    "fused, CUDA graph": Implementation(_fused, step="cuda_graph"),
    "fused, channels_last, CUDA graph": Implementation(_fused, torch.channels_last, "cuda_graph"),
}
TILED = {f"tiles of {TILE}², fused": replace(IMPLEMENTATIONS["fused, channels_last"], tile=TILE)}
COMPILED = {"compile": replace(REFERENCE, step="compile")}  # complex numbers do not compile
FED = ("plain, channels_last", "fused, channels_last", "fused, channels_last, CUDA graph")  # from disk


def implementations(work: str, device: str, compiled: bool) -> dict[str, Implementation]:
    """What is measured for a piece of work, by name."""
    graphed = GRAPHED if device == "cuda" and work != INFERENCE else {}
    found = IMPLEMENTATIONS | graphed | (COMPILED if compiled and work != WITH_DATA else {})
    return {name: each for name, each in found.items() if work != WITH_DATA or name in FED}


def configuration(
    network: str, implementation: Implementation, batch: int, size: int, device: str, dtype: str = "float32"
) -> Configuration:
    """The training that is measured, as ``mitnet-fast train`` would be told."""
    overrides = (
        f"data.batch={batch}",
        f"data.patch={size}",
        f"run.device={device}",
        f"run.precision={dtype}",
        f"run.channels_last={str(implementation.layout == torch.channels_last).lower()}",
        f"run.step={implementation.step}",
        # decoding has the processor to itself where the network does not compute on it
        f"data.workers={min(4, os.cpu_count() or 1) if device == 'cuda' else 0}",
    )
    preset, *fixed = PRESETS[network]
    return load_config(preset, (*fixed, *overrides))


def system_of(config: Configuration, device: str) -> System:
    """The trainer's system, with the same weights every time; what it cannot do as asked raises."""
    torch.manual_seed(0)
    system = build_system(config, torch.device(device))

    def refuse(reason: str) -> None:
        raise RuntimeError(reason)

    system.say = refuse
    return system


def prepare(
    network: str,
    work: str,
    implementation: Implementation,
    batch: int,
    size: int,
    device: str,
    dtype: str = "float32",
    copies: int = 1,
) -> Callable[..., object]:
    """A function that does the work once, on the copy of the images that its argument chooses.

    Networks and images are the same in every implementation. A training step returns its losses, inference
    what it has restored.
    """
    generator = torch.Generator().manual_seed(1)
    batches = [_images(implementation, batch, size, device, generator) for _ in range(copies)]
    if work == TRAINING:
        system = system_of(configuration(network, implementation, batch, size, device, dtype), device)
        return lambda index=0: system.training_step(batches[index % copies])
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=implementation.layout).eval()
    compiled = torch.compile(model) if implementation.step == "compile" else None

    def restored(hazy: torch.Tensor) -> torch.Tensor:
        if compiled:
            return compiled(hazy).restored
        tile = implementation.tile
        return model.restore(hazy) if tile is None else restore_tiled(model.restore, hazy, tile, OVERLAP)

    @torch.no_grad()
    def restore(index: int = 0) -> torch.Tensor:
        with autocast(dtype, device):
            return restored(batches[index % copies]["hazy"])

    return restore


def _images(
    implementation: Implementation, batch: int, size: int, device: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    return {
        name: torch.rand(batch, 3, size, size, generator=generator).to(device, memory_format=implementation.layout)
        for name in ("hazy", "clear")
    }


def autocast(dtype: str, device: str) -> torch.autocast:
    """The arithmetic of :data:`DTYPES`."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def turn(
    network: str, work: str, implementation: Implementation, batch: int, size: int, device: str, dtype: str = "float32"
) -> Callable[[int], object]:
    """The prepared work under the implementation's backends, as :func:`take_turns` calls it."""
    call = prepare(network, work, implementation, batch, size, device, dtype, COPIES)

    def run(index: int) -> object:
        with implementation.backends(device):
            return call(index)

    return run


@functools.cache
def flops(network: str, work: str, batch: int, size: int) -> int:
    """Floating-point operations of the convolutions and matrix products of a network, and of their gradients."""
    model = NETWORKS[network]()
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), ops.use_backend("reference"), counter:
        restored = model(torch.rand(batch, 3, size, size)).restored
        if work != INFERENCE:
            restored.sum().backward()
    return counter.get_total_flops()


def is_correct(network: str, work: str, implementation: Implementation, device: str, dtype: str = "float32") -> bool:
    """Whether an implementation gives what the plain network gives: restored images, or losses and gradients."""
    eager = replace(implementation, step="eager")
    if work == INFERENCE:
        return restores_alike(network, eager, device, dtype)
    return trains_alike(network, eager, device, dtype)


@functools.cache
def restores_alike(network: str, implementation: Implementation, device: str, dtype: str) -> bool:
    """Whether restored images are as near to those in float64 as plain PyTorch's, in the median."""
    errors, plain_errors = [], []
    for seed in range(CHECKED_SEEDS):
        truth, plain_error = _truth(network, seed, device, dtype)
        model, image = _problem(network, seed, device)
        with implementation.backends(device), autocast(dtype, device):
            restored = model.to(memory_format=implementation.layout).restore(
                image.contiguous(memory_format=implementation.layout)
            )
        errors.append(relative_error(restored, truth))
        plain_errors.append(plain_error)
    rounding = 8 * (TF32_EPS if float32_precision(device) == "TF32" else torch.finfo(torch.float32).eps)
    return statistics.median(errors) <= max(4 * statistics.median(plain_errors), rounding)


@functools.cache
def _truth(network: str, seed: int, device: str, dtype: str) -> tuple[torch.Tensor, float]:
    """What a network restores of an image in float64, and how far plain PyTorch in ``dtype`` is from it."""
    model, image = _problem(network, seed, device)
    with _reference(device):
        with autocast(dtype, device):
            plain = model.restore(image)
        truth = model.double().restore(image.double())
    return truth, relative_error(plain, truth)


def _problem(network: str, seed: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = NETWORKS[network]().to(device).eval()
    return model, torch.rand(1, 3, CHECKED_SIZE, CHECKED_SIZE, device=device)


@functools.cache
def trains_alike(network: str, implementation: Implementation, device: str, dtype: str) -> bool:
    """Whether losses and all gradients of a training step are the plain network's in float64.

    On the CPU, whose kernels take float64, the step runs in it and has to give the same numbers. Else it is
    held to four times the error of the plain network's own step.
    """
    exact = torch.float64 if device == "cpu" and dtype == "float32" else torch.float32
    truth = _first_step(network, REFERENCE, device, torch.float64, "float32")
    found = _first_step(network, implementation, device, exact, dtype)
    plain = _first_step(network, REFERENCE, device, exact, dtype)

    def errors(step: tuple[float, torch.Tensor]) -> tuple[float, float]:
        loss, gradients = ((mine - true) for mine, true in zip(step, truth, strict=True))
        return abs(loss / truth[0]), (gradients.norm() / truth[1].norm()).item()

    return all(
        error <= max(4 * own, GRADIENTS_DIFFER[exact]) for error, own in zip(errors(found), errors(plain), strict=True)
    )


@functools.cache
def _first_step(
    network: str, implementation: Implementation, device: str, exact: torch.dtype, dtype: str
) -> tuple[float, torch.Tensor]:
    """Loss and gradients [n] of the first training step on one small image."""
    system = system_of(configuration(network, implementation, 1, CHECKED_SIZE, device, dtype), device)
    system.modules.to(exact)
    images = _images(implementation, 1, CHECKED_SIZE, device, torch.Generator().manual_seed(2))
    with implementation.backends(device):
        losses = system.training_step({name: image.to(exact) for name, image in images.items()})
    gradients = [p.grad for parameters in system.parameters.values() for p in parameters if p.grad is not None]
    return losses["total"], torch.cat([gradient.flatten() for gradient in gradients]).double()


def runs_alike(
    call: Callable[[int], object], network: str, work: str, implementation: Implementation, *where: object
) -> bool:
    """Whether what is compiled or recorded gives what the same implementation gives eagerly.

    Args:
        call: of what is compiled or recorded; as many are made as recording takes, and one more.
        network, work, implementation: whose.
        where: batch, size, device and dtype, as :func:`turn` takes them.
    """
    eager = turn(network, work, replace(implementation, step="eager"), *where)
    alike = True
    for index in range(WARM_UP + 1):
        found, expected = call(index), eager(index)
        if work == INFERENCE:
            alike &= relative_error(found, expected) <= STEPS_DIFFER
        else:
            alike &= abs(found["total"] - expected["total"]) <= STEPS_DIFFER * abs(expected["total"])
    return alike


def memory(network: str, work: str, name: str, batch: int, size: int, device: str, dtype: str = "float32") -> float:
    """Megabytes above network and images at the peak of one piece of work."""
    implementation = (IMPLEMENTATIONS | GRAPHED)[name]
    with implementation.backends(device):
        if device == "cpu":
            prepare(network, work, implementation, 1, WARMED_SIZE, device, dtype)()
        call = prepare(network, work, implementation, batch, size, device, dtype)
        if device == "cuda":
            call()
        return peak_memory(call, device) / 1e6


def measured_memory(network: str, work: str, name: str, batch: int, size: int, device: str, dtype: str) -> float | None:
    """The same, measured where nothing else was; None where the compiler's or the graph's own pool dominates."""
    if name in COMPILED or name in GRAPHED:
        return None
    if device == "cuda":
        return memory(network, work, name, batch, size, device, dtype)
    return in_new_process(memory, network, work, name, batch, size, device, dtype)


@contextmanager
def photographs_on_disk(size: int) -> Iterator[Path]:
    """A folder of hazy and clear photographs, gone afterwards.

    Args:
        size: of the patches that are cut from them; none is smaller, pixels.
    """
    with tempfile.TemporaryDirectory(prefix="mitnet-fast-bench-") as folder:
        for photo in photographs(max_side=max(PHOTOGRAPH_SIDE, 2 * size)):
            if min(photo.rgb.shape[1:]) < size:
                continue
            for place, image in (("hazy", synthesise_haze(photo.rgb, photo.depth, 0.4, 0.9)), ("gt", photo.rgb)):
                file = Path(folder, "train", place, f"{photo.name}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                write_image(file, image)
        yield Path(folder)


@contextmanager
def fed_steps(
    network: str, implementation: Implementation, folder: Path, batch: int, size: int, device: str, dtype: str
) -> Iterator[Callable[[int], object]]:
    """A function that takes a training step, from asking the loader for its batch to having its losses."""
    config = configuration(network, implementation, batch, size, device, dtype)
    system = system_of(config, device)
    dataset = PairedImages(
        folder, split="train", patch=size, augment=config.data.augment, repeat=100 * batch, on_device=True
    )
    order = EpochBatches(len(dataset), batch, seed=0)
    loaded = batches(dataset, system.device, workers=config.data.workers, seed=0, batch_sampler=order)

    def step(_: int) -> object:
        with implementation.backends(device):
            return system.training_step(next(loaded))

    with closing(loaded):
        yield step


def measure(
    network: str,
    work: str,
    batch: int,
    size: int,
    device: str,
    seconds: float,
    *,
    dtype: str = "float32",
    compiled: bool = False,
    quick: bool = False,
) -> list[Result]:
    """All implementations of one piece of work; ``quick`` leaves out memory and takes fewer turns."""
    least = QUICK_TURNS if quick else TURNS
    with_memory = not quick and work != WITH_DATA
    workers = configuration(network, IMPLEMENTATIONS["plain"], batch, size, device).data.workers
    where = batch, size, device, dtype
    chosen = implementations(work, device, compiled)
    timings: dict[str, Timing] = {}
    problems: dict[str, str] = {}
    with ExitStack() as stack:
        calls: dict[str, Callable[[int], object]] = {}
        folder = stack.enter_context(photographs_on_disk(size)) if work == WITH_DATA else None
        for name, implementation in chosen.items():
            try:
                if name not in PLAIN and not is_correct(network, work, implementation, device, dtype):
                    problems[name] = "fails its check"
                    continue
                if implementation.step != "eager":
                    piece = INFERENCE if work == INFERENCE else TRAINING
                    call = turn(network, piece, implementation, *where)
                    if not runs_alike(call, network, piece, implementation, *where):
                        problems[name] = "fails its check"
                        continue
                if work != WITH_DATA:
                    calls[name] = (
                        call if implementation.step != "eager" else turn(network, work, implementation, *where)
                    )
                    continue
                step = stack.enter_context(fed_steps(network, implementation, folder, *where))
                for index in range(WARM_UP + 1 if implementation.step != "eager" else 1):
                    step(index)
                if workers:
                    timings |= take_turns({name: step}, device, seconds=seconds, least=least)
                else:
                    calls[name] = step
            except Exception as error:
                if isinstance(error, ops.BackendError):
                    problems[name] = str(error)
                elif implementation.step != "eager":
                    problems[name] = _problem_of(implementation, error)
                else:
                    raise
        if calls:
            timings |= take_turns(calls, device, seconds=seconds, least=least)
    fastest_plain = min(timings[name].median for name in PLAIN if name in timings)
    operations = flops(network, work, batch, size)
    return [
        Result(
            kind="network",
            name=network,
            work=work,
            case=f"[{batch}, 3, {size}, {size}]" + (f" workers={workers}" if work == WITH_DATA else ""),
            dtype=dtype,
            layout="channels_last" if implementation.layout == torch.channels_last else "contiguous",
            precision=float32_precision(device) if dtype == "float32" else "IEEE",
            implementation=name,
            problem=problems.get(name),
            **times_of(timing := timings.get(name)),
            speedup=timing and fastest_plain / timing.median,
            gigabytes_per_second=None,
            bandwidth_share=None,
            gigaflops=timing and operations / timing.median / 1e9,
            matrix_rate_share=None,
            memory_mb=measured_memory(network, work, name, *where) if timing and with_memory else None,
            **environment(device),
        )
        for name, implementation in chosen.items()
    ]


def _problem_of(implementation: Implementation, error: Exception) -> str:
    what = "does not compile" if implementation.step == "compile" else "cannot be recorded"
    return f"{what}: {next(iter(str(error).splitlines()), type(error).__name__)}"


def show(rows: list[Result], console: Console) -> None:
    """Print one table per network."""
    with_memory = any(row.memory_mb is not None for row in rows)
    columns = ("work", "implementation", "ms", "p20–p80", "runs", "× plain", "GFLOP/s")
    for network, dtype in dict.fromkeys((row.name, row.dtype) for row in rows):
        table = Table(*columns, *(["peak MB"] if with_memory else []), title=f"{network}, {dtype}")
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            if (row.name, row.dtype) != (network, dtype):
                continue
            work = f"{row.work} {row.case}"
            if row.median_ms is None:
                table.add_row(work, row.implementation, f"[red]{row.problem}[/]")
                continue
            table.add_row(
                work,
                row.implementation,
                f"{row.median_ms:.0f}",
                f"{row.p20_ms:.0f}–{row.p80_ms:.0f}",
                str(row.runs),
                f"{row.speedup:.2f}",
                f"{row.gigaflops:.0f}",
                *([f"{row.memory_mb:.0f}"] if row.memory_mb is not None else []),
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), help="one network; both by default")
    parser.add_argument("--work", choices=WORK, help="one piece of work; all by default")
    parser.add_argument("--size", type=int, default=128, help="side of the images, a multiple of 8")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is computed by autocast")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each implementation and piece of work")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain networks too")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    console, rows = Console(), []
    for network in NETWORKS if options.network is None else (options.network,):
        for work in WORK if options.work is None else (options.work,):
            with console.status(f"{network}, {work}"):
                rows += measure(
                    network,
                    work,
                    options.batch,
                    options.size,
                    options.device,
                    options.seconds,
                    dtype=options.dtype,
                    compiled=options.compile,
                )
    show(rows, console)
    if options.output:
        write_results(rows, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
