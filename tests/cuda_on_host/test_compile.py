"""The CUDA kernels compile ahead of time, without a GPU, and fit."""

import re

import pytest

from benchmarks import resources

# what a block may opt into on every GPU of compute capability 8.0 and newer (8.6 has the least)
SHARED_BYTES = 99 * 1024
# for whole images: on GPUs of data centers
SHARED_BYTES_OF_COLUMNS = 163 * 1024
# what MITNet and DCMPNet run in their first level, one source for each family
FIRST_LEVEL = {
    "dynamic_filter": (
        "predicted_dynamic_filter_cuda.cuh",
        "predicted_forward_kernel<Narrow<Tf32Products>>",
        "predicted_backward_kernel<Narrow<Tf32Products>>",
    ),
    "amplitude_phase": (
        "spectral_kernels.cuh",
        "spectral_forward_kernel<true, true>",
        "spectral_backward_kernel<true, true>",
    ),
    "window_attention": (
        "window_attention_kernels.cuh",
        "window_attention_forward_kernel<HalfAttention<__nv_bfloat16>, 16>",
        "window_attention_backward_kernel<HalfAttention<__nv_bfloat16>, 16>",
    ),
}


def check(rows, arch):
    for row in rows:
        assert row.architecture == f"sm_{arch}"
        assert 8 <= row.registers <= 255
        assert row.shared_bytes <= (SHARED_BYTES_OF_COLUMNS if "columns_kernel" in row.kernel else SHARED_BYTES)
        assert row.warps in (4, 8)
        assert 0 < row.occupancy <= 1


# what a network runs: filters of K = 3, the spectral steps and transforms, and heads of up to 16 channels
HOT = re.compile(
    r"Products(<\w+>)?, 3,|_kernel<3,|spectral_|\b(inverse_)?rows_kernel|columns_kernel|Attention(<\w+>)?, 16>"
)


if resources.find_nvcc():

    def test_first_levels_compile_for_hopper_without_spilling(tmp_path):
        sources = []
        for family, (header, *kernels) in FIRST_LEVEL.items():
            sources.append(tmp_path / family / "first_level.cu")
            sources[-1].parent.mkdir()
            uses = ", ".join(f"reinterpret_cast<const void*>(&{kernel})" for kernel in kernels)
            lines = (
                f'#include "{family}/{header}"',
                "using namespace mitnet_fast;",
                f"const void* used[] = {{{uses}}};",
            )
            sources[-1].write_text("\n".join([*lines, ""]))
        rows = list(resources.cuda_rows(90, sources))
        check(rows, 90)
        hot = [row for row in rows if HOT.search(row.kernel)]
        assert len(hot) == 6
        for row in hot:
            assert row.registers > 64
            assert row.spilled_bytes == 0, row
            assert row.shared_bytes > 8 * 1024

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("family", resources.SHARED)
    @pytest.mark.parametrize("arch", resources.ARCHITECTURES)
    def test_every_kernel_compiles_for_every_architecture(arch, family):
        sources = [source for source in resources.cuda_sources(every=True) if family in source.parts]
        rows = list(resources.cuda_rows(arch, sources))
        check(rows, arch)
        hot = [row for row in rows if HOT.search(row.kernel)]
        assert len(hot) == {"dynamic_filter": 33, "amplitude_phase": 18, "window_attention": 8}[family]
        assert not [row for row in hot if row.spilled_bytes]
