"""Every Triton kernel compiles ahead of time, without a GPU, and fits."""

import json
import os
import subprocess
import sys

import pytest

# what a program may have on every GPU of compute capability 8.0 and newer (8.6 has the least)
SHARED_BYTES = 99 * 1024
KERNELS = {
    "filter_kernel",
    "filter_kernel_transposed",
    "grad_filters_kernel",
    "predicted_filter_kernel",
    "predicted_filter_kernel_transposed",
    "grad_features_kernel",
    "grad_weight_kernel",
    "forward_kernel",
    "grad_spectrum_kernel",
    "grad_map_kernel",
    "grad_output_weight_kernel",
    "window_attention_kernel",
    "window_attention_backward_kernel",
    "gather_bands_kernel",
    "grad_bias_table_kernel",
    "mlp_kernel",
    "mlp_grad_x_kernel",
    "mlp_sums_kernel",
    "product_kernel",
    "product_kernel_transposed",
    "product_sums_kernel",
    "mixing_kernel",
    "mixing_sums_kernel",
    "grad_value_kernel",
    "moments_kernel",
    "normalized_qkv_kernel",
    "normalized_qkv_grad_x_kernel",
    "convolution_kernel",
    "convolution_kernel_transposed",
    "weight_sums_kernel",
}


def resources(tmp_path, *arguments):
    """Rows of the command, run where nothing is interpreted and nothing is compiled yet."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "mitnet_fast.triton_kernels.ahead_of_time", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path):
    rows = resources(tmp_path, "--architecture", "90")
    assert {row["kernel"].split()[0] for row in rows} == KERNELS
    assert len({row["kernel"] for row in rows}) == len(rows) == 90
    for row in rows:
        assert row["arch"] == 90
        assert 16 <= row["registers"] <= 255
        assert row["spills"] == 0, row
        assert 0 <= row["shared_bytes"] <= SHARED_BYTES
        assert row["num_warps"] in (4, 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_launch_compiles_for_every_architecture(tmp_path, architecture):
    rows = resources(tmp_path, "--architecture", str(architecture), "--every")
    assert {row["kernel"].split()[0] for row in rows} == KERNELS
    assert {word for row in rows for word in row["kernel"].split() if "=" in word} == {
        *("C=20", "C=40", "C=80", "C=160"),
        *("K=1", "K=3", "K=5", "K=7"),
        *("C=24", "C=64", "C=96", "d=12", "d=16", "d=24", "d=32", "d=64", "w=4", "w=7", "w=8", "w=16"),
        *("C=3", "C=48", "G=32", "C=20+20→20", "C=80+80→80", "C=80+0→160", "C=64+64→64"),
    }
    assert len(rows) == 556
    large = [row["kernel"] for row in rows if row["shared_bytes"] > SHARED_BYTES]
    assert all(" d=32 w=16 tf32 " in kernel for kernel in large), large  # compute capability 8.0, 9.0 and 10.0 hold it
    assert max(row["shared_bytes"] for row in rows) <= 163 * 1024
    hot = (" K=3 ", "C=20 amplitude", "C=20 phase", "C=40 amplitude", "C=40 phase", "d=12 w=8", "G=32", "→")
    hot += (" pointwise_mlp ", " local_mixing ", " local_global_mixing ", " normalized_qkv ")
    assert not [row for row in rows if row["spills"] and any(words in row["kernel"] for words in hot)]


@pytest.mark.exhaustive
def test_a_kernel_that_spills_is_reported(tmp_path):
    code = (
        "from dataclasses import replace; from mitnet_fast.triton_kernels import ahead_of_time as a;"
        "kernel = next(k for k in a.kernels(90) if k.name.startswith('grad_weight_kernel'));"
        "constants = kernel.launch.constants | {'num_warps': 1, 'BLOCK_R': 256};"
        "kernel = replace(kernel, launch=replace(kernel.launch, constants=constants));"
        "print(a.usage(a.compile_kernel(kernel, 90))[1])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert int(printed) > 1000  # bytes for each thread: one warp has too few registers for that tile
