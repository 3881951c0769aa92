from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mitnet_fast.losses.mitnet import MITNetLoss
from mitnet_fast.losses.ssim import ssim
from mitnet_fast.models.mitnet import MITNet, MITNetOutput
from tests import golden
from tests.golden import deterministic
from tests.models import mitnet_formula as formula

SHAPE = (2, 3, 16, 20)
LEVELS = 2


def images(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return golden.tensor("hazy", SHAPE, dtype=dtype), golden.tensor("clear", SHAPE, dtype=dtype)


def output(hazy: torch.Tensor) -> MITNetOutput:
    """An output whose images and features are leaves."""
    stage1 = golden.tensor("stage1", SHAPE, dtype=hazy.dtype).requires_grad_()
    spectrum = formula.spectrum(stage1)
    phase, amplitude = (
        tuple(
            golden.uniform(f"{name}{i}", (2, 4 * 2**i, 16 // 2**i, 20 // 2**i), dtype=hazy.dtype).requires_grad_()
            for i in range(LEVELS)
        )
        for name in ("phase", "amplitude")
    )
    restored = golden.tensor("restored", SHAPE, dtype=hazy.dtype).requires_grad_()
    input_phase = formula.spectrum(hazy).angle()
    return MITNetOutput(restored, stage1, spectrum.abs(), spectrum.angle(), input_phase, phase, amplitude)


def noise(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(golden.uniform(f"eps{i}{j}", (2, 4), dtype=dtype) for j in range(2)) for i in range(LEVELS)]


def make(**options) -> MITNetLoss:
    loss = MITNetLoss(4, LEVELS + 1, **options).double()
    deterministic.fill_module(loss, salt=2)
    return loss


def test_equals_the_formula_term_by_term():
    hazy, clear = images()
    out = output(hazy)
    loss = make(spectral_weight=0.3, mutual_information_weight=0.2, ssim_weight=0.7)
    terms = loss(out, hazy, clear, noise())

    clear_spectrum, restored_spectrum = formula.spectrum(clear), formula.spectrum(out.restored)
    target1 = formula.image_of(clear_spectrum.abs(), out.input_phase, hazy.shape[-2:])
    difference = restored_spectrum - clear_spectrum
    expected = {
        "stage1": (out.stage1 - target1).abs().mean(),
        "restored": (out.restored - clear).abs().mean(),
        "stage1_amplitude": (out.stage1_amplitude - clear_spectrum.abs()).abs().mean(),
        "restored_spectrum": (difference.real.abs().mean() + difference.imag.abs().mean()) / 2,
        "mutual_information": sum(
            part(p, d, eps)
            for part, p, d, eps in zip(
                loss.mutual_information, out.phase_features, out.amplitude_features, noise(), strict=True
            )
        ),
        "stage1_ssim": 1 - ssim(out.stage1, clear).mean(),
        "restored_ssim": 1 - ssim(out.restored, clear).mean(),
    }
    weights = (1, 1, 0.3, 0.3, 0.2, 0.7, 0.7)
    expected["total"] = sum(weight * term for weight, term in zip(weights, expected.values(), strict=True))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-12), name

    inputs = [out.restored, out.stage1, *out.phase_features, *out.amplitude_features, *loss.parameters()]
    actual = torch.autograd.grad(terms["total"], inputs, retain_graph=True)
    truth = torch.autograd.grad(expected["total"], inputs)
    assert max(map(golden.relative_error, actual, truth)) < 1e-10


def test_published_weights_are_the_defaults_and_zero_weights_leave_terms_out():
    hazy, clear = images()
    out = output(hazy)
    terms = make()(out, hazy, clear, noise())
    assert terms.keys() == {
        "total",
        "stage1",
        "restored",
        "stage1_amplitude",
        "restored_spectrum",
        "mutual_information",
    }
    spectral = terms["stage1_amplitude"] + terms["restored_spectrum"]
    expected = terms["stage1"] + terms["restored"] + 0.05 * spectral + 0.001 * terms["mutual_information"]
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-14)

    plain = make(mutual_information_weight=0)
    assert list(plain.parameters()) == []
    bare = plain(out, hazy, clear)
    assert "mutual_information" not in bare
    expected = terms["stage1"] + terms["restored"] + 0.05 * spectral
    assert bare["total"].item() == pytest.approx(expected.item(), rel=1e-14)


def test_a_perfect_result_costs_nothing_but_the_regulariser():
    hazy, clear = images()
    spectrum = formula.spectrum(clear)
    stage1 = formula.image_of(spectrum.abs(), formula.spectrum(hazy).angle(), hazy.shape[-2:])
    # the columns that are their own mirror image cannot hold any phase: compare amplitudes as they come out
    perfect = output(hazy)._replace(restored=clear, stage1=stage1, stage1_amplitude=spectrum.abs())
    terms = make(mutual_information_weight=0)(perfect, hazy, clear)
    assert all(abs(term.item()) < 1e-12 for term in terms.values())


def test_official_regulariser_is_frozen_and_refuses_other_patches():
    loss = make(mutual_information="official")
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert [part.channels for part in loss.mutual_information] == [4, 8]
    hazy, clear = images()
    with pytest.raises(ValueError, match="mode='scalable' takes any size"):
        loss(output(hazy), hazy, clear)


def test_noise_is_reproducible_with_a_generator():
    hazy, clear = images()
    out, loss = output(hazy), make()
    first, again, other = (
        loss(out, hazy, clear, generator=torch.Generator().manual_seed(seed))["mutual_information"].item()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_trains_network_and_regulariser_under_autocast():
    torch.manual_seed(0)
    network, loss = MITNet(width=4, depth=3), MITNetLoss(4, 3, ssim_weight=1.0)
    hazy, clear = images(torch.float32)
    exact = loss(network(hazy), hazy, clear, noise(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(network(hazy), hazy, clear, noise(torch.float32))
    terms["total"].backward()
    # about thirty roundings to bfloat16 follow one another, each of relative size eps / 2 at most
    allowed = 16 * torch.finfo(torch.bfloat16).eps
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        assert term.item() == pytest.approx(exact[name].item(), rel=allowed), name
    trained = [p for n, p in network.named_parameters() if ".block.spectral" not in n and ".block.fusion" not in n]
    assert all(torch.isfinite(p.grad).all() for p in [*trained, *loss.parameters()])


def test_training_removes_uniform_haze():
    torch.manual_seed(0)
    network, loss = MITNet(width=4, depth=2), MITNetLoss(4, 2)
    clear = golden.tensor("clear", SHAPE, dtype=torch.float32)
    hazy = 0.4 * clear + 0.6 * 0.9  # transmission 0.4, airlight 0.9
    eps = noise(torch.float32)[:1]
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], 5e-3)
    totals = []
    for _ in range(15):
        optimizer.zero_grad()
        total = loss(network(hazy), hazy, clear, eps)["total"]
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert F.l1_loss(network.restore(hazy), clear) < 0.8 * F.l1_loss(hazy, clear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"depth": 2.0}, "depth: expected an integer of at least 1, got 2.0"),
        ({"spectral_weight": -1}, "spectral_weight: expected a number of at least 0, got -1"),
        ({"mutual_information_weight": float("nan")}, "mutual_information_weight: .*, got nan"),
        ({"ssim_weight": -0.5}, "ssim_weight: expected a number of at least 0, got -0.5"),
        ({"mutual_information": "none"}, "mode: got 'none', allowed are 'scalable' and 'official'"),
    ],
)
def test_constructor_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        MITNetLoss(**options)


def test_forward_names_what_is_wrong():
    hazy, clear = images()
    out, loss = output(hazy), make()
    with pytest.raises(ValueError, match=r"clear: expected .* \[2, 3, 16, 20\], got \[2, 3, 16, 19\]"):
        loss(out, hazy, clear[..., :-1])
    with pytest.raises(ValueError, match=r"hazy: expected .* \[2, 3, 16, 20\], got \[1, 3, 16, 20\]"):
        loss(out, hazy[:1], clear)
    with pytest.raises(ValueError, match="noise: expected one pair for each of 2 levels, got 1"):
        loss(out, hazy, clear, noise()[:1])
    with pytest.raises(ValueError, match=r"output: expected features of 2 levels \(depth 3\), got 1"):
        loss(out._replace(phase_features=out.phase_features[:1]), hazy, clear)
