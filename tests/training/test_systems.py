"""Systems: what one step does to networks, optimizers, averages and statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mitnet_fast.losses.contrastive import CHANNELS
from mitnet_fast.models import DCMPNet, DepthSharingDCMPNet, MITNet
from mitnet_fast.training import ConfigError, TrainingDiverged, build_system
from mitnet_fast.training.sampler import Share
from mitnet_fast.weights import save_weights

from .samples import batch_of, small_config

CPU = torch.device("cpu")
BATCH = batch_of(2)


def system_of(name: str, *overrides: str, seed: int = 0):
    torch.manual_seed(seed)
    return build_system(small_config(name, *overrides), CPU)


def step_with_noise(system, batch=BATCH) -> dict[str, float]:
    """A step in which the regulariser draws the same noise in every system."""
    system.steps = 9
    return system.training_step(batch)


def tensors(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All leaves of a nested state as tensors."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {prefix: state if isinstance(state, torch.Tensor) else torch.tensor(float(state or 0))}
    return {name: leaf for key, value in items for name, leaf in tensors(value, f"{prefix}/{key}").items()}


def numbers(system) -> dict[str, torch.Tensor]:
    state = system.state_dict()
    for scheduler in state["schedulers"].values():
        scheduler.clear()
    return {name: value.clone() for name, value in tensors(state).items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before | after if name not in before or not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mitnet", ()),
        ("mitnet", ("loss.ssim_weight=1", "run.precision=bfloat16")),
        ("dcmpnet", ()),
        ("dcmpnet", ("loss.mode=official", "network.share_depth=true")),
    ],
)
def test_the_restored_image_comes_closer_to_the_truth(name, overrides):
    system = system_of(name, "optimizer.lr=5e-3", *overrides)
    restored = [system.training_step(BATCH)["restored"] for _ in range(12)]
    assert sum(restored[-3:]) / 3 < 0.75 * restored[0]
    assert system.skipped == 0


def test_mitnet_learns_its_regulariser_in_scalable_mode():
    system = system_of("mitnet")
    optimized = {id(p) for group in system.optimizers["restoration"].param_groups for p in group["params"]}
    assert {id(p) for p in system.modules.parameters()} == optimized
    before = copy.deepcopy(system.loss.state_dict())
    system.training_step(BATCH)
    assert all(not torch.equal(value, before[name]) for name, value in system.loss.state_dict().items())


def test_mitnet_keeps_its_regulariser_in_official_mode():
    torch.manual_seed(0)
    overrides = ("network.width=1", "network.depth=4", "data.patch=256", "loss.mutual_information=official")
    system = build_system(small_config("mitnet", *overrides), CPU)
    optimized = {id(p) for group in system.optimizers["restoration"].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in system.deployed.parameters()}
    frozen = sum(p.numel() for p in system.loss.parameters())
    assert frozen > 0
    before = copy.deepcopy(system.loss.state_dict())
    batch = batch_of(1, side=256)
    assert math.isfinite(system.training_step(batch)["mutual_information"])
    assert all(torch.equal(value, before[name]) for name, value in system.loss.state_dict().items())


def test_dcmpnet_has_an_optimizer_for_each_network():
    system = system_of("dcmpnet")
    assert set(system.optimizers) == {"dehazing", "depth"}
    ours = {
        name: {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, optimizer in system.optimizers.items()
    }
    assert ours["depth"] == {id(p) for p in system.depth_network.parameters()}
    assert ours["dehazing"] == {id(p) for p in system.dehazing_network.parameters() if p.requires_grad}
    before = numbers(system)
    values = system.training_step(BATCH)
    after = changed(before, numbers(system))
    assert any(name.startswith("/modules/network/") for name in after)
    assert any(name.startswith("/modules/depth/") for name in after)
    assert values["total"] == pytest.approx(values["dehazing_loss"] + values["depth_loss"])
    assert values["dehazing_gradient_norm"] > 0
    assert values["depth_gradient_norm"] > 0


def test_dcmpnet_gradients_do_not_cross_in_difference_perception():
    def depth_gradients(weight: float) -> dict[str, torch.Tensor]:
        system = system_of("dcmpnet", f"loss.depth_weight={weight}")
        system.backward(BATCH, 1.0)
        return {name: p.grad for name, p in system.depth_network.named_parameters()}

    light, heavy = depth_gradients(0.0), depth_gradients(100.0)
    assert all(torch.equal(light[name], heavy[name]) for name in light)
    assert any(gradient.abs().sum() > 0 for gradient in light.values())


def test_dcmpnet_without_depth_trains_the_dehazing_network_alone():
    system = system_of("dcmpnet", "data.depth=none")
    assert system.depth_network is None
    assert system.batch_names == ("hazy", "clear")
    values = system.training_step(batch_of(2, depth=False))
    assert set(values) == {"total", "dehazing_loss", "restored", "gradient_norm"}


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory):
    """A file as torchvision's, with random weights."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (before, after) in CHANNELS.items():
        weight = torch.randn(after, before, 3, 3, generator=generator)
        state[f"features.{index}.weight"] = weight * (2 / (9 * before)) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(after)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(state, path)
    return path


