// Small kernels, right and wrong, that test the harness itself.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/ptx.cuh"

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

namespace {

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Each block reverses 64 numbers through shared memory.
__global__ void reverse_kernel(const float* in, float* out) {
  __shared__ float staged[64];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  staged[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = staged[blockDim.x - 1 - threadIdx.x];
}

// Transposes 32×32 tiles of a square matrix with one static and one dynamic array.
__global__ void transpose_kernel(const double* in, double* out, int size) {
  __shared__ alignas(16) double tile[32][33];
  extern __shared__ int columns[];
  const int x = blockIdx.x * 32, y = blockIdx.y * 32;
  if (threadIdx.y == 0) columns[threadIdx.x] = x + threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y) tile[i][threadIdx.x] = in[(y + i) * size + columns[threadIdx.x]];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y) out[(x + i) * size + y + threadIdx.x] = tile[threadIdx.x][i];
}

// Sums of a warp in five ways, and votes.
__global__ void warp_kernel(const int* in, int* out) {
  const int lane = threadIdx.x;
  int down = in[lane], butterfly = in[lane], prefix = in[lane];
  for (int step = 16; step > 0; step /= 2) {
    down += __shfl_down_sync(0xffffffff, down, step);
    butterfly += __shfl_xor_sync(0xffffffff, butterfly, step);
  }
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(0xffffffff, prefix, step);
    if (lane >= step) prefix += left;
  }
  out[lane] = __shfl_sync(0xffffffff, down, 0);
  out[32 + lane] = butterfly;
  out[64 + lane] = prefix;
  out[96 + lane] = __reduce_add_sync(0xffffffff, in[lane]);
  out[128 + lane] = static_cast<int>(__ballot_sync(0xffffffff, in[lane] % 2));
  out[160 + lane] = __any_sync(0xffffffff, in[lane] > 1000) * 2 + __all_sync(0xffffffff, in[lane] >= 0);
  out[192 + lane] = __shfl_sync(0xffffffff, in[lane], lane + 1, 8);
  if (lane < 16) out[224 + lane] = __shfl_xor_sync(0x0000ffff, in[lane], 1);
}

// A warp reverses 32 numbers through shared memory.
__global__ void reverse_warp_kernel(const float* in, float* out) {
  __shared__ float staged[32];
  staged[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = staged[31 - threadIdx.x];
}

__global__ void count_kernel(const int* in, int n, int* counts, float* total) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int positive = __syncthreads_count(i < n && in[i] > 0);
  if (threadIdx.x == 0) atomicAdd(counts, positive);
  if (i < n) {
    atomicMax(counts + 1, in[i]);
    atomicAdd(total, 0.5f);
  }
  if (__syncthreads_or(i < n && in[i] == 7) && threadIdx.x == 0) atomicAdd(counts + 2, 1);
}

// d += a·b for one warp; a [16, depth] row by row, b [depth, 8] column by column.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* d, bool rounded) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto bits = [rounded](float value) {
    return rounded ? mitnet_fast::round_to_tf32(value) : __float_as_uint(value);
  };
  const uint32_t a_fragment[4] = {bits(a[g * 8 + t]), bits(a[(g + 8) * 8 + t]), bits(a[g * 8 + t + 4]),
                                  bits(a[(g + 8) * 8 + t + 4])};
  const uint32_t b_fragment[2] = {bits(b[g * 8 + t]), bits(b[g * 8 + t + 4])};
  float accumulator[4];
  for (int i = 0; i < 4; ++i) accumulator[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mitnet_fast::mma_m16n8k8_tf32(accumulator, a_fragment, b_fragment, accumulator);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = accumulator[i];
}

template <typename Half>
__global__ void mma_half_kernel(const Half* a, const Half* b, float* d) {
  __shared__ alignas(16) Half a_tile[16 * 16];
  __shared__ alignas(16) Half b_tile[16 * 16];  // [depth, 16], the last 8 columns unused
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) {
    a_tile[i] = a[i];
    b_tile[i] = i % 16 < 8 ? b[i % 16 * 16 + i / 16] : Half(0.0f);
  }
  __syncwarp();
  uint32_t a_fragment[4], b_matrices[4];
  mitnet_fast::load_matrices(a_fragment, a_tile + lane % 16 * 16 + lane / 16 * 8);
  mitnet_fast::load_matrices_transposed(b_matrices, b_tile + lane % 16 * 16 + lane / 16 * 8);
  const uint32_t b_fragment[2] = {b_matrices[0], b_matrices[1]};
  float accumulator[4] = {};
  mitnet_fast::mma_m16n8k16<Half>(accumulator, a_fragment, b_fragment, accumulator);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = accumulator[i];
}

template <typename Half>
__global__ void to_half_kernel(const float* in, Half* out, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = Half(in[i]);
  back[i] = static_cast<float>(out[i]);
}

