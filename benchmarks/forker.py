"""A process that has imported the benchmarks and computed nothing, and forks another for every request.

Started by :func:`.measure.in_new_process`. A fork takes milliseconds where a new interpreter takes seconds, and has
as little behind it: no threads, no memory that was used and given back.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from typing import BinaryIO

import torch._dynamo  # noqa: F401 (which an optimizer or an operator would import first in every fork)

from . import models, ops, scaling  # noqa: F401 (what the forks need)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, (module, function, arguments) each, by (result, error) until there are no more."""
    while True:
        try:
            module, function, arguments = pickle.load(requests)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            try:
                outcome = getattr(importlib.import_module(module), function)(*arguments), None
            except Exception as error:
                outcome = None, f"{type(error).__name__}: {error}"
            pickle.dump(outcome, answers)
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            pickle.dump((None, f"the process ended with status {status}, most often for want of memory"), answers)
            answers.flush()


if __name__ == "__main__":
    answering = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    serve(sys.stdin.buffer, answering)
