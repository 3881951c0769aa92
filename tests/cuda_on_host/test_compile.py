"""The CUDA kernels compile ahead of time, without a GPU, and fit."""

import re

import pytest

from benchmarks import resources

# what a block may opt into on every GPU of compute capability 8.0 and newer (8.6 has the least)
SHARED_BYTES = 99 * 1024


def check(rows, arch):
    for row in rows:
        assert row.architecture == f"sm_{arch}"
        assert 16 <= row.registers <= 255
        assert 0 <= row.shared_bytes < 227 * 1024
        assert row.warps in (4, 8)


def unfit(rows):
    """What a network runs, K = 3, has neither spills nor a block that does not fit."""
    hot = [row for row in rows if re.search(r"Products(<\w+>)?, 3,|_kernel<3,", row.kernel)]
    return hot, [row for row in hot if row.spilled_bytes or row.shared_bytes > SHARED_BYTES]


if resources.find_nvcc():

    def test_kernels_compile_for_hopper_without_spilling():
        source = resources.CSRC / "dynamic_filter" / "predicted_dynamic_filter_tf32.cu"
        rows = list(resources.cuda_rows(90, [source]))
        check(rows, 90)
        assert {row.kernel.partition("<")[0] for row in rows} == {
            *("prepare_kernel", "predicted_forward_kernel", "predicted_backward_kernel", "sum_rows_kernel"),
        }
        hot, failed = unfit(rows)
        assert len(hot) == 6
        assert not failed

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("arch", resources.ARCHITECTURES)
    def test_every_kernel_compiles_for_every_architecture(arch):
        rows = list(resources.cuda_rows(arch, resources.cuda_sources(every=True)))
        check(rows, arch)
        hot, failed = unfit(rows)
        assert len(hot) == 33
        assert not failed
