from __future__ import annotations

import json
import statistics
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mitnet_fast.models import MITNet, MITNetOutput, mitnet
from mitnet_fast.models._restoration import reflect_to
from mitnet_fast.models.official import MITNET_NAMES, official_name
from tests import golden
from tests.models import mitnet_formula as formula

Tensors = dict[str, torch.Tensor]


def flat(output: MITNetOutput | dict) -> Tensors:
    """All tensors of an output by name, features as ``phase_features/0``."""
    tensors: Tensors = {}
    for name, value in (output._asdict() if isinstance(output, MITNetOutput) else output).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            tensors |= {f"{name}/{level}": feature for level, feature in enumerate(value)}
    return tensors


def scalar(outputs: Tensors, salt: int) -> torch.Tensor:
    """What the golden gradients are taken of."""
    return sum(
        (outputs[name] * golden.uniform(weight, outputs[name].shape, salt, outputs[name].dtype)).sum()
        for name, weight in (("stage1", "w1"), ("restored", "w2"))
    )


def official_gradients(network: MITNet) -> dict[str, torch.Tensor | None]:
    return {official_name(name, MITNET_NAMES): parameter.grad for name, parameter in network.named_parameters()}


def small(dtype: torch.dtype = torch.float64, **options) -> MITNet:
    """A network of another size than the published one, at its default initialisation."""
    torch.manual_seed(0)
    return MITNet(**({"width": 4, "depth": 3} | options)).to(dtype)


