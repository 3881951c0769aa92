"""The Triton kernels of the amplitude / phase convolution against the truth, and their arithmetic."""

import statistics

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mitnet_fast.triton_kernels import amplitude_phase as launchers
from mitnet_fast.triton_kernels._common import MAX_PIXELS, record_launches

from mitnet_fast import reference
from mitnet_fast.specs import AMPLITUDE_PHASE_CONV, Case, compare
from mitnet_fast.verify import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("amplitude", "phase")


def case(batch, channels, height, width, hidden, out, mode, layout="contiguous", slope=0.2, *, skip=0, bias=0):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "hidden": hidden, "out": out}
    return Case(sizes | {"skip": skip, "bias": bias}, {"mode": mode, "negative_slope": slope}, torch.float32, layout)


# together: every layout, one bin, several tiles of either kind, hidden and output blocks, odd and even
# sides, heights at which the library leaves noise in real bins, several samples per partial sum (batch 9),
# every form of output_weight
CASES = [
    case(1, 1, 1, 1, 1, 0, "amplitude"),
    case(1, 1, 1, 1, 1, 2, "amplitude", skip=1, bias=1),
    case(1, 2, 1, 2, 3, 2, "phase"),
    case(2, 3, 4, 1, 2, 0, "phase", "channels_last"),
    case(2, 3, 5, 7, 4, 5, "amplitude", "strided", bias=1),
    case(2, 5, 6, 9, 7, 5, "phase", "channels_last", skip=1),
    case(1, 20, 12, 14, 20, 22, "amplitude", "channels_last", 0.0),
    case(1, 20, 12, 14, 20, 22, "amplitude", skip=1, bias=1),
    case(1, 20, 7, 16, 20, 20, "phase"),
    case(1, 20, 7, 16, 20, 20, "phase", skip=1, bias=1),
    case(1, 2, 36, 10, 3, 0, "phase", "expanded"),
    case(1, 2, 36, 10, 3, 3, "phase", "expanded", skip=1, bias=1),
    case(9, 2, 3, 2, 3, 4, "phase", skip=1, bias=1),
    case(9, 2, 2, 5, 3, 0, "amplitude"),
    case(0, 3, 4, 4, 3, 3, "phase", skip=1, bias=1),
]


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_result_and_gradients_equal_the_truth(chosen):
    with poisoned_memory():
        results = compare(AMPLITUDE_PHASE_CONV, chosen, "triton", DEVICE)
    assert len(results) == 1 + sum(shape is not None for shape in AMPLITUDE_PHASE_CONV.shapes(chosen).values())
    assert all(result.passed for result in results), results


@pytest.mark.exhaustive
def test_random_cases_equal_the_truth():
    ratios = []
    with poisoned_memory():
        for seed in range(1000 if DEVICE == "cuda" else 60):
            chosen = AMPLITUDE_PHASE_CONV.random_case(seed, [torch.float32])
            results = compare(AMPLITUDE_PHASE_CONV, chosen, "triton", DEVICE)
            assert all(result.passed for result in results), f"{chosen}: {results}"
            ratios += [result.ratio for result in results if result.eager_error]
    assert statistics.median(ratios) <= 1.5


def arguments(chosen):
    """Incoming gradient, then the arguments of the forward."""
    tensors = AMPLITUDE_PHASE_CONV.inputs(chosen, DEVICE)
    like = torch.empty(AMPLITUDE_PHASE_CONV.output_shape(chosen), device=DEVICE)
    options = chosen.options["mode"] == "phase", chosen.options["negative_slope"], False
    return AMPLITUDE_PHASE_CONV.gradient(chosen, like), *tensors.values(), *options


@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_wanted_gradients_are_computed(mode):
    backward = launchers.amplitude_phase_conv_backward
    call = arguments(case(2, 2, 3, 4, 3, 2, mode, skip=1, bias=1))
    everything = backward(*call, *[True] * 7)
    one_each = [tuple(place == i for i in range(7)) for place in range(8)]  # the last is none at all
    for wanted in one_each:
        for gradient, expected, needed in zip(backward(*call, *wanted), everything, wanted, strict=True):
            assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 4), (4, 5), (3, 1)])
