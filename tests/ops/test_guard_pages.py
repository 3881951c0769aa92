"""Kernels for the CPU, compiled and plain, on tensors with no memory beside them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

TOUCH = """
import ctypes, torch
x = torch.zeros(1024)
begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
place = {place}
ctypes.c_float.from_address(place).value = 1.0
"""
VERIFY = """
from dataclasses import replace
from mitnet_fast import verify
from mitnet_fast.specs import SPECS

verify.SPECS = [replace(spec, cases=({cases})) for spec in SPECS]
for backend in ("cpp", "reference"):
    verification = verify.verify(backend=backend, devices=["cpu"], random_cases={random_cases})
    assert verification.passed, verification.failures
"""
DENSE_BLOCK = """
from dataclasses import replace
import torch
from mitnet_fast.specs import SPECS, compare

spec = next(spec for spec in SPECS if spec.name == "dense_block")
sizes = {{"batch": 1, "channels": {channels}, "growth": {growth}, "height": 37, "width": 130}}
case = replace(spec.typical, sizes=sizes, dtype=torch.bfloat16, layout="channels_last")
assert all(comparison.passed for comparison in compare(spec, case, "reference"))
"""
either_side = pytest.mark.parametrize("side", ["behind", "before"])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Runs code where every tensor's memory has a guard page behind or before it."""
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    source = Path(__file__).with_name("guard_pages.c")
    command = [get_cxx_compiler(), "-x", "c", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library]
    subprocess.run(command, check=True)

    def run(code, side="behind"):
        environment = os.environ | {"LD_PRELOAD": str(library), "GUARD_PAGES": side}
        command = [sys.executable, "-X", "faulthandler", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.mark.parametrize(
    ("place", "side"), [("end", "behind"), ("begin - 4", "before"), ("begin; del x", "behind")], ids=str
)
def test_what_lies_beyond_a_tensor_cannot_be_touched(guarded, place, side):
    assert guarded(TOUCH.format(place="begin"), side).returncode == 0
    assert guarded(TOUCH.format(place="end - 4"), side).returncode == 0
    assert guarded(TOUCH.format(place=place), side).returncode == -signal.SIGSEGV


@either_side
def test_no_kernel_touches_what_lies_beyond_a_tensor(guarded, side):
    run = guarded(VERIFY.format(cases="spec.typical,", random_cases=3), side)
    assert run.returncode == 0, run.stderr


@pytest.mark.exhaustive
@either_side
def test_no_kernel_touches_what_lies_beyond_a_tensor_in_any_case(guarded, side):
    run = guarded(VERIFY.format(cases="*spec.cases,", random_cases=20), side)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("channels", "growth"), [(20, 4), (24, 32)])
def test_gradients_of_plain_dilated_convolutions_read_nothing_beyond_their_memory(guarded, channels, growth):
    """oneDNN does where they are bfloat16 in channels_last, by up to megabytes."""
    run = guarded(DENSE_BLOCK.format(channels=channels, growth=growth))
    assert run.returncode == 0, run.stderr
