"""Speed and memory of the operators against plain PyTorch and ``torch.compile`` of it.

    python -m benchmarks.ops [--family dynamic_filter] [--seconds 2] [--compile] [--output benchmarks/results/NAME]

Every implementation of a case is checked against float64 first, on a part of it where nothing is compiled:
what fails has no speed (``mitnet-fast verify`` is what checks thoroughly). Baselines run in the same turns
as the kernels. Writes NAME.csv and NAME.json, one row per case, implementation and direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_leaves

from mitnet_fast.ops._backends import BACKENDS, FAMILIES, why_not
from mitnet_fast.reference.window_attention import padding, table_rows
from mitnet_fast.specs import SPECS, Case, OpSpec, allowed_error, expectations, relative_error
from mitnet_fast.verify import KERNELS

from .measure import (
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

ROTATED = 2**26  # bytes of all copies of the inputs at least: second-level caches and those of GPUs hold less
COPIES = (3, 32)  # least and most
CHECKED_SIDE = 64  # of the maps that results are compared on, pixels; windows and transforms are as in larger ones
FLEX_HEAD = 16  # channels that FlexAttention takes at the least


def shifted_slices(x, features, weight, bias, *, residual):
    """The predicted filter as K² shifted slices, another plain form that compiles well."""
    filters = F.conv2d(features, weight[:, :, None, None])
    if bias is not None:
        filters = filters + bias[..., None, None]
    channels, height, width = x.shape[1:]
    taps = filters.shape[1] // channels
    size = int(taps**0.5)
    filters = filters.unflatten(1, (channels, taps))
    padded = F.pad(x, [size // 2] * 4)
    y = x if residual else torch.zeros_like(x)
    for tap in range(taps):
        row, column = divmod(tap, size)
        y = y + filters[:, :, tap] * padded[:, :, row : row + height, column : column + width]
    return y


def complex_amplitude_phase_conv(
    x, weight1, bias1, weight2, bias2, output_weight=None, output_bias=None, *, mode, negative_slope
):
    """The amplitude / phase convolution by complex numbers, the faster plain form.

    No reference: its gradient is NaN where a bin is 0, and what it gives where bins are real is up to the library.
    """

    def mapped(values: torch.Tensor) -> torch.Tensor:
        hidden = F.leaky_relu(F.conv2d(values, weight1[:, :, None, None], bias1), negative_slope)
        return F.conv2d(hidden, weight2[:, :, None, None], bias2)

    spectrum = torch.fft.rfft2(x)
    amplitude, phase = spectrum.abs(), spectrum.angle()
    amplitude, phase = (mapped(amplitude), phase) if mode == "amplitude" else (amplitude, mapped(phase))
    y = torch.fft.irfft2(torch.complex(amplitude * phase.cos(), amplitude * phase.sin()), s=x.shape[-2:])
    if output_weight is None:
        return y
    joined = y if output_weight.shape[1] == y.shape[1] else torch.cat([x, y], 1)
    return F.conv2d(joined, output_weight[:, :, None, None], output_bias)


def _copied_windows(qk, v, num_heads, window_size, shift) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Q, K and V as windows [3, windows, heads, w², d], on padded and cut copies; and the way back to a map."""
    batch, channels, height, width = v.shape
    top, bottom = padding(height, window_size, shift)
    left, right = padding(width, window_size, shift)
    padded = F.pad(torch.cat([qk, v], 1), (left, right, top, bottom), mode="reflect")
    grid = padded.shape[-2] // window_size, padded.shape[-1] // window_size
    windows = padded.view(batch, 3, num_heads, -1, grid[0], window_size, grid[1], window_size)
    windows = windows.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).flatten(1, 3)

    def whole(attended: torch.Tensor) -> torch.Tensor:
        attended = attended.reshape(batch, *grid, num_heads, window_size, window_size, -1)
        uncut = attended.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, channels, *padded.shape[-2:])
        return uncut[:, :, top : top + height, left : left + width].contiguous()

    return windows, whole


def attention_of_copied_windows(qk, v, bias_table, *, num_heads, window_size, shift):
    """Window attention by PyTorch's own, on the padded and cut copies that it needs."""
    windows, whole = _copied_windows(qk, v, num_heads, window_size, shift)
    bias = bias_table[table_rows(window_size).to(bias_table.device)].permute(2, 0, 1)
    return whole(F.scaled_dot_product_attention(*windows, attn_mask=bias.expand(windows.shape[1], -1, -1, -1)))


def flexible_attention(qk, v, bias_table, *, num_heads, window_size, shift):
    """Window attention by FlexAttention, on the same copies, its heads padded to what it takes; to be compiled."""
    windows, whole = _copied_windows(qk, v, num_heads, window_size, shift)
    size = windows.shape[-1]
    windows = F.pad(windows, (0, max(0, FLEX_HEAD - size)))
    rows = table_rows(window_size).to(bias_table.device)

    def with_bias(score, window, head, query, key):
        return score + bias_table[rows[query, key], head]

    return whole(flex_attention(*windows, score_mod=with_bias, scale=size**-0.5)[..., :size])


