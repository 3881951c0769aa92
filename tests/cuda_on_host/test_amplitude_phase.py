"""The CUDA kernels of the amplitude / phase convolution, run on the CPU, against float64 from the same spectrum."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mitnet_fast import reference
from mitnet_fast.reference import amplitude_phase as formulas
from mitnet_fast.specs import AMPLITUDE_PHASE_CONV, Case, allowed_error, relative_error
from tests.cuda_on_host import HostKernels, KernelFault, Order
from tests.cuda_on_host.harness import CSRC

UNITS = (
    Path(__file__).parent / "amplitude_phase.cpp",
    CSRC / "amplitude_phase" / "amplitude_phase_cuda.cu",
    CSRC / "amplitude_phase" / "amplitude_phase_images_cuda.cu",
)
NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "output_weight", "output_bias")
ORDERS = [pytest.param(order, id=order.name.lower()) for order in Order]
MODES = pytest.mark.parametrize("phase", [False, True], ids=["amplitude", "phase"])
# output_weight over [X, Y] and a bias
FUSED = {"skip": 1, "bias": 1}


@pytest.fixture(scope="module")
def plain() -> Iterator[HostKernels]:
    with HostKernels(*UNITS) as compiled:
        yield compiled


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def kernels(request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    with HostKernels(*UNITS, sanitize=request.param) as compiled:
        yield compiled


class Tf32Convolution(torch.autograd.Function):
    """1×1 convolution whose products, in both directions, round their factors to TF32."""

    @staticmethod
    def forward(ctx, values, weight, bias):
        ctx.save_for_backward(values, weight)
        return F.conv2d(rounded(values), rounded(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        values, weight = map(rounded, ctx.saved_tensors)
        grad_weight = torch.einsum("bohw,bchw->oc", rounded(grad), values)[:, :, None, None]
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return F.conv_transpose2d(rounded(grad), weight), grad_weight, grad_bias


def rounded(values: torch.Tensor) -> torch.Tensor:
    return ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class Tf32:
    """``torch.nn.functional`` with such convolutions."""

    leaky_relu = staticmethod(F.leaky_relu)

    @staticmethod
    def conv2d(values, weight, bias=None):
        return Tf32Convolution.apply(values, weight, bias)


class Call:
    """One call: batch, C, Ch, Co (0: no output_weight), height, width; inputs, and what float64 makes of them."""

    def __init__(
        self,
        *sizes: int,
        phase: bool,
        tf32: bool = False,
        slope: float = 0.2,
        images: bool = False,
        skip: int = 0,
        bias: int = 0,
    ) -> None:
        self.sizes, self.phase, self.tf32, self.slope, self.images = sizes, phase, tf32, slope, images
        self.skip = skip
        batch, channels, hidden, out, height, width = sizes
        generator = torch.Generator().manual_seed(0)
        shapes = [(batch, channels, height, width), (hidden, channels), (hidden,), (channels, hidden), (channels,)]
        shapes += [(out, (1 + skip) * channels) if out else None, (out,) if bias else None]
        self.inputs = [None if shape is None else torch.randn(shape, generator=generator) for shape in shapes]
        self.grad = torch.randn(batch, out or channels, height, width, generator=generator)
        self.seen = reference.half_spectrum(self.inputs[0])

    @property
    def c_sizes(self) -> np.ndarray:
        batch, channels, hidden, out, height, width = self.sizes
        sizes = [batch, channels, hidden, out or channels, height, width, self.phase, self.tf32, self.skip]
        return np.array(sizes, np.int64)

    def formula(self, dtype: torch.dtype, absolute: bool = False) -> dict[str, torch.Tensor]:
        """Result and gradients in plain PyTorch, from the spectrum that the kernels see; or of absolute values."""
        change = (lambda t: t.to(dtype).abs()) if absolute else (lambda t: t.to(dtype, copy=True))
        leaves = [None if t is None else change(t).requires_grad_() for t in self.inputs]
        x, *weights, output_weight, output_bias = leaves
        own = reference.half_spectrum(x)
        parts = [part.detach().requires_grad_() for part in (own if absolute else change(self.seen)).unbind(-1)]
        mode = "phase" if self.phase else "amplitude"
        output = {"output_weight": output_weight, "output_bias": output_bias}
        y = formulas.amplitude_phase_conv_of_spectrum(
            *parts, *weights, size=x.shape[-2:], mode=mode, negative_slope=self.slope, **output
        )
        wanted = {name: leaf for name, leaf in zip(NAMES[1:], leaves[1:], strict=True) if leaf is not None}
        grad_parts = torch.autograd.grad(y, [*parts, *wanted.values()], change(self.grad))
        (grad_x,) = torch.autograd.grad(own, x, torch.stack(grad_parts[:2], -1))
        return {"y": y.detach(), "x": grad_x} | dict(zip(wanted, grad_parts[2:], strict=True))

    def run(self, kernels: HostKernels, order: Order = Order.FORWARD) -> dict[str, torch.Tensor]:
        """The same by the kernels; transforms that are not theirs in float64."""
        batch, channels, _, out, height, width = self.sizes
        weights = [None if t is None else t.numpy() for t in self.inputs[1:]]
        gradients = [None if t is None else np.full(t.shape, np.nan, np.float32) for t in weights]

        def run(x: np.ndarray, grad: np.ndarray, tail: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
            y = np.full((batch, out or channels, height, *tail), np.nan, np.float32)
            grad_x = np.full((batch, channels, height, *tail), np.nan, np.float32)
            arguments = (int(self.images), self.c_sizes, self.slope, *weights)
            kernels("amplitude_phase_forward", *arguments, x, y, order=order, seed=5)
            kernels("amplitude_phase_backward", *arguments, grad, x, grad_x, *gradients, order=order, seed=5)
            return y, grad_x

        if self.images:
            y, grad_x = map(torch.from_numpy, run(self.inputs[0].numpy(), self.grad.numpy(), (width,)))
        else:
            seen = self.seen.clone()
            rows, edges = (slice(None, None, side // 2) if side % 2 == 0 else slice(1) for side in (height, width))
            seen[:, :, rows, edges, 1] = -1e-3  # noise of a library, which the kernels have to ignore
            spectra = run(seen.numpy(), reference.half_spectrum(self.grad).numpy(), (width // 2 + 1, 2))
            for spectrum in spectra:
                assert_hermitian(spectrum, width)
            y, grad_x = map(self.image, spectra)
        named = zip(NAMES[1:], gradients, strict=True)
        found = {name: torch.from_numpy(value) for name, value in named if value is not None}
        return found | {"y": y, "x": grad_x}

    def image(self, spectrum: np.ndarray) -> torch.Tensor:
        values = torch.view_as_complex(torch.from_numpy(spectrum).double())
        return torch.fft.irfft2(values, s=self.sizes[-2:], norm="forward")


def assert_hermitian(spectrum: np.ndarray, width: int) -> None:
    edges = spectrum[..., :: width // 2, :] if width % 2 == 0 else spectrum[..., :1, :]
    mirrored = np.roll(np.flip(edges, -3), 1, -3)
    np.testing.assert_array_equal(edges, mirrored * np.array([1, -1], np.float32))


def check(call: Call, actual: dict[str, torch.Tensor]) -> list[float]:
    """Ratios of the errors to plain PyTorch's, once all are within the rule."""
    truth, absolute = call.formula(torch.float64), call.formula(torch.float64, absolute=True)
    with pytest.MonkeyPatch.context() as patch:
        if call.tf32:
            patch.setattr(formulas, "F", Tf32)
        eager = call.formula(torch.float32)
    assert actual.keys() == truth.keys()
    ratios = []
    for name, expected in truth.items():
        error, plain = relative_error(actual[name], expected), relative_error(eager[name], expected)
        assert error <= allowed_error(torch.float32, plain, expected, absolute[name]), (call.sizes, name)
        ratios += [error / plain] if plain else []
    return ratios


