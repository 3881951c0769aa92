"""Amplitude / phase convolution in C++ on the CPU: tiles, threads, alignment, instruction sets, memory, extremes.

What holds for the compiled kernels of every operator is in test_kernels.py, on smaller maps.
"""

import math
from dataclasses import replace

import pytest
import torch

from mitnet_fast import _C, reference
from mitnet_fast.specs import AMPLITUDE_PHASE_CONV as SPEC
from mitnet_fast.specs import Case, allowed_error, compare, expectations, outputs_and_gradients, relative_error
from mitnet_fast.verify import poisoned_memory
from tests.ops.instruction_sets import assert_nothing_fails, every_narrower_set
from tests.ops.memory import highest_held
from tests.ops.test_dynamic_filter_cpp import same_bits


def case_of(batch, channels, height, width, hidden, out, mode, slope=0.2, *, skip=0, bias=0):
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "hidden": hidden, "out": out}
    return Case(sizes | {"skip": skip, "bias": bias}, {"mode": mode, "negative_slope": slope})


# Several tiles, whole and cut off; widths and heights that are even, odd, prime, and where FFT libraries leave
# noise in real bins; every relation between the channel counts; slopes of any sign; every form of output_weight.
CASES = [
    case_of(2, 20, 70, 48, 20, 20, "phase", skip=1, bias=1),
    case_of(1, 20, 96, 80, 20, 20, "amplitude"),
    case_of(2, 3, 37, 65, 5, 7, "phase", 0.0, bias=1),
    case_of(2, 5, 36, 24, 3, 0, "amplitude", -0.3),
    case_of(1, 33, 24, 20, 34, 2, "phase", skip=1),
    case_of(1, 60, 24, 20, 9, 150, "amplitude", skip=1, bias=1),
    case_of(1, 160, 17, 19, 160, 0, "phase", 0.01),
    case_of(3, 1, 200, 31, 2, 1, "amplitude", skip=1, bias=1),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def failures(case):
    return [f"{case}: {result}" for result in compare(SPEC, case, "cpp") if not result.passed]


@every_case
def test_tiles_fit_together(case):
    with poisoned_memory():
        assert not failures(case)
        assert not failures(replace(case, dtype=torch.float64, layout="channels_last"))


def call(case, tensors=None, gradient=None, needs=(True,) * 7):
    """Result and gradients of the launchers themselves; a gradient that is not needed is None."""
    tensors = list((tensors or SPEC.inputs(case)).values())
    if gradient is None:
        gradient = SPEC.gradient(case, torch.empty(SPEC.output_shape(case), dtype=case.dtype))
    options = (case.options["mode"] == "phase", case.options["negative_slope"], False)
    needs = [needed and tensor is not None for needed, tensor in zip(needs, tensors, strict=True)]
    return (
        _C.amplitude_phase_conv_forward(*tensors, *options),
        *_C.amplitude_phase_conv_backward(gradient, *tensors, *options, *needs),
    )


@every_case
def test_bits_depend_neither_on_threads_nor_on_layouts_nor_on_what_else_is_asked(case):
    before = torch.get_num_threads()
    expected = call(case)
    assert same_bits(call(case), expected)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(call(case), expected), threads
    finally:
        torch.set_num_threads(before)
    for layout in ("channels_last", "strided"):
        assert same_bits(call(replace(case, layout=layout)), expected), layout
    with poisoned_memory():
        for wanted in range(7):
            needs = [position == wanted for position in range(7)]
            alone = [expected[0], *(e if n else None for e, n in zip(expected[1:], needs, strict=True))]
            assert same_bits(call(case, needs=needs), alone), wanted


@every_case
def test_bits_do_not_depend_on_where_the_inputs_lie(case):
    tensors = SPEC.inputs(case)
    gradient = SPEC.gradient(case, torch.empty(SPEC.output_shape(case)))
    expected = call(case, tensors, gradient)
    for offset in (1, 4, 8, 15):

        def moved(tensor, offset=offset):
            memory = torch.empty(tensor.numel() + offset)
            return memory[offset:].view(tensor.shape).copy_(tensor)

        elsewhere = {name: None if t is None else moved(t) for name, t in tensors.items()}
        assert same_bits(call(case, elsewhere, moved(gradient)), expected), offset


@every_case
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(case):
    tensors = SPEC.inputs(case)
    together = call(case, tensors)[0]
    gradient = SPEC.gradient(case, torch.empty(SPEC.output_shape(case)))
    grad_x = call(case, tensors, gradient)[1]
    for n in range(case.sizes["batch"]):
        y, grad, *_ = call(case, tensors | {"x": tensors["x"][n : n + 1]}, gradient[n : n + 1])
        assert torch.equal(y[0], together[n])
        assert torch.equal(grad[0], grad_x[n])


def real_bins(spectrum, height, width):
    rows = [0, height // 2] if height % 2 == 0 else [0]
    columns = [0, width // 2] if width % 2 == 0 else [0]
    return spectrum[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (5, 7), (24, 20), (36, 36), (96, 80), (48, 31)])
def test_the_spectrum_is_that_of_rfft2_and_real_where_an_image_is(size, dtype):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    spectrum = _C.amplitude_phase_conv_spectrum(x)
    truth = torch.view_as_real(torch.fft.rfft2(x.double()))
    assert relative_error(spectrum, truth) <= 4 * torch.finfo(dtype).eps
    at_real_bins = real_bins(spectrum, *size)[..., 1]
    assert not at_real_bins.any()
    assert not torch.signbit(at_real_bins).any()


def test_phases_that_flip_against_float64_are_few_and_none_at_real_bins(record_property):
    """End to end: where float32 and float64 transforms disagree on the side of the branch cut."""
    flips = bins = 0
    for seed, (height, width) in enumerate([(24, 20), (36, 36), (96, 80), (128, 128), (61, 47)]):
        x = torch.randn(2, 20, height, width, generator=torch.Generator().manual_seed(seed))
        seen = _C.amplitude_phase_conv_spectrum(x).double()
        phase = torch.atan2(seen[..., 1], seen[..., 0])[..., None]
        _, exact = reference.amplitude_and_phase(x.double())
        flipped = (phase - exact[..., None]).abs() > math.pi
        assert not real_bins(flipped, height, width).any()
        flips, bins = flips + int(flipped.sum()), bins + flipped.numel()
    record_property("flips", f"{flips} of {bins} bins")
    assert flips <= 1e-5 * bins


def single_pixel(x):
    image = torch.zeros_like(x)
    image[..., x.shape[-2] // 2, x.shape[-1] // 3] = 1.5
    return image


IMAGES = {
    "zeros": torch.zeros_like,
    "1e-40": lambda x: x * 1e-40,
    "1e-20": lambda x: x * 1e-20,
    "1e20": lambda x: x * 1e20,
    "constant": lambda x: torch.full_like(x, 0.7),
    "single pixel": single_pixel,
    "every second pixel": lambda x: x * (torch.arange(x.shape[-1]) % 2),
    "one channel black": lambda x: x * (torch.arange(x.shape[1]) > 0)[:, None, None],
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("form", [{}, {"skip": 1, "bias": 1}], ids=str)
@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize("size", [(12, 8), (5, 7)])
def test_extreme_spectra_have_finite_and_right_results(size, mode, form, image):
    case = case_of(2, 4, *size, 6, 3, mode, **form)
    tensors = SPEC.inputs(case)
    tensors["x"] = IMAGES[image](tensors["x"])
    gradient = SPEC.gradient(case, torch.empty(SPEC.output_shape(case)))
    actual = outputs_and_gradients(SPEC, case, tensors, gradient, "cpp")
    truth, absolute, eager = expectations(SPEC, case, tensors, gradient, "cpp")
    for name, value in actual.items():
        assert torch.isfinite(value).all()
        error = relative_error(value, truth[name])
        eager_error = relative_error(eager[name], truth[name])
        assert error <= allowed_error(torch.float32, eager_error, truth[name], absolute[name]), name


ELSEWHERE = """
import torch
from mitnet_fast import _C
from mitnet_fast.verify import poisoned_memory
from tests.ops.test_amplitude_phase_cpp import CASES, failures, replace
torch.set_num_threads(1)
print(_C.cpu_capability())
with poisoned_memory():
    for case in CASES:
        for dtype in (torch.float32, torch.float64):
            print(*failures(replace(case, dtype=dtype)), sep="\\n", end="")
"""


@every_narrower_set
def test_every_instruction_set_computes_the_same(wanted, narrower):
    assert_nothing_fails(ELSEWHERE, wanted, narrower)


@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (4, 4), (5, 3)])
def test_gradients_are_those_of_finite_differences(size, mode):
    case = replace(case_of(2, 2, *size, 3, 2, mode, skip=1, bias=1), dtype=torch.float64, seed=1)
    inputs = SPEC.inputs(case)
    assert torch.autograd.gradcheck(
        lambda *t: SPEC.run(case, dict(zip(inputs, t, strict=True)), "cpp"),
        [tensor.requires_grad_() for tensor in inputs.values()],
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_x_has_its_layout(layout):
    case = replace(case_of(2, 3, 5, 6, 4, 2, "phase"), layout=layout)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    y, grad_x, *_ = call(case)
    assert y.is_contiguous(memory_format=formats[layout])
    assert grad_x.is_contiguous(memory_format=formats[layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize(("channels", "side"), [(20, 256), (80, 64)])
def test_memory_is_a_third_of_eager(channels, side, mode, layout):
    """Peak above inputs and results, forward and backward."""
    case = replace(case_of(2, channels, side, side, channels, channels, mode, skip=1, bias=1), layout=layout)
    leaves = {name: tensor.requires_grad_() for name, tensor in SPEC.inputs(case).items()}
    gradient = SPEC.gradient(case, leaves["x"])
    results = 4 * (gradient.numel() + sum(leaf.numel() for leaf in leaves.values()))

    def call(backend):
        kept = torch.autograd.grad(SPEC.run(case, leaves, backend), list(leaves.values()), gradient)
        assert len(kept) == 7
        return kept

    def peak(backend):
        return highest_held(lambda: call(backend)) - results

    assert 0 < peak("cpp") <= peak("reference") / 3


MAP = torch.zeros(1, 2, 4, 5)
NO_OUTPUT = {"output_weight": None, "output_bias": None}
BAD = [
    ({"x": torch.zeros(2, 4, 5)}, ValueError, r"x: expected a dense tensor \[B, C, H, W\], got shape \[2, 4, 5\]"),
    ({"x": torch.zeros(1, 0, 4, 5)}, ValueError, "x: needs at least one channel and one pixel"),
    ({"x": MAP.bfloat16()}, TypeError, "x: dtype BFloat16 is not supported, allowed: float32, float64"),
    ({"x": MAP.to("meta")}, ValueError, "weight1: expected device meta as x has, got cpu"),
    ({"weight1": torch.zeros(3)}, ValueError, r"weight1: expected shape \[Ch, C\], got \[3\]"),
    ({"weight1": torch.zeros(3, 3)}, ValueError, r"weight1: expected shape \[3, 2\], got \[3, 3\]"),
    ({"bias1": torch.zeros(2)}, ValueError, r"bias1: expected shape \[3\], got \[2\]"),
    ({"weight2": torch.zeros(3, 2)}, ValueError, r"weight2: expected shape \[2, 3\], got \[3, 2\]"),
    ({"bias2": torch.zeros(2).double()}, TypeError, "bias2: expected dtype Float as x has, got Double"),
    ({"output_weight": torch.zeros(4, 3)}, ValueError, r"output_weight: .* or \[Co, 2C\] with C = 2, got \[4, 3\]"),
    ({"output_weight": torch.zeros(4)}, ValueError, r"output_weight: .* or \[Co, 2C\] with C = 2, got \[4\]"),
    ({"output_weight": None}, ValueError, "output_bias: taken only with output_weight"),
    (NO_OUTPUT, ValueError, "grad: expected shape .*1, 2, 4, 5.*, got .*1, 4, 4, 5"),
    (NO_OUTPUT | {"grad": MAP}, ValueError, "needs_output_weight: there is no output_weight"),
    ({"output_bias": torch.zeros(2)}, ValueError, r"output_bias: expected shape \[4\], got \[2\]"),
    ({"output_bias": None}, ValueError, "needs_output_bias: there is no output_bias"),
    ({"grad": torch.zeros(1, 4, 5, 5)}, ValueError, r"grad: expected shape \[1, 4, 4, 5\], got \[1, 4, 5, 5\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_of_the_launchers_are_errors(change, error, message):
    good = {
        "x": MAP,
        "weight1": torch.zeros(3, 2),
        "bias1": torch.zeros(3),
        "weight2": torch.zeros(2, 3),
        "bias2": torch.zeros(2),
        "output_weight": torch.zeros(4, 2),
        "output_bias": torch.zeros(4),
        "phase": True,
        "negative_slope": 0.2,
        "tf32": False,
    }
    needs = {f"needs_{name}": True for name, value in good.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        _C.amplitude_phase_conv_backward(**{"grad": torch.zeros(1, 4, 4, 5)} | good | needs | change)
    if not message.startswith(("grad", "needs")):
        with pytest.raises(error, match=message):
            _C.amplitude_phase_conv_forward(**good | change)