def implementations(spec: OpSpec, case: Case, device: str, compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Name to a function of the tensor arguments, eager first."""

    def on(backend: str) -> Callable[..., torch.Tensor]:
        return lambda **tensors: spec.run(case, tensors, backend)

    found = {"eager": on("reference")}
    if spec.name == "amplitude_phase_conv":
        found["eager, complex"] = partial(complex_amplitude_phase_conv, **case.options)
    if spec.name == "window_attention":
        found["SDPA"] = lambda **tensors: attention_of_copied_windows(**tensors, **case.options)
    if compiled:
        torch._dynamo.reset()
        found["compile"] = torch.compile(on("reference"), fullgraph=True, dynamic=False)
        if spec.name == "predicted_dynamic_filter":
            plain = partial(shifted_slices, **case.options)
            found["compile, shifted slices"] = torch.compile(plain, fullgraph=True, dynamic=False)
        if spec.name == "window_attention":
            flexible = partial(flexible_attention, **case.options)
            found["compile, FlexAttention"] = torch.compile(flexible, fullgraph=True, dynamic=False)
    for backend in ("cpp", "triton"):
        if not (backend == "triton" and device == "cpu") and not why_not(
            KERNELS[spec.name], backend, device, case.dtype
        ):
            found[backend] = on(backend)
    return found


def step(function: Callable[..., torch.Tensor], tensors, gradient, backward: bool) -> list[torch.Tensor]:
    """One forward, or forward and backward; returns what the caller keeps."""
    results = tree_leaves(function(**tensors))
    if not backward:
        return results
    leaves = [tensor for tensor in tensors.values() if tensor is not None]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, tree_leaves(gradient))]


def check(
    spec: OpSpec, case: Case, functions: Mapping[str, Callable[..., torch.Tensor]], device: str
) -> Iterator[tuple[str, str | None]]:
    """Why each implementation gets no speed, or None: result or gradients outside the tolerance rule, or none at all.

    What is called "eager" is what the others are held to.
    """
    if not any(name.startswith("compile") for name in functions):  # which would compile for another size
        sides = {side: min(case.sizes[side], CHECKED_SIDE) for side in ("height", "width")}
        case = replace(case, sizes=case.sizes | sides)
    case = replace(case, tf32=precision(spec, case, device) == "TF32")
    tensors = {name: t if t is None else t.requires_grad_() for name, t in spec.inputs(case, device).items()}
    gradient = spec.gradient(case, spec.uninitialized(case, device))
    expected: dict[str, tuple[Mapping[str, torch.Tensor], ...]] = {}
    for name, function in functions.items():
        if name == "eager":
            yield name, None
            continue
        backend = name if name in BACKENDS and spec.as_seen else "reference"  # what the truth depends on
        if backend not in expected:
            expected[backend] = expectations(spec, case, tensors, gradient, backend)
        truth, absolute, eager = expected[backend]
        try:
            results = step(function, tensors, gradient, backward=True)
        except Exception as error:  # of a compiler, whatever its kind
            yield name, f"does not run: {_reason(error)}"
            continue
        fits = all(
            relative_error(result, truth[of])
            <= allowed_error(case.dtype, relative_error(eager[of], truth[of]), truth[of], absolute[of], tf32=case.tf32)
            for of, result in zip(truth, results, strict=True)
        )
        yield name, None if fits else "fails its check"


def _reason(error: BaseException) -> str:
    """What was raised first: compilers wrap what they find."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def benchmark(spec: OpSpec, case: Case, device: str, seconds: float, compiled: bool) -> list[Result]:
    """All implementations of one case, forward and forward + backward; shares of limits are left to the caller."""
    copies = copied(spec.inputs(case, device))
    with torch.no_grad():
        gradient = spec.gradient(case, spec.run(case, copies[0], "reference"))
    functions = implementations(spec, case, device, compiled)
    problems = dict(check(spec, case, functions, device))
    rows = []
    for backward in (False, True):
        calls = {
            name: lambda turn, f=function, b=backward: step(f, copies[turn % len(copies)], gradient, b)
            for name, function in functions.items()
            if problems[name] is None
        }
        with torch.set_grad_enabled(backward):
            timings = take_turns(calls, device, seconds=seconds)
        moved = sum(spec.bytes_at_least(case)) if backward else spec.bytes_at_least(case)[0]
        flops = sum(spec.flops(case)) if backward else spec.flops(case)[0]
        for name in functions:
            timing: Timing | None = timings.get(name)
            rows.append(
                Result(
                    kind="operator",
                    name=spec.name,
                    work="forward + backward" if backward else "forward",
                    case=_shape(case),
                    dtype=str(case.dtype).removeprefix("torch."),
                    layout=case.layout,
                    precision=precision(spec, case, device),
                    implementation=name,
                    problem=problems[name],
                    **times_of(timing),
                    speedup=timing and timings["eager"].median / timing.median,
                    gigabytes_per_second=timing and moved / timing.median / 1e9,
                    bandwidth_share=None,
                    gigaflops=timing and flops / timing.median / 1e9,
                    matrix_rate_share=None,
                    memory_mb=_measured_memory(spec, case, name, device) if backward and timing else None,
                    **environment(device),
                )
            )
    return rows


def copied(tensors: Mapping[str, torch.Tensor | None]) -> list[dict[str, torch.Tensor | None]]:
    """Copies of an operator's inputs, so many that they are more than :data:`ROTATED` where that is possible."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor is not None)
    least, most = COPIES
    return [
        {name: t if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
        for _ in range(min(most, max(least, -(-ROTATED // size))))
    ]


def _shape(case: Case) -> str:
    """The case's map as [B, C, H, W], then its other sizes and what it is asked to do by name."""
    sizes = dict(case.sizes)
    shape = [sizes.pop(name) for name in ("batch", "channels", "height", "width")]
    return " ".join([str(shape), *(f"{name}={value}" for name, value in (sizes | case.options).items())])


def precision(spec: OpSpec, case: Case, device: str) -> str:
    """How the operator multiplies float32: window attention as matrix products do, the others as convolutions."""
    if case.dtype != torch.float32 or not spec.multiplies:
        return "IEEE"
    return float32_precision(device, matrix_products=spec.family == "window_attention")


def _measured_memory(spec: OpSpec, case: Case, name: str, device: str) -> float | None:
    """Megabytes above inputs and results; None for compiled baselines, whose compiler dominates."""
    if name.startswith("compile"):
        return None
    return (
        memory(spec.name, case, name, device)
        if device == "cuda"
        else in_new_process(memory, spec.name, case, name, device)
    )


def memory(operator: str, case: Case, name: str, device: str) -> float:
    """Megabytes above inputs and results at the peak of one forward and backward."""
    spec = next(spec for spec in SPECS if spec.name == operator)
    small = replace(case, sizes=case.sizes | {"height": 16, "width": 16})

    def prepare(of: Case):
        tensors = {n: t if t is None else t.requires_grad_() for n, t in spec.inputs(of, device).items()}
        with torch.no_grad():
            gradient = spec.gradient(of, spec.uninitialized(of, device))
        function = implementations(spec, of, device, False)[name]
        return lambda: step(function, tensors, gradient, backward=True)

    prepare(small)()  # thread pools and libraries
    call = prepare(case)
    results = []
    peak = peak_memory(lambda: results.extend(call()), device)
    kept = sum(result.numel() * result.element_size() for result in results)
    return max(0.0, (peak - kept) / 1e6)


def show(rows: list[Result], console: Console) -> None:
    """Print one table per case."""
    cases = dict.fromkeys((row.name, row.case, row.dtype, row.precision, row.layout) for row in rows)
    with_shares = any(row.bandwidth_share is not None for row in rows)
    for name, case, dtype, precision, layout in cases:
        title = f"{name}, {case}, {dtype} ({precision}), {layout}"
        rates = ("GB/s", "of copy", "GFLOP/s", "of matrix") if with_shares else ("GB/s", "GFLOP/s")
        table = Table("", "direction", "ms", "p20–p80", "× eager", *rates, "extra MB", title=title)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            if (row.name, row.case, row.dtype, row.precision, row.layout) != (name, case, dtype, precision, layout):
                continue
            direction = row.work.replace("backward", "back")
            if row.median_ms is None:
                table.add_row(row.implementation, direction, f"[red]{row.problem}[/]")
                continue
            table.add_row(
                row.implementation,
                direction,
                f"{row.median_ms:.2f}",
                f"{row.p20_ms:.2f}–{row.p80_ms:.2f}",
                f"{row.speedup:.2f}",
                f"{row.gigabytes_per_second:.1f}",
                *([_percent(row.bandwidth_share)] if with_shares else []),
                f"{row.gigaflops:.0f}",
                *([_percent(row.matrix_rate_share)] if with_shares else []),
                "" if row.memory_mb is None else f"{row.memory_mb:.1f}",
            )
        console.print(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one kernel family; all by default")
    parser.add_argument("--operator", choices=[spec.name for spec in SPECS], help="one operator; all by default")
    parser.add_argument("--cases", type=int, default=None, help="only the first so many cases of each operator")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--batch", type=int, help="batch size; the cases' own by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per implementation and direction")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain forms as baselines too")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    console = Console()
    rows: list[Result] = []
    for spec in SPECS:
        if options.family not in (None, spec.family) or options.operator not in (None, spec.name):
            continue
        for case in spec.benchmark_cases[: options.cases]:
            case = replace(case, dtype=getattr(torch, options.dtype), layout=options.layout)
            if options.batch:
                case = replace(case, sizes=case.sizes | {"batch": options.batch})
            with console.status(f"{spec.name} {case}"):
                rows += benchmark(spec, case, options.device, options.seconds, options.compile)
    show(rows, console)
    if options.output:
        write_results(rows, options.output)
        console.print(f"written: {options.output}.csv, {options.output}.json")


if __name__ == "__main__":
    main()