def test_dcmpnet_takes_the_contrastive_term_and_keeps_vgg_out_of_its_state(vgg_weights):
    overrides = ("loss.contrastive_weight=0.5", f"loss.vgg_weights={vgg_weights}")
    values = step_with_noise(system := system_of("dcmpnet", *overrides))
    plain = step_with_noise(system_of("dcmpnet"))
    assert values["contrastive"] > 0
    assert values["total"] == pytest.approx(plain["total"] + 0.5 * values["contrastive"], rel=1e-5)
    assert not system.state_dict()["modules"]["loss"]
    assert step_with_noise(system_of("dcmpnet", *overrides, "run.precision=bfloat16"))["contrastive"] == pytest.approx(
        values["contrastive"], rel=0.05
    )


def test_dcmpnet_networks_see_images_from_minus_one_to_one():
    system = system_of("dcmpnet")
    seen = []
    system.dehazing_network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    system.training_step(BATCH)
    assert torch.equal(seen[0], 2 * BATCH["hazy"] - 1)


def test_shared_depth_reaches_the_restored_image_and_the_saved_weights():
    system = system_of("dcmpnet", "network.share_depth=true", "run.ema=0.9")
    system.training_step(BATCH)
    assert isinstance(system.network, DepthSharingDCMPNet)
    image = BATCH["hazy"][:1]
    expected = system.network.dehazing.restore(image, system.network.depth.estimate(image))
    assert torch.equal(system.restore(image), expected)
    # one DRDB stands between the map and the image; wake it, so that the map has an effect
    for parameter in system.network.dehazing.depth_block.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    with_depth = system.restore(image)
    torch.nn.init.constant_(system.network.depth.to_depth.bias, 3.0)
    assert not torch.equal(system.restore(image), with_depth)


@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_restore_is_the_networks_own(name):
    system = system_of(name)
    assert type(system.network) is {"mitnet": MITNet, "dcmpnet": DCMPNet}[name]
    image = torch.rand(1, 3, 21, 45)
    assert torch.equal(system.restore(image), system.network.restore(image))
    assert all(module.training for module in system.modules.modules())


def test_parts_of_a_batch_add_up_to_its_gradient():
    batch = batch_of(4)
    whole, parts = (
        system_of("mitnet", "data.batch=4", "loss.mutual_information_weight=0", f"optimizer.accumulate={count}")
        for count in (1, 4)
    )
    sizes = []
    parts.deployed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    expected, actual = whole.training_step(batch), parts.training_step(batch)
    assert sizes == [1, 1, 1, 1]
    assert actual == pytest.approx(expected, rel=2e-5)


def test_parts_of_an_uneven_batch_are_weighted_by_their_samples():
    batch = batch_of(3)
    whole, parts = (system_of("mitnet", "data.batch=4", f"optimizer.accumulate={count}") for count in (1, 2))
    sizes = []
    parts.deployed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    expected, actual = whole.training_step(batch), parts.training_step(batch)
    assert sizes == [2, 1]
    assert actual == pytest.approx(expected, rel=2e-5)


