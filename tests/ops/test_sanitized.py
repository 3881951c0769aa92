"""The CPU kernels of every family under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

from mitnet_fast import _C

ROOT = Path(__file__).parent.parent.parent
# those that this processor can run
CAPABILITY_FLAGS = dict(
    list(
        {
            "DEFAULT": [],
            "AVX2": ["-mavx2", "-mfma", "-mf16c"],
            "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
        }.items()
    )[: 1 + ["DEFAULT", "AVX2", "AVX512"].index(_C.cpu_capability())]
)
CALLS = {  # of each seed
    "amplitude_phase": 60,
    "conv_relu": 60,
    "dense_block": 30,
    "dynamic_filter": 100,
    "feature_mixing": 60,
    "normalized_qkv": 40,
    "residual_conv": 40,
    "window_attention": 60,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", CAPABILITY_FLAGS)
@pytest.mark.parametrize("kernels", CALLS)
def test_sanitizers_find_nothing(tmp_path, kernels, capability):
    """No access outside of what maps, spectra and workspace hold, nothing undefined, no element left unwritten."""
    program = tmp_path / "sanitized"
    source = Path(__file__).with_name(f"{kernels}_sanitized.cpp")
    libraries = Path(torch.__file__).parent / "lib"
    command = [
        *(get_cxx_compiler(), "-std=c++20", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover"),
        *(f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *CAPABILITY_FLAGS[capability]),
        *(f"-I{folder}" for folder in (ROOT / "csrc", *include_paths())),
        *(source, "-o", program, f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"),
    ]
    subprocess.run(command, check=True)
    for seed in range(3):
        run = subprocess.run([program, str(seed), str(CALLS[kernels])], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