def all_close(actual: Tensors, expected: Tensors, allowed: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert golden.relative_error(actual[name], value) <= allowed, name


def run(network: MITNet, image: torch.Tensor, salt: int = 0) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients that exist by official name."""
    network.zero_grad()
    outputs = flat(network(image))
    scalar(outputs, salt).backward()
    gradients = official_gradients(network)
    outputs = {name: value.detach() for name, value in outputs.items()}
    return outputs, {name: value for name, value in gradients.items() if value is not None}


def run_formula(state: Tensors, image: torch.Tensor, salt: int = 0, **options) -> tuple[Tensors, Tensors]:
    w = {name: value.detach().to(image.dtype).requires_grad_() for name, value in state.items()}
    outputs = flat(formula.mitnet(w, image, **options))
    scalar(outputs, salt).backward()
    gradients = {name: value.grad for name, value in w.items() if value.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


@pytest.mark.parametrize(
    ("file", "norms", "salt", "size"),
    [
        ("mitnet_float64", "mitnet_gradient_norms_float64", 0, (64, 48)),
        ("mitnet_56x40", "mitnet_56x40_gradient_norms", 9, (56, 40)),
    ],
)
def test_equals_the_published_network(file, norms, salt, size):
    expected = golden.arrays(file)
    network = MITNet.from_official(golden.official_state("mitnet", salt, 0.95)).double()
    outputs, gradients = run(network, golden.tensor("input", (1, 3, *size), salt), salt)

    names = {
        "out_1": "stage1",
        "out_1_amp": "stage1_amplitude",
        "out_1_phase": "stage1_phase",
        "out_2": "restored",
        "image_phase": "input_phase",
        **{f"pha_feas/{level}": f"phase_features/{level}" for level in range(3)},
        **{f"amp_feas/{level}": f"amplitude_features/{level}" for level in range(3)},
    }
    for name, value in expected.items():
        actual = gradients[name.removeprefix("grad/")] if name.startswith("grad/") else outputs[names[name]]
        assert golden.relative_error(actual, value) < 1e-7, name  # stored as float32

    expected_norms = golden.gradient_norms(norms)
    assert gradients.keys() == {name for name, norm in expected_norms.items() if norm is not None}
    largest = max(norm for norm in expected_norms.values() if norm is not None)
    for name, gradient in gradients.items():
        # a gradient that is truly zero has no relative error: 1e-9 of the largest is nothing
        assert gradient.norm().item() == pytest.approx(expected_norms[name], rel=1e-6, abs=1e-9 * largest), name


@pytest.mark.parametrize("decoder_spectral", [False, True])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 40)),
        ({"width": 3, "depth": 2, "in_channels": 1, "negative_slope": 0.05}, (10, 14)),
        ({"width": 2, "depth": 5}, (48, 16)),
    ],
)
def test_equals_the_formula_at_other_sizes_and_with_a_spectral_decoder(options, size, decoder_spectral):
    network = small(**options, decoder_spectral=decoder_spectral)
    image = golden.tensor("image", (2, network.in_channels, *size))
    actual, gradients = run(network, image)
    expected, truth = run_formula(
        network.to_official(),
        image,
        depth=network.depth,
        slope=network.negative_slope,
        decoder_spectral=decoder_spectral,
    )
    all_close(actual, expected, 1e-11)
    all_close(gradients, truth, 1e-8)


def test_spectral_decoder_uses_all_parameters_and_the_published_one_leaves_18_out():
    for decoder_spectral, unused in ((False, 18), (True, 0)):
        network = MITNet(decoder_spectral=decoder_spectral)
        _, gradients = run(network, golden.tensor("image", (1, 3, 16, 16), dtype=torch.float32))
        left_out = [p for name, p in network.named_parameters() if official_name(name, MITNET_NAMES) not in gradients]
        assert len(left_out) == unused
        assert sum(parameter.numel() for parameter in left_out) == (0 if decoder_spectral else 34_020)


def distance_to_the_branch_cut(state: Tensors, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """How near a phase comes to ±π, in units of its spectrum's root mean square."""
    spectra = []

    def recorded(x: torch.Tensor, spectrum=formula.spectrum) -> torch.Tensor:
        spectra.append(spectrum(x))
        return spectra[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(formula, "spectrum", recorded)
        formula.mitnet({name: value.double() for name, value in state.items()}, image)
    phases_matter = spectra[4:]  # the amplitude blocks of stage 1 come first
    beside_the_cut = [(s, s.imag[(s.real < 0) & (s.imag != 0)].abs().min()) for s in phases_matter]
    return min(float(nearest / s.abs().square().mean().sqrt()) for s, nearest in beside_the_cut)


def test_float32_is_as_near_to_the_truth_as_plain_pytorch_in_float32(monkeypatch):
    """At most four times the error of the formula in float32, for every output and the gradient.

    A phase that rounding carries across ±π changes the result at once, so the problems are chosen
    without one nearby. Errors of phases and of gradients have a heavy tail, since they are divided
    by the amplitudes of the smallest bins: medians over the problems are compared.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for salt in (1, 15, 19, 24, 27):
        state = golden.official_state("mitnet", salt, 0.95)
        image = golden.tensor("input", (1, 3, 16, 24), salt)
        # float32 moves a spectrum by some 1e-6 of its root mean square
        assert distance_to_the_branch_cut(state, image, monkeypatch) > 1e-4
        exact, exact_gradients = run_formula(state, image, salt)
        rounded, rounded_gradients = run_formula(state, image.float(), salt)
        actual, gradients = run(MITNet.from_official(state), image.float(), salt)
        for outputs, found in ((exact, exact_gradients), (rounded, rounded_gradients), (actual, gradients)):
            outputs["gradient"] = torch.cat([found[name].flatten() for name in exact_gradients])
        for name, value in exact.items():
            pair = golden.relative_error(actual[name], value), golden.relative_error(rounded[name], value)
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        ours, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
        assert ours <= 4 * plain, name


def test_has_the_published_number_of_parameters():
    network = MITNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_764_078
    assert len(network.state_dict()) == 298


def test_configuration_survives_json():
    network = small(in_channels=1, negative_slope=0.1, decoder_spectral=True)
    assert MITNet(**json.loads(json.dumps(network.config))).config == network.config
    assert MITNet().config == {
        "in_channels": 3,
        "width": 20,
        "depth": 4,
        "negative_slope": 0.2,
        "decoder_spectral": False,
    }


@pytest.mark.parametrize(
    ("length", "multiple", "expected"),
    [
        (1, 4, [0, 0, 0, 0]),
        (2, 8, [0, 1, 0, 1, 0, 1, 0, 1]),
        (3, 8, [0, 1, 2, 1, 0, 1, 2, 1]),
        (5, 8, [0, 1, 2, 3, 4, 3, 2, 1]),
        (7, 8, [0, 1, 2, 3, 4, 5, 6, 5]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("axis", [-1, -2])
def test_reflection_goes_on_back_and_forth(length, multiple, expected, axis):
    image = torch.arange(float(length)).view(1, 1, 1, -1).expand(1, 2, multiple, length).transpose(-1, axis)
    padded = reflect_to(image, multiple, multiple)
    assert padded.shape == (1, 2, multiple, multiple)
    assert torch.equal(padded.transpose(-1, axis)[0, 0, 0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (1, 1), (5, 300), (300, 1), (8, 7), (2, 3), (23, 24)])
def test_restore_takes_any_size(size):
    network = small(width=2, depth=4)
    image = golden.tensor("image", (2, 3, *size))
    expected = network(reflect_to(image, *(-(-side // 8) * 8 for side in size))).restored[..., : size[0], : size[1]]
    restored = network.restore(image)
    assert restored.shape == image.shape
    assert golden.relative_error(restored, expected.detach()) < 1e-12
    assert not restored.requires_grad


def test_restore_leaves_the_mode_alone_and_does_nothing_that_only_training_needs(monkeypatch):
    network = small()
    image = golden.tensor("image", (1, 3, 16, 16))
    expected = network(image).restored

    def refuse(*arguments):
        raise AssertionError("spectra are for the losses")

    monkeypatch.setattr(mitnet, "amplitude_and_phase", refuse)
    for mode in (True, False):
        network.train(mode)
        assert torch.equal(network.restore(image), expected)
        assert network.training is mode
        assert all(module.training is mode for module in network.modules())


def test_restore_frees_every_full_size_map_before_the_last_block():
    network = small(depth=4)
    alive: dict[str, weakref.ref] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module, inputs, output) -> None:
            alive[name] = weakref.ref(output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)

    watch("encoder of stage 1", network.amplitude_encoder[0])
    watch("decoder of stage 1", network.amplitude_decoder[-1])
    watch("attended features", network.supervised_attention)
    watch("encoder of stage 2", network.phase_encoder[0])
    left = []
    network.phase_decoder[-1].block.register_forward_pre_hook(
        lambda module, inputs: left.extend(name for name, reference in alive.items() if reference() is not None)
    )
    network.restore(golden.tensor("image", (1, 3, 16, 16)))
    assert len(alive) == 4
    assert left == []


def test_images_of_a_batch_do_not_mix():
    network = small()
    images = golden.tensor("images", (3, 3, 16, 12))
    alone = torch.cat([network.restore(image[None]) for image in images])
    assert golden.relative_error(network.restore(images), alone) < 1e-12


def test_an_empty_batch_stays_empty():
    assert small().restore(torch.zeros(0, 3, 16, 16, dtype=torch.float64)).shape == (0, 3, 16, 16)


def test_channels_last_gives_the_same():
    network = small()
    image = golden.tensor("image", (2, 3, 16, 24))
    expected, truth = run(network, image)
    outputs, gradients = run(
        network.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)
    )
    all_close(outputs, expected, 1e-12)
    all_close(gradients, truth, 1e-9)


def test_bfloat16_autocast_is_close():
    network = small(torch.float32)
    image = golden.tensor("image", (1, 3, 32, 32), dtype=torch.float32)
    exact, _ = run(network, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, gradients = run(network, image)
    # about thirty roundings to bfloat16 follow one another, each of relative size eps / 2 at most;
    # the images add their input, which is not rounded, so they are nearer than that
    assert golden.relative_error(outputs["restored"], exact["restored"]) < 16 * torch.finfo(torch.bfloat16).eps
    assert golden.relative_error(outputs["stage1"], exact["stage1"]) < 16 * torch.finfo(torch.bfloat16).eps
    assert outputs["restored"].dtype == torch.float32
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert len(gradients) == len(list(network.parameters())) - 6 * (network.depth - 1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiles_without_a_graph_break_forward_and_backward(fresh_compiler):
    network = small(depth=2)
    image = golden.tensor("image", (1, 3, 8, 12))
    expected, truth = run(network, image)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    outputs = flat(compiled(image))
    network.zero_grad()
    scalar(outputs, 0).backward()
    gradients = {name: value for name, value in official_gradients(network).items() if value is not None}
    all_close(outputs, expected, 1e-12)
    all_close(gradients, truth, 1e-9)


def test_restore_exports():
    class Restore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small(depth=2)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.network.restore(image)

    image = golden.tensor("image", (1, 3, 7, 10))
    module = Restore()
    exported = torch.export.export(module, (image,)).module()
    assert golden.relative_error(exported(image), module(image)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
        ({"width": 2.5}, "width: expected an integer of at least 1, got 2.5"),
        ({"depth": True}, "depth: expected an integer of at least 1, got True"),
        ({"depth": 1}, "depth: expected at least 2 levels, got 1"),
        ({"negative_slope": 1.0}, r"negative_slope: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_constructor_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        MITNet(**options)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), ValueError, r"image: expected shape \[B, 3, H, W\] .*, got \[1, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), ValueError, r"image: expected shape \[B, 3, H, W\] .*, got \[3, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"with at least one pixel, got \[1, 3, 0, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"values in \[0, 1\], got torch.uint8"),
        (
            torch.zeros(1, 3, 8, 8).double(),
            TypeError,
            "expected torch.float32, the dtype of the weights, got torch.float64",
        ),
        ([[0.0]], TypeError, "image: expected a floating-point tensor .*, got list"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "restore"])
def test_image_that_does_not_fit_is_named(method, image, error, message):
    with pytest.raises(error, match=message):
        getattr(small(torch.float32), method)(image)


@pytest.mark.parametrize(("depth", "size"), [(4, (8, 12)), (4, (15, 16)), (3, (4, 6))])
def test_forward_says_which_sizes_it_takes(depth, size):
    multiple = 2 ** (depth - 1)
    message = (
        rf"image: height and width must be multiples of {multiple}, got {size[0]}×{size[1]}; restore\(\) takes any"
    )
    with pytest.raises(ValueError, match=message):
        small(depth=depth)(torch.zeros(1, 3, *size, dtype=torch.float64))
