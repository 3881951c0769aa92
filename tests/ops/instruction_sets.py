"""The same calls under narrower instruction sets than the processor's, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mitnet_fast import _C

every_narrower_set = pytest.mark.parametrize(
    ("wanted", "narrower"), [("default", ["DEFAULT"]), ("avx2", ["DEFAULT", "AVX2"])]
)


def assert_nothing_fails(code: str, wanted: str, narrower: list[str]) -> None:
    """Run ``code``, which prints the instruction set and then a line for every failure."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": wanted}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    capability, *failed = answer.stdout.split("\n")
    assert not any(failed), failed
    assert capability == narrower[-1] or _C.cpu_capability() in narrower
