from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from mitnet_fast.losses.mutual_information import MutualInformation
from tests import golden
from tests.golden import deterministic


def make(channels: int, mode: str = "scalable") -> MutualInformation:
    module = MutualInformation(channels, mode).double()
    deterministic.fill_module(module, salt=3)
    return module


def features(channels: int, size: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(golden.uniform(name, (batch, channels, *size)).requires_grad_() for name in ("phase", "amplitude"))


def noise(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return golden.uniform("eps0", (batch, 4)), golden.uniform("eps1", (batch, 4))


def test_official_mode_equals_the_golden_values():
    module = MutualInformation.from_official(golden.official_state("mutual_information", 0, 1.0)).double()
    phase = golden.uniform("phase_features", (2, 80, 64, 64)).requires_grad_()
    amplitude = golden.uniform("amplitude_features", (2, 80, 64, 64)).requires_grad_()
    loss = module(phase, amplitude, noise())
    loss.backward()
    expected = golden.arrays("mutual_information")
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert phase.grad.norm().item() == pytest.approx(float(expected["grad_phase_norm"]), rel=1e-10)
    assert amplitude.grad.norm().item() == pytest.approx(float(expected["grad_amplitude_norm"]), rel=1e-10)
    assert golden.relative_error(phase.grad[0, :4, ::8, ::8], expected["grad_phase_sample"]) < 1e-7


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("scalable", (64, 64)),
        ("scalable", (4, 4)),
        ("scalable", (37, 90)),
        ("official", (64, 64)),
        ("official", (128, 128)),
        ("official", (256, 256)),
    ],
)
def test_equals_the_formula_of_the_distributions(mode, size):
    module = make(2, mode)
    maps = features(2, size)
    loss = module(*maps, noise())

    latents = []
    for encoder, feature in zip((module.phase, module.amplitude), maps, strict=True):
        first, _, second = encoder.convolutions
        reduced = second(F.leaky_relu(first(feature), 0.01))
        if mode == "scalable":
            reduced = F.adaptive_avg_pool2d(reduced, (16, 16))
        side = str(reduced.shape[-1])
        latents.append([torch.tanh(head[side](reduced.flatten(1))) for head in (encoder.mean, encoder.log_scale)])
    (mean1, log_scale1), (mean2, log_scale2) = latents
    eps1, eps2 = noise()
    p1, p2 = (mean1 + eps1 * (log_scale1 / 2).exp()).sigmoid(), (mean2 + eps2 * (log_scale2 / 2).exp()).sigmoid()
    n1, n2 = Normal(mean1, log_scale1.exp()), Normal(mean2, log_scale2.exp())
    divergence = (kl_divergence(n1, n2) + kl_divergence(n2, n1)).sum(1).mean()
    reduction = "sum" if mode == "official" else "mean"
    cross_entropy = F.binary_cross_entropy(p1, p2.detach(), reduction=reduction)
    cross_entropy = cross_entropy + F.binary_cross_entropy(p2, p1.detach(), reduction=reduction)
    expected = cross_entropy - divergence

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    inputs = [*maps, *(p for p in module.parameters() if p.requires_grad)]
    actual = torch.autograd.grad(loss, inputs)
    truth = torch.autograd.grad(expected, inputs)
    assert max(map(golden.relative_error, actual, truth)) < 1e-11


def test_official_parameters_are_frozen_and_scalable_ones_are_trained():
    assert not any(parameter.requires_grad for parameter in MutualInformation(2, "official").parameters())
    assert all(parameter.requires_grad for parameter in MutualInformation(2).parameters())


def test_scalable_cross_entropy_does_not_grow_with_the_batch():
    module = make(2)
    phase, amplitude = features(2, (16, 16))
    eps = noise()
    twice = module(phase.repeat(2, 1, 1, 1), amplitude.repeat(2, 1, 1, 1), tuple(e.repeat(2, 1) for e in eps))
    assert twice.item() == pytest.approx(module(phase, amplitude, eps).item(), rel=1e-13)