def test_self_conjugate_columns_are_hermitian_to_the_last_bit(monkeypatch, mode, skip, height, width):
    """What the inverse transforms are given: their result is then the same on every library."""
    given = []
    inverse = launchers._inverse
    monkeypatch.setattr(
        launchers, "_inverse", lambda spectrum, x: given.append(spectrum.clone()) or inverse(spectrum, x)
    )
    grad, *call = arguments(case(1, 3, height, width, 4, 3, mode, skip=skip, bias=skip))
    launchers.amplitude_phase_conv_forward(*call)
    launchers.amplitude_phase_conv_backward(grad, *call, True, *[False] * 6)
    assert len(given) == 2
    for spectrum in map(torch.view_as_complex, given):
        edges = spectrum[..., :: width // 2] if width % 2 == 0 else spectrum[..., :1]
        assert torch.equal(edges, edges.flip(-2).roll(1, -2).conj())
        assert edges.abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e-10, 1e10, 1e18, 1e30])
def test_amplitudes_of_every_size(mode, size):
    """Squares of these leave float32's range; where they matter, the weights keep results in it."""
    chosen = case(1, 3, 4, 6, 3, 0, mode)
    grad, x, *weights, output_weight, output_bias, phase, slope, tf32 = arguments(chosen)
    x = x * size
    if mode == "amplitude":
        weights[0] = weights[0] / size
    double = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    options = {"mode": mode, "negative_slope": slope, "output_weight": None, "output_bias": None}
    truth = reference.amplitude_phase_conv(*double, **options)
    gradients = torch.autograd.grad(truth, double, grad.double())
    call = x, *weights, output_weight, output_bias, phase, slope, tf32
    y = launchers.amplitude_phase_conv_forward(*call)
    actual = launchers.amplitude_phase_conv_backward(grad, *call, *[True] * 5, False, False)
    for value, expected in zip((y, *actual[:5]), (truth, *gradients), strict=True):
        assert torch.isfinite(value).all()
        assert (value.double() - expected).norm() <= 2e-5 * expected.norm()


def test_nothing_reaches_an_image_of_zeros_but_its_bins_count():
    grad, x, *rest = arguments(case(1, 2, 4, 4, 3, 0, "amplitude"))
    gradients = launchers.amplitude_phase_conv_backward(grad, torch.zeros_like(x), *rest, *[True] * 5, False, False)
    assert torch.equal(gradients[0], torch.zeros_like(x))
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
    weight1, bias1, weight2 = (tensor.double() for tensor in rest[:3])
    # every bin has u = 1, so that ∂b2 is Σ over bins of Re(∂Y): the gradient of y's first pixel
    torch.testing.assert_close(gradients[4], grad[0, :, 0, 0])
    hidden = torch.where(bias1 > 0, 1.0, 0.2)
    torch.testing.assert_close(gradients[2].double(), hidden * (weight2.T @ grad[0, :, 0, 0].double()))
    assert weight1.shape == gradients[1].shape


@triton.jit
def _trigonometry_kernel(y_ptr, x_ptr, angle_ptr, cosine_ptr, sine_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = tl.load(y_ptr + i), tl.load(x_ptr + i)
    tl.store(angle_ptr + i, launchers._arctangent2(y, x))
    cosine, sine = launchers._cosine_and_sine(y)
    tl.store(cosine_ptr + i, cosine)
    tl.store(sine_ptr + i, sine)


def trigonometry(y, x):
    results = [torch.full_like(y, float("nan")) for _ in range(3)]
    _trigonometry_kernel[(len(y) // 1024,)](y, x, *results, BLOCK=1024)
    return results


def in_ulps(actual, expected):
    expected = expected.numpy()
    return np.abs(actual.double().numpy() - expected) / np.spacing(np.abs(expected).astype(np.float32)).astype(float)


def test_arctangent():
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(65536, generator=generator) * 2 - 1) * torch.pi
    angles[:4096] = torch.linspace(-1e-3, 1e-3, 4096)
    sizes = 10 ** (torch.rand(65536, generator=generator) * 60 - 30)
    y, x = (sizes * angles.sin()).float(), (sizes * angles.cos()).float()
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38])
    pairs = torch.cartesian_prod(special, special[2:])
    y[-len(pairs) :], x[-len(pairs) :] = pairs.T
    angle, _, _ = trigonometry(y.to(DEVICE), x.to(DEVICE))
    expected = torch.atan2(y.double(), x.double())
    normal = expected.abs() > 1e-37
    assert in_ulps(angle.cpu()[normal], expected[normal]).max() < 2
    assert torch.equal(angle.cpu().signbit(), expected.signbit())
    assert (angle.cpu()[~normal].abs() < 1e-36).all()


