"""Steps replayed from a CUDA graph are held against eager ones, and nothing but agreement passes."""

import math
from dataclasses import replace

import pytest

from benchmarks import graph_steps, models
from mitnet_fast.ops import BackendError

SMALL_MITNET = ("mitnet-its", "network.width=4", "network.depth=2")
STEP = {"total": 2.0, "restored": 0.5, "gradient_norm": 1.0}
EVERY_PAIR = [(network, name) for network in models.NETWORKS for name in models.GRAPHED]


def exit_code(monkeypatch, replayed_losses) -> int:
    """Of the command, where eager steps have the losses :data:`STEP` and replayed ones those that are given."""

    def losses(network, implementation, device):
        assert device == "cuda"
        if implementation.step == "eager":
            return [STEP] * graph_steps.STEPS
        return replayed_losses(network, implementation)

    monkeypatch.setattr(graph_steps, "losses", losses)
    with pytest.raises(SystemExit) as end:
        graph_steps.main()
    return int(end.value.code)


def test_steps_are_the_same_in_every_run(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setattr(graph_steps, "SIDE", 16)
    once, again = (graph_steps.losses("MITNet", models.IMPLEMENTATIONS["plain"], "cpu") for _ in range(2))
    assert once == again
    assert [graph_steps.difference(*pair) for pair in zip(once, again, strict=True)] == [0] * graph_steps.STEPS


def test_steps_that_cannot_be_recorded_are_not_replaced_by_eager_ones(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "MITNet", SMALL_MITNET)
    monkeypatch.setattr(graph_steps, "SIDE", 16)
    with pytest.raises(RuntimeError, match="the run computes on cpu"):
        graph_steps.losses("MITNet", models.GRAPHED["fused, CUDA graph"], "cpu")


def test_the_difference_is_that_of_the_worst_term():
    assert graph_steps.difference(STEP, STEP) == 0
    assert graph_steps.difference(STEP | {"restored": 0.51, "total": 2.01}, STEP) == pytest.approx(0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", STEP)
def test_no_difference_from_what_is_not_finite_is_small(name, value):
    broken = STEP | {name: value}
    for pair in ((broken, STEP), (STEP, broken), (broken, broken)):
        assert not graph_steps.difference(*pair) <= graph_steps.STEPS_DIFFER


@pytest.mark.parametrize("name", STEP)
def test_other_terms_are_an_infinite_difference(name):
    fewer = {key: value for key, value in STEP.items() if key != name}
    assert graph_steps.difference(fewer, STEP) == graph_steps.difference(STEP, fewer) == math.inf


def test_every_implementation_that_is_timed_is_held_against_the_same_run_eagerly(monkeypatch, capsys):
    calls = []

    def losses(network, implementation, device):
        calls.append((network, implementation, device))
        return [STEP] * graph_steps.STEPS

    monkeypatch.setattr(graph_steps, "losses", losses)
    with pytest.raises(SystemExit) as end:
        graph_steps.main()
    assert not end.value.code
    assert calls == [
        (network, each, "cuda")
        for network in models.NETWORKS
        for graphed in models.GRAPHED.values()
        for each in (replace(graphed, step="eager"), graphed)
    ]
    lines = [f"{network}, {name}, step {step}: " for network, name in EVERY_PAIR for step in range(graph_steps.STEPS)]
    for line, expected in zip(capsys.readouterr().out.splitlines(), lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("step", [0, graph_steps.STEPS - 1])
@pytest.mark.parametrize("wrong", [{"restored": math.nan}, {"total": math.nan}, {"restored": 0.51}])
@pytest.mark.parametrize(("network", "name"), EVERY_PAIR)
def test_one_wrong_term_of_one_step_fails(network, name, wrong, step, monkeypatch):
    def losses(*run):
        values = [STEP] * graph_steps.STEPS
        if run == (network, models.GRAPHED[name]):
            values[step] = STEP | wrong
        return values

    assert exit_code(monkeypatch, losses) == 1


def test_an_implementation_that_cannot_run_fails_and_leaves_the_others_standing(monkeypatch, capsys):
    def losses(network, implementation):
        if implementation == models.GRAPHED["fused, CUDA graph"]:
            raise BackendError("backend 'cpp' cannot run this call: built without CUDA")
        return [STEP] * graph_steps.STEPS

    assert exit_code(monkeypatch, losses) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "MITNet, fused, CUDA graph: backend 'cpp' cannot run this call: built without CUDA" in lines
    assert len(lines) == 4 * graph_steps.STEPS + 2
