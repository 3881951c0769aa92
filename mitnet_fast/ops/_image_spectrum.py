"""Public Fourier operators on images: real in, real out, opaque to compilers.

Complex tensors in a graph are more than compilers can differentiate, so plain PyTorch runs behind
``mitnet_fast::half_spectrum``, ``amplitude_and_phase`` and ``recombine`` and their backward operators.
With X = rfft2(x), A = |X|, u = X/A, g_A, g_P the incoming gradients of amplitude and phase, and
G = c/HW·rfft2(g), c = 1 in columns 0 and W/2 and 2 elsewhere, the gradient of an image's spectrum:

    half_spectrum:        ∂X = g
    amplitude_and_phase:  ∂X = u·(g_A + i·g_P/A)
    recombine:            ∂X = u·Re(v̄G) of the amplitude's, v·i·A·Im(v̄G)/B of the phase's image,
                          whose spectrum is B·v

0 where an amplitude counts as zero. The adjoint of rfft2, which follows, is an unnormalised inverse
transform of ∂X/c with its columns 0 and W/2 made Hermitian.
"""

from __future__ import annotations

import torch

from .. import reference
from ..reference.amplitude_phase import mirror, polar, spectrum_parts
from ._amplitude_phase import widened
from ._checks import autocast_dtype, check_one_device, check_one_dtype, check_shape, without_autocast
from ._registration import define, differentiate