@pytest.mark.parametrize("largest", [0.8, 3.2, 100.0, 1e5, 1e7])
def test_cosine_and_sine(largest):
    angles = torch.linspace(-largest, largest, 65536)
    angles[0] = -0.0
    _, cosine, sine = trigonometry(angles.to(DEVICE), torch.ones_like(angles).to(DEVICE))
    for actual, expected in ((cosine, angles.double().cos()), (sine, angles.double().sin())):
        assert (actual.cpu().double() - expected).abs().max() < 9e-8
    assert (cosine.square() + sine.square() - 1).abs().max() < 5e-7


def test_phases_of_any_size_stay_on_the_circle():
    angles = torch.logspace(0, 38, 1024)
    _, cosine, sine = trigonometry(angles.to(DEVICE), torch.ones_like(angles).to(DEVICE))
    assert (cosine.square() + sine.square() - 1).abs().max() < 5e-7


@triton.jit
def _offsets_kernel(n, out_ptr, height, width, CHANNELS: tl.constexpr):
    row = tl.arange(0, 4)
    offsets = launchers._offsets(tl.full((), 1, tl.int64) * n, row, height - 4 + row, row, height, width, CHANNELS)
    flat = tl.reshape(offsets, (32,))
    tl.store(out_ptr + tl.arange(0, 32), flat)


def test_offsets_have_64_bits():
    out = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    _offsets_kernel[(1,)](700, out, 4096, 6144, CHANNELS=20)
    expected = [
        (((700 * 20 + c) * 4096 + 4092 + i) * 3073 + i) * 2 + part
        for c in range(4)
        for i in range(4)
        for part in (0, 1)
    ]
    assert out.tolist() == expected
    assert expected[0] > 2**31


def test_more_channels_than_a_program_holds_are_refused():
    weights = torch.empty(1, 257, device="meta"), torch.empty(1, device="meta")
    weights += torch.empty(257, 1, device="meta"), torch.empty(257, device="meta")
    arguments = torch.empty(1, 257, 1, 1, device="meta"), *weights, None, None, False, 0.2, False
    with pytest.raises(ValueError, match="x: the Triton kernels take at most 256 channels, got 257"):
        launchers.amplitude_phase_conv_forward(*arguments)
    with pytest.raises(ValueError, match="x: the Triton kernels take at most 256 channels, got 257"):
        launchers.amplitude_phase_conv_backward(arguments[0], *arguments, *[True] * 5, False, False)


def test_more_pixels_than_the_kernels_can_count_are_refused():
    x = torch.empty(1, 1, 2, MAX_PIXELS // 2 + 1, device="meta")
    weights = torch.empty(1, 1, device="meta"), torch.empty(1, device="meta")
    arguments = x, *weights, *weights, None, None, True, 0.2, False
    message = rf"x: .* at most {MAX_PIXELS} pixels per image, got 2×{x.shape[3]}"
    with pytest.raises(ValueError, match=message):
        launchers.amplitude_phase_conv_forward(*arguments)
    with pytest.raises(ValueError, match=message):
        launchers.amplitude_phase_conv_backward(x, *arguments, *[True] * 5, False, False)


@pytest.mark.parametrize(("tf32", "expected"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_used_where_it_is_allowed(tf32, expected):
    x, weight, bias = (torch.empty(*shape, device="meta") for shape in ((1, 20, 64, 64), (20, 20), (20,)))
    arguments = x, weight, bias, weight, bias, weight, bias, True, 0.2, tf32
    with record_launches("default") as launches:
        launchers.amplitude_phase_conv_forward(*arguments)
        launchers.amplitude_phase_conv_backward(x, *arguments, *[True] * 7)
    assert [launch.constants["PRECISION"] for launch in launches] == [expected] * 4
