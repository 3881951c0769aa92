// Second stage of reductions: sums of rows of partial sums, in an order that depends on their number alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/launch.cuh"

namespace mitnet_fast {

// out[o][i] = Σ rows[r][i] over first ≤ r < last, float32, one range of rows for every o. With a single o it is
// [0, count). With several, o stands for `of_one` consecutive items, `run` items are summed into one row, and a row
// begins anew with every o: [o·of_one / run + o, ((o + 1)·of_one − 1) / run + o].
template <typename T>
struct RowSums {
  const float* rows;
  T* out;
  int64_t columns;
  int64_t outputs;
  int64_t count;
  int64_t of_one;
  int64_t run;
};

constexpr int sum_rows_threads = 256;

// Block number `block` of a job sums 32 columns of one row of results; a warp takes every eighth row, then the first
// adds what the warps have, in order.
template <typename T>
__device__ __forceinline__ void sum_rows_block(const RowSums<T>& job, int64_t block) {
  constexpr int warps = sum_rows_threads / 32;
  __shared__ float sums[warps][32];
  const int64_t groups = (job.columns + 31) / 32;
  const int64_t output = block / groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = block % groups * 32 + lane;

  int64_t begin = 0, end = job.count;
  if (job.outputs > 1) {
    begin = output * job.of_one / job.run + output;
    end = ((output + 1) * job.of_one - 1) / job.run + output + 1;
  }
  float sum = 0;
  if (column < job.columns) {
#pragma unroll 8
    for (int64_t row = begin + warp; row < end; row += warps) sum += job.rows[row * job.columns + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < job.columns) {
    for (int other = 1; other < warps; ++other) sum += sums[other][lane];
    job.out[output * job.columns + column] = static_cast<T>(sum);
  }
}

// Grid: the blocks of the first job, then those of the second.
template <typename T>
__global__ void __launch_bounds__(sum_rows_threads) sum_rows_kernel(const RowSums<T> first, const RowSums<T> second) {
  const int64_t blocks_of_first = (first.columns + 31) / 32 * first.outputs;
  if (blockIdx.x < blocks_of_first) {
    sum_rows_block(first, blockIdx.x);
  } else {
    sum_rows_block(second, blockIdx.x - blocks_of_first);
  }
}

// Both sums in one launch; one whose `out` is null is left out.
template <typename T>
void sum_rows(const RowSums<T>& first, const RowSums<T>& second, cudaStream_t stream) {
  const RowSums<T> none{nullptr, nullptr, 0, 0, 0, 1, 1};
  const RowSums<T> a = first.out ? first : none, b = second.out ? second : none;
  const int64_t blocks = (a.columns + 31) / 32 * a.outputs + (b.columns + 31) / 32 * b.outputs;
  if (blocks == 0) return;
  launch("sum_rows_kernel", sum_rows_kernel<T>, dim3(static_cast<unsigned>(checked_int(blocks, "weight"))),
         sum_rows_threads, 0, stream, a, b);
}

}  // namespace mitnet_fast