def test_noise_belongs_to_the_step_and_the_place_in_the_batch():
    system = system_of("mitnet")
    whole = system.draw(Share(0, 5, 5))["noise"]
    assert whole.shape == (5, 1, 2, 4)
    assert torch.equal(system.draw(Share(2, 3, 5))["noise"], whole[2:])
    assert torch.equal(system.draw(Share(5, 0, 5))["noise"], whole[:1])
    assert abs(float(system.draw(Share(0, 2000, 2000))["noise"].std()) - 1) < 0.03
    system.training_step(BATCH)
    assert not torch.equal(system.draw(Share(0, 5, 5))["noise"], whole)
    assert system_of("dcmpnet").draw(Share(0, 5, 5)) == {}


def test_clipping_limits_what_the_optimizer_sees():
    norms = []

    def measure(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    for overrides in ((), ("optimizer.clip=0.01",), ("optimizer.clip=1000",)):
        system = system_of("mitnet", *overrides)
        system.optimizers["restoration"].register_step_pre_hook(measure)
        norms.append(system.training_step(BATCH)["gradient_norm"])
    unclipped, reported, clipped, reported_clipped, loose, _ = norms
    assert reported == reported_clipped == pytest.approx(unclipped)
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert loose == unclipped
    assert unclipped > 0.1


def test_averaged_weights_follow_the_weights():
    system = system_of("dcmpnet", "run.ema=0.75", "data.depth=none")
    average = None
    for _ in range(3):
        system.training_step(BATCH)
        now = {name: value.double() for name, value in system.deployed.state_dict().items()}
        average = now if average is None else {name: 0.75 * average[name] + 0.25 * now[name] for name in now}
    for name, value in system.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    image = BATCH["hazy"][:1]
    assert torch.equal(system.restore(image), system.network.restore(image))
    assert not torch.equal(system.restore(image), system.deployed.restore(image))
    assert any("running_mean" in name for name in average)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (("schedule.kind=halve", "schedule.halve_every=2"), [1, 1, 0.5, 0.5, 0.25]),
        (("schedule.kind=constant",), [1, 1, 1, 1, 1]),
        (
            ("schedule.kind=cosine", "schedule.cosine_minimum=0"),
            [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(5)],
        ),
    ],
)
def test_the_learning_rate_follows_the_epochs(schedule, expected):
    system = system_of("dcmpnet", "run.epochs=4", *schedule)
    rates = []
    for _ in range(5):
        rates.append(system.learning_rate / 1e-4)
        assert {o.param_groups[0]["lr"] for o in system.optimizers.values()} == {system.learning_rate}
        system.end_epoch()
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_a_step_that_is_not_finite_leaves_no_trace(name, broken):
    system = system_of(name, "run.ema=0.9", "optimizer.clip=1")
    system.training_step(BATCH)
    before = numbers(system)
    hazy = BATCH["hazy"].clone()
    hazy[1, 2, 3, 4] = broken
    values = system.training_step({**BATCH, "hazy": hazy})
    assert not math.isfinite(values["total"])
    assert changed(before, numbers(system)) == {"/steps", "/skipped", "/skipped_in_a_row"}
    assert (system.skipped, system.skipped_in_a_row) == (1, 1)
    system.training_step(BATCH)
    assert (system.skipped, system.skipped_in_a_row) == (1, 0)