@MODES
@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((1, 1, 1, 0, 1, 1), {}),
        ((1, 1, 1, 2, 1, 1), FUSED),
        ((1, 2, 3, 0, 1, 2), {}),
        ((2, 3, 2, 4, 4, 1), {}),
        ((2, 3, 2, 4, 4, 1), FUSED),
        ((2, 3, 9, 0, 5, 7), {}),
        ((2, 3, 9, 2, 5, 7), {"skip": 1}),
        ((1, 20, 20, 20, 6, 8), {"bias": 1}),
        ((1, 20, 20, 20, 6, 8), FUSED),
        ((1, 9, 4, 17, 7, 6), FUSED),
    ],
    ids=str,
)
def test_results_equal_the_truth(
    kernels: HostKernels, sizes: tuple[int, ...], form: dict[str, int], phase: bool
) -> None:
    call = Call(*sizes, phase=phase, **form)
    check(call, call.run(kernels))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@MODES
@pytest.mark.parametrize("images", [False, True], ids=["spectra", "images"])
def test_every_order_of_threads_gives_the_same_bits(
    plain: HostKernels, images: bool, phase: bool, tf32: bool, order: Order
) -> None:
    call = Call(2, 5, 11, 3, 8, 16 if images else 10, phase=phase, tf32=tf32, slope=0.01, images=images, **FUSED)
    if images:
        call.seen = image_spectrum(plain, call)
    first = call.run(plain)
    check(call, first)
    for name, value in call.run(plain, order).items():
        assert torch.equal(value, first[name]), name


