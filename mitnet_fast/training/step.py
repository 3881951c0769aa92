"""Running a step of training as one CUDA graph: recorded once, started with one call from then on.

A step consists of a thousand and more short kernels; launched one by one, the GPU waits for the CPU
wherever launching takes longer than computing. A graph holds them all, with the memory they work in, so a
step is copying the batch to where the graph reads it, and one launch. What a recorded step may do is what
:meth:`~mitnet_fast.training.systems.System.step` keeps to: the same shapes every time, nothing read back
by the CPU, random numbers and learning rate among its inputs, decisions taken on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from .distributed import Processes

WARM_UP = 3  # steps before the recording, in its shapes: kernels are chosen and compiled, optimizers make their state
Inputs = Mapping[str, torch.Tensor]
Shapes = frozenset[tuple[str, torch.Size, torch.dtype]]
Step = Callable[[Inputs], torch.Tensor]


class Recorder(Protocol):
    """What :class:`GraphedStep` needs of a graph."""

    def warm_up(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a call as it will be recorded, and return its result."""

    def record(self, call: Callable[[], torch.Tensor]) -> None:
        """Record a call without running it."""

    def replay(self) -> torch.Tensor:
        """Run what was recorded, and return the result, which the next replay overwrites."""


class CudaGraph:
    """One recorded call on the current GPU, warmed up on the stream that it is recorded on."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._graph = torch.cuda.CUDAGraph()
        self._result: torch.Tensor | None = None

    def warm_up(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See :class:`Recorder`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, call: Callable[[], torch.Tensor]) -> None:
        """See :class:`Recorder`."""
        # thread_local: meanwhile the loader's thread may allocate and copy the next batch
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._result = call()

    def replay(self) -> torch.Tensor:
        """See :class:`Recorder`."""
        self._graph.replay()
        return self._result


def why_no_graph(device: torch.device, processes: Processes) -> str | None:
    """What stands against recording a step, or None."""
    if device.type != "cuda":
        return f"the run computes on {device.type}, and graphs are recorded on CUDA devices only"
    if processes.size > 1:
        return f"{processes.size} processes average their gradients, and messages between them are not recorded"
    return None


class GraphedStep:
    """A step that records itself after :data:`WARM_UP` calls, and is replayed from then on.

    The calls before are steps like all others. They are counted for inputs of the same shapes and types, so
    that what is recorded is not the short last batch of an epoch because it happens to come fourth. Where
    recording fails, and for inputs of other shapes or types than the recorded ones, the step runs call by
    call, with the same result.

    Args:
        step: what to record; it works on tensors that stay where they are, and on its inputs.
        recorder: of the graph.
        say: told once why steps run call by call.
    """

    def __init__(self, step: Step, recorder: Recorder, say: Callable[[str], None]) -> None:
        self._step = step
        self._recorder = recorder
        self._say = say
        self._warm_ups: Counter[Shapes] = Counter()
        self._inputs: dict[str, torch.Tensor] | None = None
        self._failed = self._said_other_shapes = False

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Run the step.

        Args:
            inputs: what changes from step to step, on the device.

        Returns:
            What the step returns, in memory that the next call may overwrite.
        """
        if self._inputs is None and not self._failed:
            shapes = _shapes(inputs)
            if self._warm_ups[shapes] < WARM_UP:
                self._warm_ups[shapes] += 1
                return self._recorder.warm_up(lambda: self._step(inputs))
            self._record(inputs)
        if self._failed or not self._fit(inputs):
            return self._step(inputs)
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        return self._recorder.replay()

    def _record(self, inputs: Inputs) -> None:
        static = {name: value.clone() for name, value in inputs.items()}  # clone keeps the memory format
        try:
            self._recorder.record(lambda: self._step(static))
        except RuntimeError as error:
            self._failed = True
            self._say(f"the step cannot be recorded as a CUDA graph and runs call by call: {_first_line(error)}")
        else:
            self._inputs = static

    def _fit(self, inputs: Inputs) -> bool:
        fit = _shapes(inputs) == _shapes(self._inputs)
        if not fit and not self._said_other_shapes:
            self._said_other_shapes = True
            self._say("batches of other shapes than the recorded one run call by call")
        return fit


def _shapes(inputs: Inputs) -> Shapes:
    return frozenset((name, value.shape, value.dtype) for name, value in inputs.items())


def _first_line(error: BaseException) -> str:
    """Of the first of a chain of errors: one within a recording is followed by that of ending it."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)
