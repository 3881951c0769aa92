"""The harness runs right kernels right, in every order, and finds what is wrong with wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_on_host import Buffer, HostKernels, KernelFault, Order
from tests.cuda_on_host.harness import rewrite

DEMOS = Path(__file__).parent / "demos.cpp"
ORDERS = [pytest.param(order, id=order.name.lower()) for order in Order]
rng = np.random.default_rng(0)


def nan(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def demos(request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    with HostKernels(DEMOS, sanitize=request.param, timeout=60) as kernels:
        yield kernels


@pytest.fixture(scope="module")
def plain() -> Iterator[HostKernels]:
    with HostKernels(DEMOS, timeout=60) as kernels:
        yield kernels


@pytest.fixture(scope="module")
def sanitized() -> Iterator[HostKernels]:
    with HostKernels(DEMOS, sanitize=True, timeout=60) as kernels:
        yield kernels


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_and_barriers(demos: HostKernels, order: Order) -> None:
    values, out = rng.standard_normal(5 * 64).astype(np.float32), nan(5 * 64)
    demos("reverse", values, out, 5, order=order, seed=3)
    np.testing.assert_array_equal(out, values.reshape(5, 64)[:, ::-1].ravel())


@pytest.mark.parametrize("order", ORDERS)
def test_static_and_dynamic_shared_memory(demos: HostKernels, order: Order) -> None:
    matrix, out = rng.standard_normal((96, 96)), nan(96, 96, dtype=np.float64)
    demos("transpose", matrix, out, 96, 32 * 4, order=order)
    np.testing.assert_array_equal(out, matrix.T)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(demos: HostKernels, order: Order) -> None:
    values = rng.integers(0, 1000, 32).astype(np.int32)
    out = np.full((8, 32), -1, np.int32)
    demos("warps", values, out, order=order)
    ballot = sum(int(value % 2) << lane for lane, value in enumerate(values))
    expected = [
        np.full(32, values.sum()),
        np.full(32, values.sum()),
        values.cumsum(),
        np.full(32, values.sum()),
        np.full(32, np.uint32(ballot).astype(np.int32)),
        np.full(32, 1),
        np.roll(values.reshape(4, 8), -1, axis=1).ravel(),
        np.concatenate([values[:16].reshape(8, 2)[:, ::-1].ravel(), np.full(16, -1)]),
    ]
    np.testing.assert_array_equal(out, np.stack(expected))


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_and_counting_barriers(demos: HostKernels, order: Order) -> None:
    values = rng.integers(-20, 20, 500).astype(np.int32)
    counts, total = np.array([0, -99, 0], np.int32), np.zeros(1, np.float32)
    demos("count", values, 500, counts, total, order=order)
    blocks = [values[first : first + 96] for first in range(0, 500, 96)]
    assert counts.tolist() == [(values > 0).sum(), values.max(), sum((block == 7).any() for block in blocks)]
    assert total[0] == 250


@pytest.mark.parametrize("order", ORDERS)
def test_asynchronous_copies(demos: HostKernels, order: Order) -> None:
    rows, out = rng.standard_normal((7, 32)).astype(np.float32), nan(7, 32)
    demos("pipeline", rows, out, 7, order=order)
    np.testing.assert_array_equal(out, 2 * rows)


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 as float32, cut off."""
    nearest = values.astype(np.float32)
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "as read by the hardware"])
def test_tf32_product(plain: HostKernels, rounded: bool) -> None:
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    # 10 bits of mantissa, to nearest or cut off
    a10, b10 = (((v.view(np.uint32) + (0x1000 if rounded else 0)) & 0xFFFFE000).view(np.float32) for v in (a, b))
    expected = toward_zero(a10.astype(np.float64) @ b10.T.astype(np.float64) + d)
    plain("mma_tf32", a, b, d, int(rounded))
    # the order in which eight exact products are added in float64 decides about the last bit at most
    np.testing.assert_allclose(d, expected, rtol=2e-7, atol=1e-7)
    assert np.abs(d - (a @ b.T)).max() > 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_product(plain: HostKernels, dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 16, generator=generator).to(getattr(torch, dtype)) for n in (16, 8))
    d = nan(16, 8)
    plain(f"mma_{dtype}", a.view(torch.int16).numpy(), b.view(torch.int16).numpy(), d)
    np.testing.assert_allclose(d, (a.double() @ b.double().T).numpy(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_convert_as_pytorch_does(plain: HostKernels, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    every_half = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch_dtype).float()
    between = every_half[:-1] + (every_half[1:] - every_half[:-1]) * torch.rand(2**16 - 1)
    halfway = (every_half[:-1].double() + every_half[1:].double()).mul(0.5).float()
    values = torch.cat([every_half, between, halfway, torch.tensor([65519.9, 65520.0, 1e30, -1e30, 1e-9, -1e-9])])
    out, back = np.zeros(len(values), np.int16), nan(len(values))
    plain(f"to_{dtype}", values.numpy(), out, back, len(values))
    expected = values.to(torch_dtype)
    torch.testing.assert_close(torch.from_numpy(back), expected.float(), rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(torch.from_numpy(out)[number], expected.view(torch.int16)[number])


BARRIER = ("  staged[threadIdx.x] = in[i];\n  __syncthreads();", "  staged[threadIdx.x] = in[i];")
SECOND_BARRIER = ("2 * rows[row % 2][threadIdx.x];\n    __syncthreads();", "2 * rows[row % 2][threadIdx.x];")
WAIT = ("    mitnet_fast::wait_for_copies<1>();\n", "")


def wrong_orders(change: tuple[str, str], call) -> list[Order]:
    """Orders in which the demos with a change in their text do not compute what ``call`` expects."""
    with HostKernels(DEMOS, replace={DEMOS.name: [change]}, timeout=60) as kernels:
        return [order for order in Order if not call(kernels, order)]


def test_a_missing_barrier_shows() -> None:
    values = rng.standard_normal(128).astype(np.float32)

    def call(kernels: HostKernels, order: Order) -> bool:
        out = nan(128)
        kernels("reverse", values, out, 2, order=order)
        return np.array_equal(out, values.reshape(2, 64)[:, ::-1].ravel())

    assert wrong_orders(BARRIER, call) == list(Order)


def test_a_missing_second_barrier_shows() -> None:
    """Threads that run ahead refill a buffer that others still read."""
    rows = rng.standard_normal((7, 32)).astype(np.float32)

    def call(kernels: HostKernels, order: Order) -> bool:
        out = nan(7, 32)
        kernels("pipeline", rows, out, 7, order=order)
        return np.array_equal(out, 2 * rows)

    assert Order.FORWARD in wrong_orders(SECOND_BARRIER, call)
    assert wrong_orders(WAIT, call) == list(Order)


def test_a_missing_warp_barrier_shows() -> None:
    values = rng.standard_normal(32).astype(np.float32)

    def call(kernels: HostKernels, order: Order) -> bool:
        out = nan(32)
        kernels("reverse_warp", values, out, order=order)
        return np.array_equal(out, values[::-1])

    barrier = "  staged[threadIdx.x] = in[threadIdx.x];\n"
    with HostKernels(DEMOS) as kernels:
        assert all(call(kernels, order) for order in Order)
    assert wrong_orders((f"{barrier}  __syncwarp();\n", barrier), call) == list(Order)


def test_uninitialised_accumulator_shows() -> None:
    with HostKernels(DEMOS, replace={DEMOS.name: [("float total = 0;", "float total;")]}) as kernels:
        values, out = np.ones(10, np.float32), nan(32)
        kernels("sum", values, out, 10)
        assert (np.abs(out) > 1e30).all()


def test_reads_behind_a_buffer_show(plain: HostKernels, sanitized: HostKernels) -> None:
    values, out = np.ones(10, np.float32), nan(32)
    plain("sum", values, out, 10)
    assert (out == 10).all()
    plain("sum", values, out, 11)
    assert np.isnan(out).all()
    with pytest.raises(KernelFault, match=r"heap-buffer-overflow[\s\S]*sum_kernel"):
        sanitized("sum", values, out, 11)
    sanitized("sum", values, out, 10)  # a new process takes the place of the one that ended


def test_writes_behind_a_buffer_show(plain: HostKernels, sanitized: HostKernels) -> None:
    values, out = np.ones(10, np.float32), nan(31)
    with pytest.raises(KernelFault, match="written outside the memory of argument 1"):
        plain("sum", values, out, 10)
    with pytest.raises(KernelFault, match=r"heap-buffer-overflow[\s\S]*sum_kernel"):
        sanitized("sum", values, out, 10)


def test_writes_behind_shared_memory_show(plain: HostKernels, sanitized: HostKernels) -> None:
    matrix, out = rng.standard_normal((32, 32)), nan(32, 32, dtype=np.float64)
    with pytest.raises(KernelFault, match="behind the end of shared memory"):
        plain("transpose", matrix, out, 32, 31 * 4)
    with pytest.raises(KernelFault, match=r"heap-buffer-overflow[\s\S]*transpose_kernel"):
        sanitized("transpose", matrix, out, 32, 31 * 4)


def test_misaligned_vectors_show(sanitized: HostKernels) -> None:
    values, out = np.ones(8, np.float32), nan(1)
    sanitized("read_pairs", Buffer(values, offset=8), out, 1)
    assert out[0] == 2
    with pytest.raises(KernelFault, match="misaligned address"):
        sanitized("read_pairs", Buffer(values, offset=4), out, 1)
    with pytest.raises(KernelFault, match="misaligned address"):
        sanitized("read_pairs", values, nan(2), 2)


WRONG = {
    "some_return": (0, r"3 \(thread 0, …\) have returned; 61 \(thread 3, …\) wait in __syncthreads at demos.cpp:\d+"),
    "two_barriers": (1, r"divergent barriers: 32 \(thread 1, …\) wait in __syncthreads .* 32 \(thread 0, …\) wait"),
    "warp_and_barrier": (2, r"8 \(thread 32, …\) wait in __syncthreads .* 24 \(thread 40, …\) wait in __syncwarp"),
    "part_of_warp": (
        3,
        r"__shfl_sync at demos.cpp:\d+: the mask names lane \d+, which has returned|8 .* wait in __shfl_sync",
    ),
    "two_instructions": (4, r"divergent warp: lane \d+ is in __shfl(_xor)?_sync .*in __shfl(_xor)?_sync"),
    "late_lane": (5, r"the mask names lane 5, which has returned|thread 5, …\) have returned; 62 .* in __any_sync"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("number", "message"), WRONG.values(), ids=WRONG)
def test_divergence_is_an_error_that_says_where(demos: HostKernels, number: int, message: str, order: Order) -> None:
    with pytest.raises(KernelFault, match=r"^block \([01], 0, 0\): [\s\S]*" + f"(?:{message})"):
        demos("wrong", number, np.zeros(64, np.int32), order=order)


def test_a_kernel_that_hangs_is_ended() -> None:
    with HostKernels(DEMOS, timeout=2) as kernels, pytest.raises(KernelFault, match="no result within 2 s"):
        kernels("wrong", 6, np.zeros(64, np.int32))


@pytest.mark.parametrize(
    ("grid_y", "threads", "shared", "message"),
    [
        (1, 64, 48 * 1024, None),
        (1, 64, 48 * 1024 + 1, "invalid argument"),
        (65535, 1, 0, None),
        (65536, 1, 0, "invalid configuration"),
        (1, 1024, 0, None),
        (1, 1025, 0, "invalid configuration"),
        (0, 32, 0, "invalid configuration"),
    ],
)
def test_limits_of_a_launch(plain: HostKernels, grid_y: int, threads: int, shared: int, message: str | None) -> None:
    if message is None:
        plain("configure", grid_y, threads, shared)
        return
    with pytest.raises(KernelFault, match=message):
        plain("configure", grid_y, threads, shared)


def test_a_replacement_that_does_not_occur_is_refused() -> None:
    with pytest.raises(ValueError, match=r"demos\.cpp does not contain 'no such text'"):
        HostKernels(DEMOS, replace={DEMOS.name: [("no such text", "")]})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("extern __shared__ float x[];", "float* const x = ::cuda_on_host::dynamic_shared<float>();"),
        (
            "extern __shared__ __align__(16) unsigned char x[];",
            "unsigned char* const x = ::cuda_on_host::dynamic_shared<unsigned char>();",
        ),
        (
            "__shared__ alignas(16) T tile[A + 1][B];",
            "struct tile_in_shared_memory { alignas(16) T tile[A + 1][B]; }; auto& tile = "
            "::cuda_on_host::shared_variable<tile_in_shared_memory>().tile;",
        ),
        (
            "  __shared__ Storage s;",
            "  struct s_in_shared_memory { Storage s; }; auto& s = "
            "::cuda_on_host::shared_variable<s_in_shared_memory>().s;",
        ),
    ],
)
def test_shared_memory_is_rewritten(source: str, expected: str) -> None:
    assert rewrite(source) == expected