// Doubles `count` rows of 32 numbers, the next row on its way while one is worked on.
__global__ void pipeline_kernel(const float* in, float* out, int count) {
  __shared__ alignas(16) float rows[2][32];
  const auto begin = [&](int row) {
    if (threadIdx.x < 8) {
      mitnet_fast::copy_async<16>(&rows[row % 2][threadIdx.x * 4], in + row * 32 + threadIdx.x * 4, row < count);
    }
    mitnet_fast::commit_copies();
  };
  begin(0);
  for (int row = 0; row < count; ++row) {
    begin(row + 1);
    mitnet_fast::wait_for_copies<1>();
    __syncthreads();
    out[row * 32 + threadIdx.x] = 2 * rows[row % 2][threadIdx.x];
    __syncthreads();
  }
  mitnet_fast::wait_for_copies<0>();
}

__global__ void sum_kernel(const float* in, float* out, int n) {
  float total = 0;
  for (int i = 0; i < n; ++i) total += in[i];
  out[threadIdx.x] = total;
}

__global__ void read_pairs_kernel(const float* in, float* out) {
  const float2 pair = *reinterpret_cast<const float2*>(in + threadIdx.x);
  out[threadIdx.x] = pair.x + pair.y;
}

enum Wrong { some_return, two_barriers, warp_and_barrier, part_of_warp, two_instructions, late_lane, infinite };

__global__ void wrong_kernel(int wrong, int* out) {
  const int i = threadIdx.x;
  switch (wrong) {
    case some_return:
      if (i < 3) return;
      __syncthreads();
      break;
    case two_barriers:
      if (i % 2) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case warp_and_barrier:
      if (i < 32) {
        __syncwarp();
      } else if (i < 40) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case part_of_warp:
      if (i % 32 < 8) out[i] = __shfl_sync(0xffffffff, i, 0);
      break;
    case two_instructions:
      out[i] = i % 2 ? __shfl_sync(0xffffffff, i, 0) : __shfl_xor_sync(0xffffffff, i, 1);
      break;
    case late_lane:
      if (i % 32 == 5) return;
      out[i] = __any_sync(0xffffffff, i);
      break;
    case infinite:
      for (volatile int forever = 1; forever;) continue;
  }
}

}  // namespace

EXPORT reverse(const float* in, float* out, int64_t blocks) {
  return launch(reverse_kernel, static_cast<unsigned>(blocks), 64, 0, in, out);
}
EXPORT transpose(const double* in, double* out, int64_t size, int64_t shared) {
  return launch(transpose_kernel, dim3(size / 32, size / 32), dim3(32, 8), shared, in, out, static_cast<int>(size));
}
EXPORT warps(const int* in, int* out) { return launch(warp_kernel, 1, 32, 0, in, out); }
EXPORT reverse_warp(const float* in, float* out) { return launch(reverse_warp_kernel, 1, 32, 0, in, out); }
EXPORT count(const int* in, int64_t n, int* counts, float* total) {
  return launch(count_kernel, static_cast<unsigned>((n + 95) / 96), 96, 0, in, static_cast<int>(n), counts, total);
}
EXPORT mma_tf32(const float* a, const float* b, float* d, int64_t rounded) {
  return launch(mma_tf32_kernel, 1, 32, 0, a, b, d, rounded != 0);
}
EXPORT mma_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  return launch(mma_half_kernel<__nv_bfloat16>, 1, 32, 0, a, b, d);
}
EXPORT mma_float16(const __half* a, const __half* b, float* d) {
  return launch(mma_half_kernel<__half>, 1, 32, 0, a, b, d);
}
EXPORT to_bfloat16(const float* in, __nv_bfloat16* out, float* back, int64_t n) {
  return launch(to_half_kernel<__nv_bfloat16>, static_cast<unsigned>((n + 255) / 256), 256, 0, in, out, back,
                static_cast<int>(n));
}
EXPORT to_float16(const float* in, __half* out, float* back, int64_t n) {
  return launch(to_half_kernel<__half>, static_cast<unsigned>((n + 255) / 256), 256, 0, in, out, back,
                static_cast<int>(n));
}
EXPORT pipeline(const float* in, float* out, int64_t rows) {
  return launch(pipeline_kernel, 1, 32, 0, in, out, static_cast<int>(rows));
}
EXPORT sum(const float* in, float* out, int64_t n) {
  return launch(sum_kernel, 1, 32, 0, in, out, static_cast<int>(n));
}
EXPORT read_pairs(const float* in, float* out, int64_t threads) {
  return launch(read_pairs_kernel, 1, static_cast<unsigned>(threads), 0, in, out);
}
EXPORT wrong(int64_t which, int* out) { return launch(wrong_kernel, 2, 64, 0, static_cast<int>(which), out); }
EXPORT configure(int64_t grid_y, int64_t threads, int64_t shared) {
  return launch(wrong_kernel, dim3(1, grid_y), static_cast<unsigned>(threads), shared, -1, nullptr);
}