def test_a_gradient_that_is_not_finite_skips_the_step():
    system = system_of("mitnet")
    system.training_step(BATCH)
    weight = next(system.deployed.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    before = numbers(system)
    values = system.training_step(BATCH)
    assert math.isfinite(values["total"])
    assert math.isnan(values["gradient_norm"])
    assert changed(before, numbers(system)) == {"/steps", "/skipped", "/skipped_in_a_row"}


def test_many_steps_that_are_not_finite_end_the_training_with_advice():
    system = system_of("mitnet", "run.max_nonfinite=3", "run.precision=bfloat16")
    broken = {**BATCH, "hazy": torch.full_like(BATCH["hazy"], math.nan)}
    for _ in range(2):
        system.training_step(broken)
    system.training_step(BATCH)
    for _ in range(2):
        system.training_step(broken)
    with pytest.raises(TrainingDiverged) as error:
        system.training_step(broken)
    for part in ("3 steps in a row", "total", "optimizer.clip=1", "optimizer.lr=0.0001", "run.precision=float32"):
        assert part in str(error.value)
    assert system.skipped == 5


def test_bfloat16_computes_in_half_precision_and_keeps_weights_in_full():
    totals, kinds = [], []
    for precision in ("float32", "bfloat16"):
        system = system_of("mitnet", f"run.precision={precision}")
        stem = system.deployed.amplitude_stem
        handle = stem.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
        totals.append(step_with_noise(system)["total"])
        handle.remove()
        assert {value.dtype for value in system.deployed.state_dict().values()} == {torch.float32}
        assert system.restore(BATCH["hazy"]).dtype == torch.float32
    assert kinds == [torch.float32, torch.bfloat16]
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.03)


@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_channels_last_changes_the_memory_format_and_not_the_numbers(name):
    plain, last = system_of(name, "run.channels_last=false"), system_of(name)
    weights = [p for p in last.deployed.parameters() if p.dim() == 4 and min(p.shape) > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    seen = []
    last.deployed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert step_with_noise(last) == pytest.approx(step_with_noise(plain), rel=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    image = BATCH["hazy"][:1]
    torch.testing.assert_close(last.restore(image), plain.restore(image), rtol=1e-3, atol=1e-4)


def test_8_bit_samples_are_scaled_on_the_device():
    samples = {name: (255 * value).round().to(torch.uint8) for name, value in BATCH.items() if name != "depth"}
    scaled = {name: value.float() / 255 for name, value in samples.items()}
    first, second = system_of("mitnet"), system_of("mitnet")
    expected = step_with_noise(first, scaled)
    assert step_with_noise(second, samples) == expected


@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_training_starts_from_given_weights(name, tmp_path):
    first = system_of(name, seed=1)
    file = save_weights(tmp_path / "weights.safetensors", first.network)
    second = system_of(name, f"run.weights={file}", "run.ema=0.9", seed=2)
    image = BATCH["hazy"][:1]
    assert torch.equal(second.restore(image), first.restore(image))
    with pytest.raises(ConfigError, match=r"run\.weights: .* the run trains"):
        system_of("mitnet", f"run.weights={file}", "network.width=6")


def assert_compiled_as_plain(name: str, backend: str):
    plain, compiled = system_of(name), system_of(name, f"run.compile={backend}", "run.ema=0.9")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert step_with_noise(compiled) == pytest.approx(step_with_noise(plain), rel=1e-3)
    for size in (21, 30):  # every size would be compiled anew, so none is
        assert compiled.restore(torch.rand(1, 3, size, size)).shape == (1, 3, size, size)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_network_is_one_graph_for_the_patches():
    assert_compiled_as_plain("mitnet", "eager")


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_every_compiler_backend_trains_the_same_network(name, backend):
    assert_compiled_as_plain(name, backend)


def test_a_batch_without_what_the_loss_needs_is_an_error():
    with pytest.raises(ValueError, match="batch: depth missing, it holds hazy, clear"):
        system_of("dcmpnet").training_step(batch_of(2, depth=False))


def test_patches_that_dcmpnet_cannot_take_are_an_error():
    with pytest.raises(ConfigError, match=r"data\.patch: got 16, the network needs"):
        build_system(small_config("dcmpnet", "data.patch=16"), CPU)


def test_the_state_continues_in_another_system():
    first = system_of("dcmpnet", "run.ema=0.9", seed=1)
    first.training_step(BATCH)
    first.end_epoch()
    second = system_of("dcmpnet", "run.ema=0.9", seed=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for system in (first, second):
        step_with_noise(system)
        system.end_epoch()
    assert changed(tensors(first.state_dict()), tensors(second.state_dict())) == set()
