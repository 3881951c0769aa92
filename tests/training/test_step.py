"""Recorded and compiled steps: what is replayed is what eager steps compute, and what cannot be recorded is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mitnet_fast.training import build_system
from mitnet_fast.training.distributed import Processes
from mitnet_fast.training.step import WARM_UP, GraphedStep, why_no_graph

from .samples import batch_of, small_config
from .test_systems import changed, numbers

CPU = torch.device("cpu")
BATCHES = [batch_of(2), batch_of(4)]
BATCHES[1] = {name: value[2:] for name, value in BATCHES[1].items()}


class Recording(TorchDispatchMode):
    """Every operator that runs, with the tensors it ran on, as a CUDA graph holds kernels and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh):
            raise RuntimeError("operation not permitted when stream is capturing")  # waits for the device
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, new_tensors(func, results)))
        return results


def new_tensors(func, results) -> list[torch.Tensor]:
    """Those results of an operator that are neither views nor arguments."""
    returns = func._schema.returns
    by_return = results if len(returns) > 1 else [results] * len(returns)
    new = [result for result, returned in zip(by_return, returns, strict=True) if returned.alias_info is None]
    return [leaf for leaf in tree_leaves(new) if isinstance(leaf, torch.Tensor)]


class OperatorGraph:
    """A recorder for the CPU: replays operators on the very tensors of the recording, and no Python between them."""

    def __init__(self) -> None:
        self.calls = []
        self.warm_ups = self.replays = 0

    def warm_up(self, call):
        self.warm_ups += 1
        return call()

    def record(self, call):
        with Recording() as recording:
            self.result = call()
        self.calls = recording.calls

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return self.result  # here, other than on a GPU, recording has run the step
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(recorded, new_tensors(func, func(*args, **kwargs)), strict=True):
                old.copy_(new)
        return self.result


def system_of(name: str, *overrides: str, device: torch.device = CPU):
    torch.manual_seed(0)
    return build_system(small_config(name, "run.ema=0.9", "optimizer.clip=1", *overrides), device)


def recorded(system, recorder=None):
    """The same system, its steps recorded; and what it says."""
    said = []
    system.say = said.append
    system._run_step = GraphedStep(system.step, recorder or OperatorGraph(), system.say)
    return said


def train(system, steps: int = WARM_UP + 5) -> list[dict[str, float]]:
    """Steps on two batches in turn, an epoch that ends after a recording, and a step that is not finite."""
    torch.manual_seed(1)
    values = []
    for step in range(steps):
        batch = BATCHES[step % 2]
        if step == WARM_UP + 2:
            system.end_epoch()
            batch = {**batch, "hazy": batch["hazy"] * math.nan}
        values.append(system.training_step(batch))
    return values


def as_text(values: list[dict[str, float]]) -> str:
    return repr(values)  # NaN equals itself there, and floats are exact


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mitnet", ("schedule.halve_every=1", "network.decoder_spectral=true")),
        ("mitnet", ("optimizer.accumulate=2", "run.precision=bfloat16")),
        ("dcmpnet", ("run.epochs=3", "run.channels_last=false")),
        ("dcmpnet", ("loss.mode=official", "network.share_depth=true")),
    ],
)
def test_a_recorded_step_computes_what_eager_steps_do(name, overrides, monkeypatch):
    monkeypatch.setenv("MITNET_FAST_BACKEND", "reference")  # what CUDA computes with by default
    eager, graphed = system_of(name, *overrides), system_of(name, *overrides)
    said = recorded(graphed, graph := OperatorGraph())
    expected = train(eager)
    assert as_text(train(graphed)) == as_text(expected)
    assert changed(numbers(eager), numbers(graphed)) == set()
    assert said == []
    assert graph.replays == 5
    assert eager.skipped == graphed.skipped == 1
    assert eager.skipped_in_a_row == graphed.skipped_in_a_row == 0
    assert sum(math.isnan(values["total"]) for values in expected) == 1


def test_a_recorded_step_follows_8_bit_samples():
    samples = [{k: (255 * v).round().to(torch.uint8) for k, v in b.items() if k != "depth"} for b in BATCHES]
    eager, graphed = system_of("mitnet"), system_of("mitnet")
    said = recorded(graphed)
    for system in (eager, graphed):
        torch.manual_seed(1)
        for step in range(WARM_UP + 3):
            system.training_step(samples[step % 2])
    assert said == []
    assert changed(numbers(eager), numbers(graphed)) == set()


def test_a_step_that_cannot_be_recorded_runs_call_by_call_and_says_why_once():
    eager, graphed = system_of("mitnet"), system_of("mitnet")
    for system in (eager, graphed):
        losses = system.losses
        system._losses = lambda batch, losses=losses: (batch["hazy"].sum().item(), losses(batch))[1]
    said = recorded(graphed, graph := OperatorGraph())
    assert as_text(train(graphed)) == as_text(train(eager))
    assert changed(numbers(eager), numbers(graphed)) == set()
    assert said == [
        "the step cannot be recorded as a CUDA graph and runs call by call: operation not permitted when stream is "
        "capturing"
    ]
    assert graph.replays == 0