def test_is_finite_and_exact_where_sigmoid_saturates():
    module = make(2)
    maps = features(2, (16, 16))
    large = torch.full((2, 4), 400.0, dtype=torch.float64)
    loss = module(*maps, (large, -large))
    # for z1 ≫ 0 ≫ z2 the targets are 0 and 1, the cross-entropies z1 and −z2
    encoders = zip((module.phase, module.amplitude), maps, strict=True)
    mean, log_scale = map(torch.stack, zip(*(encoder(feature, 16) for encoder, feature in encoders), strict=True))
    spread = 400 * (log_scale / 2).exp()
    saturated = ((mean[0] + spread[0]) + (spread[1] - mean[1])).mean()
    quiet = module(*maps, (torch.zeros_like(large), torch.zeros_like(large)))
    divergence = F.binary_cross_entropy_with_logits(mean[0], mean[1].sigmoid())
    divergence = divergence + F.binary_cross_entropy_with_logits(mean[1], mean[0].sigmoid()) - quiet
    assert loss.item() == pytest.approx((saturated - divergence).item(), rel=1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, maps))


def test_noise_comes_from_the_generator_phase_first():
    module = make(2)
    maps = features(2, (16, 16))
    first = module(*maps, generator=torch.Generator().manual_seed(5))
    again = module(*maps, generator=torch.Generator().manual_seed(5))
    other = module(*maps, generator=torch.Generator().manual_seed(6))
    drawn = torch.randn((2, 2, 4), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert first.item() == again.item() == module(*maps, tuple(drawn)).item()
    assert first.item() != other.item()


def test_autocast_keeps_the_latent_in_float32():
    module = MutualInformation(4)
    deterministic.fill_module(module, salt=3)
    maps = [feature.detach().float() for feature in features(4, (32, 32))]
    eps = tuple(e.float() for e in noise())
    exact = module(*maps, eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(*maps, eps)
        loss.backward()
    assert loss.dtype == torch.float32
    # mean and log σ have three significant digits left; the loss is smooth in both
    assert loss.item() == pytest.approx(exact.item(), abs=32 * torch.finfo(torch.bfloat16).eps)
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "channels: expected an integer of at least 1, got 0"),
        ((4, "exact"), "mode: got 'exact', allowed are 'scalable' and 'official'"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        MutualInformation(*arguments)


@pytest.mark.parametrize(
    ("mode", "shapes", "message"),
    [
        ("scalable", [(1, 3, 8, 8), (1, 2, 8, 8)], r"phase_features: expected .* \[1, 2, 8, 8\], got \[1, 3, 8, 8\]"),
        ("scalable", [(1, 2, 8, 8), (1, 2, 8, 9)], r"amplitude_features: .* \[1, 2, 8, 8\], got \[1, 2, 8, 9\]"),
        ("scalable", [(1, 2, 8, 8), (2, 2, 8, 8)], r"amplitude_features: .* \[1, 2, 8, 8\], got \[2, 2, 8, 8\]"),
        ("scalable", [(1, 2, 3, 8)] * 2, "phase_features: needs at least 4×4 pixels, got 3×8"),
        ("official", [(1, 2, 60, 60)] * 2, "256×256 or 128×128 or 64×64 pixels .*, got 60×60; mode='scalable' takes"),
        ("official", [(1, 2, 64, 128)] * 2, "got 64×128"),
    ],
)
def test_forward_names_what_is_wrong(mode, shapes, message):
    with pytest.raises(ValueError, match=message):
        MutualInformation(2, mode)(*(torch.zeros(shape) for shape in shapes))


def test_forward_names_noise_that_does_not_fit():
    maps = [torch.zeros(2, 2, 8, 8)] * 2
    with pytest.raises(ValueError, match=r"noise\[1\]: expected shape \[B, 4\] = \[2, 4\], got \[1, 4\]"):
        MutualInformation(2)(*maps, (torch.zeros(2, 4), torch.zeros(1, 4)))


def test_only_the_official_mode_has_a_published_format():
    with pytest.raises(ValueError, match="the published format holds the 'official' regulariser only"):
        MutualInformation(2).to_official()
