"""What lower precision costs in decibels: held-out photographs restored by trained networks, part by part.

    python -m benchmarks.precision WEIGHTS… [--device cpu] [--output benchmarks/results/cpu/precision]

WEIGHTS are those that ``mitnet-fast demo`` and ``mitnet-fast demo --system dcmpnet`` leave behind, or any
others. The images are the demo's: photographs that its training has never seen, under haze drawn from the
same ranges. Every setting restores the same images; its PSNR and SSIM are held against those of float32,
beside the largest change of any 8-bit value. "everything" computes the whole network in that
precision, the other rows one part alone and the rest in float32 (IEEE): what a part can be trusted with.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_map_only

from mitnet_fast.data.haze import sample_haze
from mitnet_fast.data.photographs import photographs
from mitnet_fast.demo import AIRLIGHT, BETA, DRAWS, HELD_OUT, SCORING_SEED, SIDE
from mitnet_fast.evaluation import score
from mitnet_fast.specs import float32_products
from mitnet_fast.weights import load_weights

from .measure import environment, write_results

Image = tuple[torch.Tensor, torch.Tensor]
EVERYTHING = "everything"
PARTS = {  # names of the parts, and how the names of their modules begin
    "MITNet": {
        "amplitude stage": ("amplitude_", "supervised_attention"),
        "phase stage": ("phase_", "stage_fusion", "triple_interaction", "to_image"),
    },
    "DCMPNet": {
        "prior": ("prior",),
        "depth branch": ("depth_",),
        "attention": ("legm",),
        "everything else": ("msaam", "embed", "join", "merge", "decode", "up", "skip", "mfm", "to_image"),
    },
}


@dataclass(frozen=True)
class Row:
    """One network in one precision.

    Attributes:
        network: its name and width.
        part: "everything", or the part that alone is computed so.
        precision: "float32", "bfloat16", "float16" (both by autocast) or "TF32".
        images: restored.
        psnr: mean, dB.
        psnr_change: of its mean against float32, dB; negative is worse.
        ssim: mean.
        largest_change: of any pixel's value against float32, in 8-bit levels.
        device, threads, torch, triton, python, commit: where, and with what.
    """

    network: str
    part: str
    precision: str
    images: int
    psnr: float
    psnr_change: float
    ssim: float
    largest_change: float
    device: str
    threads: str
    torch: str
    triton: str
    python: str
    commit: str


def held_out(side: int = SIDE, draws: int = DRAWS) -> list[Image]:
    """Hazy and clear photographs [3, H, W] that the demo's training has not seen, as the demo scores them."""
    generator = torch.Generator().manual_seed(SCORING_SEED)
    return [
        (sample_haze(photo.rgb, photo.depth, beta=BETA, airlight=AIRLIGHT, generator=generator)[0], photo.rgb)
        for photo in photographs(HELD_OUT, max_side=side)
        for _ in range(draws)
    ]


@contextmanager
def autocast_within(modules: Sequence[nn.Module], dtype: torch.dtype, device: str) -> Iterator[None]:
    """Autocast inside these modules alone; what they return is float32 again."""
    entered: list[torch.autocast] = []
    calls = 0

    def enter(*_) -> None:
        entered.append(torch.autocast(device, dtype))
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: tuple, output: object) -> object:
        nonlocal calls
        calls += 1
        entered.pop().__exit__(None, None, None)
        return tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, output)

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise RuntimeError("none of the modules of a part was called, so nothing was computed in its precision")


def precisions(model: nn.Module, device: str) -> Iterator[tuple[str, str, Callable[[], AbstractContextManager]]]:
    """Part, precision and the context that a network is run in, float32 first."""
    yield EVERYTHING, "float32", nullcontext
    halves = {"bfloat16": torch.bfloat16} | ({"float16": torch.float16} if device == "cuda" else {})
    if device == "cuda":
        yield EVERYTHING, "TF32", partial(float32_products, "tf32")
    for name, dtype in halves.items():
        yield EVERYTHING, name, partial(torch.autocast, device, dtype)
    for part, modules in parts(model).items():
        for name, dtype in halves.items():
            yield part, name, partial(autocast_within, modules, dtype, device)


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The parts of a network by name, each with its modules.

    Raises:
        ValueError: a network without parts, or a module with weights that belongs to none of them.
    """
    beginnings = PARTS.get(type(model).__name__)
    if beginnings is None:
        raise ValueError(f"model: expected one of {', '.join(PARTS)}, got {type(model).__name__}")
    found: dict[str, list[nn.Module]] = {part: [] for part in beginnings}
    for name, child in model.named_children():
        part = next((part for part, begin in beginnings.items() if name.startswith(begin)), None)
        if part is not None:
            found[part] += child if isinstance(child, nn.ModuleList) else [child]
        elif name != "unused" and any(True for _ in child.parameters()):
            raise ValueError(f"model: {name} of {type(model).__name__} belongs to no part")
    return found


def measure(model: nn.Module, images: Sequence[Image], device: str) -> list[Row]:
    """A network's scores in every precision."""
    model = model.to(device).eval()
    config = model.config
    label = f"{type(model).__name__}, width {config['width'] if 'width' in config else config['widths'][0]}"
    rows: list[Row] = []
    exact: list[torch.Tensor] = []
    for part, name, context in precisions(model, device):
        with float32_products("ieee"), context():
            restored = [model.restore(hazy[None].to(device))[0].float().cpu().clamp(0, 1) for hazy, _ in images]
        exact = exact or restored
        scores = [score(result, clear) for result, (_, clear) in zip(restored, images, strict=True)]
        psnr = statistics.fmean(each.psnr for each in scores)
        rows.append(
            Row(
                network=label,
                part=part,
                precision=name,
                images=len(images),
                psnr=psnr,
                psnr_change=psnr - rows[0].psnr if rows else 0.0,
                ssim=statistics.fmean(each.ssim for each in scores),
                largest_change=255 * max(float((a - b).abs().max()) for a, b in zip(restored, exact, strict=True)),
                **environment(device),
            )
        )
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Print one table."""
    table = Table("network", "part", "precision", "PSNR", "change, dB", "SSIM", "largest change of 255")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        cells = (f"{row.psnr:.3f}", f"{row.psnr_change:+.4f}", f"{row.ssim:.4f}", f"{row.largest_change:.2f}")
        table.add_row(row.network, row.part, row.precision, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+", help="of trained networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    console, images = Console(), held_out()
    rows = [row for file in options.weights for row in measure(load_weights(file)[0], images, options.device)]
    show(rows, console)
    if options.output:
        write_results(rows, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
