"""The CUDA kernels of the amplitude / phase convolution, run on the CPU, against float64 from the same spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mitnet_fast import reference
from mitnet_fast.reference.amplitude_phase import amplitude_phase_conv_of_spectrum
from mitnet_fast.specs import allowed_error, relative_error
from tests.cuda_on_host import HostKernels, Order
from tests.cuda_on_host.harness import CSRC

UNITS = (Path(__file__).parent / "amplitude_phase.cpp", CSRC / "amplitude_phase" / "amplitude_phase_cuda.cu")
NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "output_weight")
TF32_EPS = 2.0**-10
ORDERS = [pytest.param(order, id=order.name.lower()) for order in Order]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def kernels(request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    with HostKernels(*UNITS, sanitize=request.param) as compiled:
        yield compiled


@pytest.fixture(scope="module")
def plain() -> Iterator[HostKernels]:
    with HostKernels(*UNITS) as compiled:
        yield compiled


class Call:
    """One call: batch, C, Ch, Co (0: no output_weight), height, width; inputs, and what float64 makes of them."""

    def __init__(self, *sizes: int, phase: bool, tf32: bool = False, slope: float = 0.2, seed: int = 0) -> None:
        self.sizes, self.phase, self.tf32, self.slope = sizes, phase, tf32, slope
        batch, channels, hidden, out, height, width = sizes
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, channels, height, width), (hidden, channels), (hidden,), (channels, hidden), (channels,)]
        shapes += [(out, channels)] if out else []
        self.inputs = [torch.randn(shape, generator=generator) for shape in shapes] + ([] if out else [None])
        self.grad = torch.randn(batch, out or channels, height, width, generator=generator)
        self.seen = reference.half_spectrum(self.inputs[0])

    def formula(self, dtype: torch.dtype, absolute: bool = False) -> dict[str, torch.Tensor]:
        """Result and gradients in plain PyTorch, from the spectrum that the kernels see; or of absolute values."""
        change = (lambda t: t.to(dtype).abs()) if absolute else (lambda t: t.to(dtype, copy=True))
        leaves = [None if t is None else change(t).requires_grad_() for t in self.inputs]
        x, *weights, output_weight = leaves
        own = reference.half_spectrum(x)
        parts = [part.detach().requires_grad_() for part in (own if absolute else change(self.seen)).unbind(-1)]
        mode = "phase" if self.phase else "amplitude"
        y = amplitude_phase_conv_of_spectrum(
            *parts, *weights, size=x.shape[-2:], mode=mode, negative_slope=self.slope, output_weight=output_weight
        )
        wanted = [leaf for leaf in leaves[1:] if leaf is not None]
        grad_parts = torch.autograd.grad(y, [*parts, *wanted], change(self.grad))
        (grad_x,) = torch.autograd.grad(own, x, torch.stack(grad_parts[:2], -1))
        results = dict(zip(NAMES, [grad_x, *grad_parts[2:]], strict=False))
        return {"y": y.detach()} | results

    def run(self, kernels: HostKernels, order: Order = Order.FORWARD, seed: int = 0) -> dict[str, torch.Tensor]:
        """The same by the kernels, transforms around them in float64."""
        batch, channels, hidden, out, height, width = self.sizes
        columns, outputs = width // 2 + 1, out or channels
        sizes = np.array([batch, channels, hidden, outputs, height, width, self.phase, self.tf32], np.int64)
        seen = self.seen.clone()
        rows, edges = (slice(None, None, side // 2) if side % 2 == 0 else slice(1) for side in (height, width))
        seen[:, :, rows, edges, 1] = -1e-3  # noise of a library, which the kernels have to ignore
        weights = [None if t is None else t.numpy() for t in self.inputs[1:]]
        result = np.full((batch, outputs, height, columns, 2), np.nan, np.float32)
        arguments = (sizes, self.slope, *weights)
        kernels("amplitude_phase_forward", *arguments, seen.numpy(), result, order=order, seed=seed)
        gradients = [np.full((batch, channels, height, columns, 2), np.nan, np.float32)]
        gradients += [None if t is None else np.full(t.shape, np.nan, np.float32) for t in weights]
        grad = reference.half_spectrum(self.grad).numpy()
        kernels("amplitude_phase_backward", *arguments, grad, seen.numpy(), *gradients, order=order, seed=seed)
        assert_hermitian(result, width)
        assert_hermitian(gradients[0], width)
        named = dict(zip(NAMES, gradients, strict=True))
        found = {name: torch.from_numpy(value) for name, value in named.items() if value is not None}
        return found | {"y": self.image(result), "x": self.image(gradients[0])}

    def image(self, spectrum: np.ndarray) -> torch.Tensor:
        values = torch.view_as_complex(torch.from_numpy(spectrum).double())
        return torch.fft.irfft2(values, s=self.sizes[-2:], norm="forward")


def assert_hermitian(spectrum: np.ndarray, width: int) -> None:
    edges = spectrum[..., :: width // 2, :] if width % 2 == 0 else spectrum[..., :1, :]
    mirrored = np.roll(np.flip(edges, -3), 1, -3)
    np.testing.assert_array_equal(edges, mirrored * np.array([1, -1], np.float32))


def check(call: Call, actual: dict[str, torch.Tensor]) -> None:
    truth, eager = call.formula(torch.float64), call.formula(torch.float32)
    absolute = call.formula(torch.float64, absolute=True)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        allowed = allowed_error(torch.float32, relative_error(eager[name], expected), expected, absolute[name])
        if call.tf32:
            allowed = max(allowed, 8 * TF32_EPS * float(absolute[name].norm() / expected.norm()))
        assert relative_error(actual[name], expected) <= allowed, name


@pytest.mark.parametrize("phase", [False, True], ids=["amplitude", "phase"])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 0, 1, 1),
        (1, 2, 3, 0, 1, 2),
        (2, 3, 2, 4, 4, 1),
        (2, 3, 9, 0, 5, 7),
        (1, 20, 20, 20, 6, 8),
        (1, 9, 4, 17, 7, 6),
    ],
    ids=str,
)
def test_results_equal_the_truth(kernels: HostKernels, sizes: tuple[int, ...], phase: bool) -> None:
    call = Call(*sizes, phase=phase)
    check(call, call.run(kernels))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("phase", [False, True], ids=["amplitude", "phase"])
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
def test_every_order_of_threads_gives_the_same_bits(plain: HostKernels, tf32: bool, phase: bool, order: Order) -> None:
    call = Call(2, 5, 11, 3, 8, 10, phase=phase, tf32=tf32, slope=0.01)
    first = call.run(plain)
    check(call, first)
    for name, value in call.run(plain, order, seed=5).items():
        assert torch.equal(value, first[name]), name


def test_several_tiles_of_fewer_bins() -> None:
    """Wide maps whose tiles shrink to what shared memory holds."""
    with HostKernels(*UNITS) as plain:
        call = Call(1, 160, 160, 160, 4, 6, phase=True)
        check(call, call.run(plain))


def test_a_negative_slope_below_zero() -> None:
    with HostKernels(*UNITS) as plain:
        call = Call(1, 4, 6, 0, 4, 4, phase=False, slope=-0.5)
        check(call, call.run(plain))
