"""The reference spectral operators against the definitions, written with numpy's own transforms."""

import numpy as np
import pytest
import torch

from mitnet_fast import ops

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 3), (5, 7), (8, 8), (6, 12), (24, 20), (13, 1)]


def full_spectrum(x):
    """The whole complex spectrum, exactly Hermitian: real bins have an imaginary part of +0."""
    spectrum = np.fft.fft2(x)
    mirrored = np.conj(np.roll(np.flip(spectrum, (-2, -1)), (1, 1), (-2, -1)))
    spectrum = (spectrum + mirrored) / 2
    return np.where(spectrum.imag == 0, spectrum.real + 0j, spectrum)


def defined(x, weight1, bias1, weight2, bias2, mode, slope, output_weight, output_bias):
    """irfft2 as the cosine sum (1/HW)·Re Σ c·Y·e^{iθ}, c = 1 in columns 0 and W/2 and 2 elsewhere.

    A 1×1 convolution of the image, or of [x, image], follows.
    """
    height, width = x.shape[-2:]
    half = full_spectrum(x)[..., : width // 2 + 1]
    amplitude, phase = np.abs(half), np.angle(half)

    def spectral_map(values):
        hidden = np.einsum("oc,bchw->bohw", weight1, values) + bias1[:, None, None]
        hidden = np.where(hidden >= 0, hidden, slope * hidden)
        return np.einsum("oc,bchw->bohw", weight2, hidden) + bias2[:, None, None]

    if mode == "amplitude":
        y = spectral_map(amplitude) * np.exp(1j * phase)
    else:
        y = amplitude * np.exp(1j * spectral_map(phase))
    columns = np.arange(width // 2 + 1)
    counted = np.where((2 * columns) % width == 0, 1, 2)
    along_rows = np.exp(2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
    along_columns = np.exp(2j * np.pi * np.outer(columns, np.arange(width)) / width) * counted[:, None]
    image = np.einsum("bchw,hy,wx->bcyx", y, along_rows, along_columns, optimize=True).real / (height * width)
    if output_weight is not None:
        if output_weight.shape[1] > x.shape[1]:
            image = np.concatenate([x, image], 1)
        image = np.einsum("oc,bchw->bohw", output_weight, image)
    return image if output_bias is None else image + output_bias[:, None, None]


# output_weight over nothing, over Y and over [X, Y], without and with a bias
FORMS = [{}, {"output_weight": (5, 3)}, {"output_weight": (5, 3), "output_bias": (5,)}]
FORMS += [{"output_weight": (5, 6)}, {"output_weight": (5, 6), "output_bias": (5,)}]


def arguments(channels, hidden, size, form, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(2, channels, *size), (hidden, channels), (hidden,), (channels, hidden), (channels,)]
    tensors = [random.standard_normal(shape) for shape in shapes]
    return tensors, {name: random.standard_normal(shape) for name, shape in form.items()}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize("size", SIZES)
def test_convolution_equals_its_definition(size, mode, form):
    tensors, output = arguments(3, 4, size, form)
    expected = defined(*tensors, mode, 0.3, output.get("output_weight"), output.get("output_bias"))
    y = ops.amplitude_phase_conv(
        *map(torch.from_numpy, tensors),
        mode=mode,
        negative_slope=0.3,
        **{name: torch.from_numpy(tensor) for name, tensor in output.items()},
        backend="reference",
    )
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (4, 4), (5, 3)])
def test_gradients_are_those_of_finite_differences(size, mode):
    tensors, output = arguments(2, 3, size, {"output_weight": (2, 4), "output_bias": (2,)}, seed=1)
    inputs = [torch.from_numpy(tensor).requires_grad_() for tensor in (*tensors, *output.values())]

    def run(*values):
        output_weight, output_bias = values[5:]
        return ops.amplitude_phase_conv(
            *values[:5], mode=mode, output_weight=output_weight, output_bias=output_bias, backend="reference"
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("mode", ["amplitude", "phase"])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1e20])
def test_extreme_spectra_stay_finite(scale, mode):
    tensors, _ = arguments(2, 2, (4, 6), {})
    inputs = [torch.from_numpy(tensor).float().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        inputs[0].mul_(scale)
    y = ops.amplitude_phase_conv(*inputs, mode=mode)
    y.sum().backward()
    assert torch.isfinite(y).all()
    for tensor in inputs:
        assert torch.isfinite(tensor.grad).all()
    if scale < 1e-30:  # every bin counts as zero: nothing reaches x, the map's constants still count
        assert not inputs[0].grad.any()
        if mode == "amplitude":
            assert inputs[4].grad.any()
    else:
        assert inputs[0].grad.any()


@pytest.mark.parametrize("mode", ["amplitude", "phase"])
def test_of_an_image_of_zeros_the_gradient_is_that_of_its_convolution(mode):
    tensors, output = arguments(2, 3, (4, 6), {"output_weight": (3, 4)})
    tensors[0][:] = 0
    x, *weights = (torch.from_numpy(tensor).requires_grad_() for tensor in tensors)
    output_weight = torch.from_numpy(output["output_weight"])
    y = ops.amplitude_phase_conv(x, *weights, mode=mode, output_weight=output_weight, backend="reference")
    grad = torch.from_numpy(np.random.default_rng(2).standard_normal(y.shape))
    (grad_x,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(grad_x, torch.einsum("oc,bohw->bchw", output_weight[:, :2], grad))


def test_constant_image_has_one_bin_and_the_rest_counts_as_zero():
    x = torch.full((1, 1, 4, 4), 2.0, dtype=torch.float64)
    amplitude, phase = ops.amplitude_and_phase(x)
    assert amplitude[0, 0, 0, 0] == 32
    assert amplitude.sum() == 32
    assert not phase.any()


@pytest.mark.parametrize("size", SIZES)
def test_half_spectrum_has_real_bins_where_a_real_image_has(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = ops.half_spectrum(x)
    expected = full_spectrum(x.numpy())[..., : size[1] // 2 + 1]
    np.testing.assert_allclose(pairs[..., 0], expected.real, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pairs[..., 1], expected.imag, rtol=0, atol=1e-12)
    rows = [0, size[0] // 2] if size[0] % 2 == 0 else [0]
    columns = [0, size[1] // 2] if size[1] % 2 == 0 else [0]
    real_bins = pairs[:, :, rows][:, :, :, columns][..., 1]
    assert not real_bins.any()
    assert not torch.signbit(real_bins).any()
    _, phase = ops.amplitude_and_phase(x)
    at_real_bins = phase[:, :, rows][:, :, :, columns]
    assert ((at_real_bins == 0) | (at_real_bins == np.pi)).all()


@pytest.mark.parametrize("size", SIZES)
def test_recombine_takes_amplitude_and_phase_apart(size):
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(1, 2, *size, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(ops.recombine(first, first), first, rtol=0, atol=1e-12)
    mixed = ops.recombine(first, second)
    expected = np.fft.ifft2(np.abs(full_spectrum(first.numpy())) * np.exp(1j * np.angle(full_spectrum(second.numpy()))))
    np.testing.assert_allclose(mixed.numpy(), expected.real, rtol=0, atol=1e-12)


def test_gradients_of_the_image_level_operators():
    generator = torch.Generator().manual_seed(4)
    first, second = (
        torch.randn(1, 1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(ops.recombine, (first, second))
    assert torch.autograd.gradcheck(ops.half_spectrum, (first,))
    assert torch.autograd.gradcheck(ops.amplitude_and_phase, (first,))
    dark = torch.zeros(1, 1, 4, 4, requires_grad=True)
    amplitude, phase = ops.amplitude_and_phase(dark)
    (amplitude.sum() + phase.sum()).backward()
    assert not dark.grad.any()