def half_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Unnormalised half spectrum rfft2 of a real image as pairs of real numbers.

    Args:
        x: [..., H, W], at least 2-D. Half precision is computed in float32.

    Returns:
        [..., H, W//2 + 1, 2], real and imaginary part, float32 (float64 for float64). The imaginary
        part of the bins that are real for every real image is exactly +0.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has no pixel.
    """
    _check_images(x=x)
    return _run("half_spectrum", widened(x, x.dtype))


def amplitude_and_phase(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Amplitude and phase of the half spectrum of a real image, with finite gradients everywhere.

    Args:
        x: [..., H, W], at least 2-D. Half precision is computed in float32.

    Returns:
        |rfft2(x)| and angle(rfft2(x)) in radians, both [..., H, W//2 + 1], float32 (float64 for
        float64). Where the amplitude counts as zero (see :func:`amplitude_phase_conv`) the phase is
        0 and no gradient reaches x.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has no pixel.
    """
    _check_images(x=x)
    return _run("amplitude_and_phase", widened(x, x.dtype))


def recombine(amplitude_of: torch.Tensor, phase_of: torch.Tensor) -> torch.Tensor:
    """The real image with the amplitude spectrum of one image and the phase spectrum of another.

    Args:
        amplitude_of: [..., H, W], at least 2-D.
        phase_of: the same shape and dtype.

    Returns:
        ``irfft2(|rfft2(amplitude_of)|·exp(i·angle(rfft2(phase_of))))``, [..., H, W] in their dtype;
        half precision is computed in float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices differ, or there is no pixel.

    Source: MITNet (arXiv 2308.06998), amplitude and phase exchanged between the two stages.
    """
    _check_images(amplitude_of=amplitude_of, phase_of=phase_of)
    check_shape("phase_of", phase_of, tuple(amplitude_of.shape), "that of amplitude_of")
    check_one_device(amplitude_of=amplitude_of, phase_of=phase_of)
    if autocast_dtype(amplitude_of) is None:
        check_one_dtype(amplitude_of=amplitude_of, phase_of=phase_of)
    dtype = torch.promote_types(amplitude_of.dtype, phase_of.dtype)
    return _run("recombine", widened(amplitude_of, dtype), widened(phase_of, dtype)).to(dtype)


def _check_images(**images: torch.Tensor) -> None:
    for name, image in images.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            what = str(image.dtype) if isinstance(image, torch.Tensor) else type(image).__name__
            raise TypeError(f"{name}: expected a floating-point tensor [..., H, W], got {what}")
        if image.dim() < 2 or image.shape[-1] < 1 or image.shape[-2] < 1:
            raise ValueError(f"{name}: expected shape [..., H, W] with at least one pixel, got {list(image.shape)}")


def _run(name: str, *images: torch.Tensor):
    """The registered operator; plain PyTorch inside transforms of torch.func, which reach through nothing else."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        with without_autocast(images[0]):
            return getattr(reference, name)(*images)
    return getattr(torch.ops.mitnet_fast, name)(*images)


def _aligned(image: torch.Tensor) -> torch.Tensor:
    """``image`` as FFT libraries always get it, since their rounding depends on how it lies in memory."""
    dense = image.contiguous()
    return dense if dense.data_ptr() % 64 == 0 else dense.clone()


def _counted(real: torch.Tensor, width: int) -> torch.Tensor:
    """How often a column of a half spectrum stands in the whole one: c."""
    columns = torch.arange(width // 2 + 1, device=real.device)
    return torch.where((2 * columns) % width == 0, 1.0, 2.0).to(real.dtype)


def _of_spectrum(real: torch.Tensor, imaginary: torch.Tensor, width: int) -> torch.Tensor:
    """The gradient of an image of this width from that of the parts of its half spectrum."""
    size = torch.Size((real.shape[-2], width))
    if real.numel() == 0:
        return real.new_empty((*real.shape[:-2], *size))
    counted = _counted(real, width)
    parts = (mirror(part / counted, size, sign) for part, sign in ((real, 1), (imaginary, -1)))
    return torch.fft.irfft2(torch.complex(*parts), s=size, norm="forward").contiguous()


def _half_spectrum_backward(grad: torch.Tensor, width: int) -> torch.Tensor:
    return _of_spectrum(*grad.unbind(-1), width)


def _amplitude_and_phase_backward(
    grad_amplitude: torch.Tensor, grad_phase: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    amplitude, cosine, sine = polar(*spectrum_parts(_aligned(x)))
    radial = torch.where(amplitude > 0, grad_amplitude, 0)
    angular = torch.where(amplitude > 0, grad_phase / amplitude, 0)
    return _of_spectrum(cosine * radial - sine * angular, sine * radial + cosine * angular, x.shape[-1])


def _recombine_backward(
    grad: torch.Tensor, amplitude_of: torch.Tensor, phase_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = grad.shape[-2:]
    amplitude, amplitude_cosine, amplitude_sine = polar(*spectrum_parts(_aligned(amplitude_of)))
    own_amplitude, cosine, sine = polar(*spectrum_parts(_aligned(phase_of)))
    real, imaginary = spectrum_parts(_aligned(grad))
    scale = _counted(real, width) / (height * width)
    radial = torch.where(amplitude > 0, scale * (cosine * real + sine * imaginary), 0)
    angular = torch.where(own_amplitude > 0, scale * amplitude * (cosine * imaginary - sine * real) / own_amplitude, 0)
    return (
        _of_spectrum(amplitude_cosine * radial, amplitude_sine * radial, width),
        _of_spectrum(-sine * angular, cosine * angular, width),
    )


def _fake_spectrum(x: torch.Tensor, *pair: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 + 1, *pair))


def _fake_image(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


define(
    "half_spectrum(Tensor x) -> Tensor",
    lambda x: reference.half_spectrum(_aligned(x)),
    lambda x: _fake_spectrum(x, 2),
)
define(
    "half_spectrum_backward(Tensor grad, SymInt width) -> Tensor",
    _half_spectrum_backward,
    lambda grad, width: grad.new_empty((*grad.shape[:-2], width)),
)
define(
    "amplitude_and_phase(Tensor x) -> (Tensor, Tensor)",
    lambda x: reference.amplitude_and_phase(_aligned(x)),
    lambda x: (_fake_spectrum(x), _fake_spectrum(x)),
)
define(
    "amplitude_and_phase_backward(Tensor grad_amplitude, Tensor grad_phase, Tensor x) -> Tensor",
    _amplitude_and_phase_backward,
    lambda grad_amplitude, grad_phase, x: _fake_image(x),
)
define(
    "recombine(Tensor amplitude_of, Tensor phase_of) -> Tensor",
    lambda amplitude_of, phase_of: reference.recombine(_aligned(amplitude_of), _aligned(phase_of)),
    lambda amplitude_of, phase_of: _fake_image(phase_of),
)
define(
    "recombine_backward(Tensor grad, Tensor amplitude_of, Tensor phase_of) -> (Tensor, Tensor)",
    _recombine_backward,
    lambda grad, amplitude_of, phase_of: (_fake_image(amplitude_of), _fake_image(phase_of)),
)


def _keep_width(ctx, inputs, output):
    ctx.width = inputs[0].shape[-1]


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


for _name, _setup, _gradients in (
    ("half_spectrum", _keep_width, lambda ctx, g: torch.ops.mitnet_fast.half_spectrum_backward(g, ctx.width)),
    (
        "amplitude_and_phase",
        _keep_inputs,
        lambda ctx, *g: torch.ops.mitnet_fast.amplitude_and_phase_backward(*g, *ctx.saved_tensors),
    ),
    ("recombine", _keep_inputs, lambda ctx, g: torch.ops.mitnet_fast.recombine_backward(g, *ctx.saved_tensors)),
):
    differentiate(_name, _setup, _gradients, instead=f"mitnet_fast.reference.{_name}")