def test_batches_of_other_shapes_run_call_by_call():
    eager, graphed = system_of("mitnet"), system_of("mitnet")
    said = recorded(graphed, graph := OperatorGraph())
    small = batch_of(1)
    for system in (eager, graphed):
        torch.manual_seed(1)
        for batch in [BATCHES[0]] * (WARM_UP + 1) + [small, BATCHES[1], small, BATCHES[0]]:
            system.training_step(batch)
    assert changed(numbers(eager), numbers(graphed)) == set()
    assert said == ["batches of other shapes than the recorded one run call by call"]
    assert graph.replays == 3


OTHER_SHAPES = ["batches of other shapes than the recorded one run call by call"]


@pytest.mark.parametrize(
    ("order", "warm_ups", "replays", "messages"),
    [
        ("FFFSFFFS", 3 + 1, 3, OTHER_SHAPES),  # four batches an epoch: the short one is call WARM_UP + 1
        ("FSFSFSFSFS", 3 + 3, 2, OTHER_SHAPES),  # two
        ("SFFFF", 1 + 3, 1, []),  # resumed before the last batch of an epoch
        ("FFBFF", 3 + 1, 1, []),
        ("FFFBFB", 3 + 1, 1, OTHER_SHAPES),
        ("FSB", 1 + 1 + 1, 0, []),
        ("SFSFSSF", 3 + 2, 1, OTHER_SHAPES),  # whichever comes often enough first
    ],
)
def test_what_is_recorded_has_been_warmed_up_in_its_own_shapes(order, warm_ups, replays, messages):
    full = BATCHES[0]
    eight_bit = {k: v if k == "depth" else (255 * v).round().to(torch.uint8) for k, v in full.items()}
    batches = {"F": full, "S": batch_of(1), "B": eight_bit}
    eager, graphed = system_of("mitnet"), system_of("mitnet")
    said = recorded(graphed, graph := OperatorGraph())
    expected, actual = ([system.training_step(batches[k]) for k in order] for system in (eager, graphed))
    assert as_text(actual) == as_text(expected)
    assert changed(numbers(eager), numbers(graphed)) == set()
    assert (graph.warm_ups, graph.replays, said) == (warm_ups, replays, messages)


def test_a_loaded_state_is_recorded_anew():
    first, second = system_of("mitnet"), system_of("mitnet")
    recorded(second)
    for system in (first, second):
        train(system)
    second.load_state_dict(first.state_dict())
    assert second._run_step is None


def test_what_stands_against_recording():
    cuda = torch.device("cuda")
    assert why_no_graph(CPU, Processes()) == ("the run computes on cpu, and graphs are recorded on CUDA devices only")
    assert why_no_graph(cuda, Processes(0, 4)).startswith("4 processes average their gradients")
    assert why_no_graph(cuda, Processes()) is None


@pytest.mark.parametrize("device", [CPU, *(torch.device("cuda", i) for i in range(torch.cuda.device_count())[:1])])
@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_a_graph_asked_for_is_recorded_where_it_can_be(name, device):
    eager, asked = (system_of(name, f"run.step={step}", device=device) for step in ("eager", "cuda_graph"))
    said = []
    asked.say = said.append
    for expected, actual in zip(train(eager), train(asked), strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, nan_ok=True)
    if device == CPU:
        assert len(said) == 1
        assert said[0].startswith("run.step: cuda_graph is not possible here, steps run call by call: the run computes")
        assert changed(numbers(eager), numbers(asked)) == set()
    else:
        assert said == []
        assert asked._run_step._inputs is not None
        assert asked.skipped == eager.skipped == 1


def test_what_is_not_possible_is_a_warning_where_nobody_else_listens():
    system = system_of("mitnet", "run.step=cuda_graph")
    with pytest.warns(UserWarning, match=r"run\.step: cuda_graph is not possible here"):
        system.training_step(BATCHES[0])


def assert_compiled_step_is_one_graph(name: str, backend: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = system_of(name), system_of(name, "run.step=compile", f"run.compile={backend}")
    said = []
    compiled.say = said.append
    for expected, values in zip(train(eager, 3), train(compiled, 3), strict=True):
        assert values == pytest.approx(expected, rel=1e-3)
    assert said == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_step_is_one_graph_and_the_same_step():
    assert_compiled_step_is_one_graph("mitnet", "eager")


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mitnet", "dcmpnet"])
def test_every_compiler_backend_takes_the_step(name, backend):
    assert_compiled_step_is_one_graph(name, backend)


def test_a_step_that_does_not_compile_runs_uncompiled_and_says_so(monkeypatch):
    def compile_nothing(function, **_):
        def fail(batch):
            function(batch)  # statistics have moved on when it fails
            raise RuntimeError("no compiler\nand more")

        return fail

    eager, asked = system_of("dcmpnet"), system_of("dcmpnet", "run.step=compile")
    said = []
    asked.say = said.append
    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert as_text(train(asked)) == as_text(train(eager))
    assert changed(numbers(eager), numbers(asked)) == set()
    assert said == ["run.step: steps do not compile and run as they are: RuntimeError: no compiler"]