def work(chosen: Case) -> int:
    """About what the emulation of ``chosen`` costs: products at all bins."""
    sizes = chosen.sizes
    bins = sizes["batch"] * sizes["height"] * (sizes["width"] // 2 + 1)
    return bins * sizes["channels"] * (2 * sizes["hidden"] + (1 + sizes["skip"]) * sizes["out"])


def sweep(kernels: HostKernels, cases: int, most_work: int) -> None:
    """Random sizes by spectra, and by transforms of their own where the kernels have them, in random orders."""
    chosen = (AMPLITUDE_PHASE_CONV.random_case(seed, [torch.float32]) for seed in itertools.count())
    ratios, with_transforms = [], 0
    for one in itertools.islice((one for one in chosen if 0 < work(one) <= most_work), cases):
        sizes = [one.sizes[name] for name in ("batch", "channels", "hidden", "out", "height", "width")]
        options = {"phase": one.options["mode"] == "phase", "slope": one.options["negative_slope"]}
        options |= {name: one.sizes[name] for name in FUSED}
        call = Call(*sizes, **options)
        ratios += check(call, call.run(kernels, Order.RANDOM))
        has_images = np.array([-1])
        kernels("has_images", call.c_sizes, has_images)
        if has_images[0]:
            call = Call(*sizes, **options, images=True)
            call.seen = image_spectrum(kernels, call)
            ratios += check(call, call.run(kernels, Order.RANDOM))
            with_transforms += 1
    assert statistics.median(ratios) <= 1.5
    assert with_transforms >= cases // 50


def test_random_cases_equal_the_truth(plain: HostKernels) -> None:
    sweep(plain, 12, 20_000)


@pytest.mark.exhaustive
def test_many_random_cases_equal_the_truth(plain: HostKernels) -> None:
    sweep(plain, 150, 200_000)


def test_many_channels_take_fewer_bins(plain: HostKernels) -> None:
    call = Call(1, 160, 160, 160, 4, 6, phase=True, **FUSED)
    check(call, call.run(plain))


def test_a_slope_below_zero(plain: HostKernels) -> None:
    call = Call(1, 4, 6, 0, 4, 4, phase=False, slope=-0.5)
    check(call, call.run(plain))


@pytest.mark.parametrize("position", [1, 2, 3])
def test_more_channels_than_shared_memory_holds_are_refused(plain: HostKernels, position: int) -> None:
    sizes = [1, 3, 3, 3, 1, 1]
    sizes[position] = 257
    with pytest.raises(KernelFault, match=r"x: CUDA kernels take at most 256 channels, .*, got 257"):
        Call(*sizes, phase=False).run(plain)


@pytest.mark.exhaustive
def test_as_many_channels_as_shared_memory_holds(plain: HostKernels) -> None:
    call = Call(1, 256, 256, 256, 2, 2, phase=True, **FUSED)
    check(call, call.run(plain))


def image_spectrum(kernels: HostKernels, call: Call) -> torch.Tensor:
    """The half spectrum of x that the kernels with transforms of their own see."""
    batch, channels, _, _, height, width = call.sizes
    spectrum = np.full((batch, channels, height, width // 2 + 1, 2), np.nan, np.float32)
    kernels("image_spectrum", call.c_sizes, call.inputs[0].numpy(), spectrum)
    return torch.from_numpy(spectrum)


@pytest.mark.parametrize("sizes", [(2, 3, 8, 8), (1, 2, 16, 8), (1, 2, 8, 32), (1, 1, 64, 16)], ids=str)
def test_own_transforms_are_as_exact_as_a_library(kernels: HostKernels, sizes: tuple[int, ...]) -> None:
    batch, channels, height, width = sizes
    call = Call(batch, channels, 1, 0, height, width, phase=False)
    own = image_spectrum(kernels, call)
    truth = reference.half_spectrum(call.inputs[0].double())
    assert relative_error(own, truth) <= 1.5 * relative_error(call.seen, truth)
    real = own[:, :, :: height // 2, :: width // 2, 1]
    assert torch.equal(real, torch.zeros_like(real))
    assert not real.signbit().any()


@MODES
@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((2, 3, 2, 0, 8, 8), {}),
        ((1, 9, 5, 17, 16, 8), {}),
        ((2, 9, 5, 17, 16, 8), FUSED),
        ((1, 20, 20, 20, 8, 16), FUSED),
        ((1, 2, 3, 4, 32, 16), {"bias": 1}),
        ((1, 2, 3, 4, 32, 16), {"skip": 1}),
        pytest.param((1, 3, 3, 3, 64, 64), FUSED, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_images_equal_the_truth(
    kernels: HostKernels, sizes: tuple[int, ...], form: dict[str, int], phase: bool
) -> None:
    call = Call(*sizes, phase=phase, images=True, **form)
    call.seen = image_spectrum(kernels, call)
    check(call, call.run(kernels))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        *(((8, c, c, c, side, side), True) for c, side in ((20, 256), (40, 128), (80, 64), (160, 32), (160, 16))),
        ((1, 3, 6, 22, 8, 8), True),
        ((1, 3, 33, 3, 8, 8), False),
        ((1, 20, 20, 20, 256, 96), False),
        ((1, 20, 20, 20, 4, 256), False),
        ((1, 20, 20, 20, 256, 2048), False),
        ((1, 40, 40, 40, 256, 256), False),
    ],
    ids=str,
)
def test_images_of_which_a_column_fits_on_chip(plain: HostKernels, sizes: tuple[int, ...], expected: bool) -> None:
    for phase in (0, 1):
        result = np.array([-1])
        plain("has_images", np.array([*sizes, phase, 0, 1], np.int64), result)
        assert result[0] == expected


@pytest.mark.exhaustive
def test_the_level_of_every_size_is_data() -> None:
    only = "{true, true, true, true, true, true, true, true},  // 32\n"
    without = "{true, true, true, false, true, true, true, true},  // 32\n"
    results = {}
    with HostKernels(*UNITS, replace={"amplitude_phase/transforms_preferred.h": [(only, without)]}) as kernels:
        for height, width in ((32, 64), (64, 32), (32, 32)):
            results[height, width] = np.array([-1])
            kernels("has_images", np.array([1, 3, 3, 3, height, width, 0, 0, 0], np.int64), results[height, width])
    assert [result[0] for result in results.values()] == [0, 1, 1]
