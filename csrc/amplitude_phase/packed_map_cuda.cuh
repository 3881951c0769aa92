// Host side of what every kernel of the family needs: weights packed for products, and sums of weight gradients.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "amplitude_phase/amplitude_phase.h"
#include "amplitude_phase/spectral_tile.cuh"
#include "common/launch.cuh"
#include "common/sum_rows.cuh"

namespace mitnet_fast {

// Hands out pieces of a workspace, each aligned to 256 bytes. From null it only counts.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}

  float* floats(int64_t count) {
    float* piece = begin_ ? reinterpret_cast<float*>(begin_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(float)) + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

struct PackJob {
  const float* matrix;  // [rows, inner], or [inner, rows] of which the transpose is packed
  int pitch;            // from row to row of it
  float* packed;
  int rows;
  int inner;
  bool transposed;
};

struct PackJobs {
  PackJob job[8];
  bool tf32;
};

constexpr int pack_threads = 256;

// Grid: x covers the largest packed matrix, y the matrices. A thread writes one element.
static __global__ void __launch_bounds__(pack_threads) pack_kernel(const PackJobs jobs) {
  const PackJob job = jobs.job[blockIdx.y];
  const int steps = padded(job.inner, 8) / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * pack_threads + threadIdx.x;
  if (i >= packed_size(job.rows, job.inner)) return;
  const int tile = static_cast<int>(i / 128), lane = i % 128 / 4, element = i % 4;
  const int row = tile / steps * 16 + lane / 4 + element % 2 * 8;
  const int inner = tile % steps * 8 + lane % 4 + element / 2 * 4;
  float value = 0;
  if (row < job.rows && inner < job.inner) {
    value = job.transposed ? job.matrix[static_cast<int64_t>(inner) * job.pitch + row]
                           : job.matrix[static_cast<int64_t>(row) * job.pitch + inner];
  }
  job.packed[i] = jobs.tf32 ? __uint_as_float(round_to_tf32(value)) : value;
}

// Packs the weights, with `backward` those of the adjoint too. Without a stream to launch on, `launch_it` false, it
// only takes its share of the workspace.
inline PackedMap pack(const AmplitudePhaseShape& shape, const SpectralMap& map, bool backward, Workspace& workspace,
                      bool launch_it, cudaStream_t stream) {
  const int channels = checked_int(shape.channels, "x"), hidden = checked_int(shape.hidden_channels, "weight1"),
            outputs = checked_int(shape.out_channels, "output_weight");
  PackJobs jobs{{}, shape.tf32};
  int count = 0;
  int64_t largest = 0;
  const auto add_part = [&](const float* matrix, int pitch, int rows, int inner, bool transposed) -> PackedMatrix {
    const int64_t size = packed_size(rows, inner);
    float* packed = workspace.floats(size);
    jobs.job[count++] = {matrix, pitch, packed, rows, inner, transposed};
    largest = std::max(largest, size);
    return {packed, rows, inner};
  };
  const auto add = [&](const void* matrix, int rows, int inner, bool transposed) {
    return add_part(static_cast<const float*>(matrix), transposed ? rows : inner, rows, inner, transposed);
  };
  const int output_inputs = static_cast<int>(shape.output_inputs());
  const float* const of_x = static_cast<const float*>(map.output_weight);
  const float* const of_y = map.output_weight ? of_x + output_inputs - channels : nullptr;
  PackedMap packed{};
  packed.weight1 = add(map.weight1, hidden, channels, false);
  packed.weight2 = add(map.weight2, channels, hidden, false);
  if (map.output_weight) packed.output_weight = add_part(of_y, output_inputs, outputs, channels, false);
  if (shape.skip) packed.skip_weight = add_part(of_x, output_inputs, outputs, channels, false);
  if (backward) {
    packed.weight1_transposed = add(map.weight1, channels, hidden, true);
    packed.weight2_transposed = add(map.weight2, hidden, channels, true);
    if (map.output_weight) packed.output_weight_transposed = add_part(of_y, output_inputs, channels, outputs, true);
    if (shape.skip) packed.skip_weight_transposed = add_part(of_x, output_inputs, channels, outputs, true);
  }
  packed.bias1 = static_cast<const float*>(map.bias1);
  packed.bias2 = static_cast<const float*>(map.bias2);
  packed.output_bias = static_cast<const float*>(map.output_bias);
  packed.negative_slope = static_cast<float>(shape.negative_slope);
  if (launch_it) {
    const dim3 grid(static_cast<unsigned>(blocks_of(largest, pack_threads)), static_cast<unsigned>(count));
    launch("pack_kernel", pack_kernel, grid, pack_threads, 0, stream, jobs);
  }
  return packed;
}

// Sums of the weight gradients: a part of all tiles is summed by one block, then the parts in their order.
struct PartialSums {
  WeightSums first;  // of part 0
  int64_t weight1_size, bias1_size, weight2_size, bias2_size, output_weight_size, output_bias_size;
  int64_t parts;
  int64_t tiles_per_part;

  __device__ WeightSums of(int64_t part) const {
    const auto at = [part](float* sums, int64_t size) { return sums ? sums + part * size : nullptr; };
    return {at(first.weight1, weight1_size),
            at(first.bias1, bias1_size),
            at(first.weight2, weight2_size),
            at(first.bias2, bias2_size),
            at(first.output_weight, output_weight_size),
            at(first.output_bias, output_bias_size)};
  }
};

inline PartialSums partial_sums(const AmplitudePhaseBackward& call, int64_t tiles, Workspace& workspace) {
  constexpr int64_t parts_wanted = 528, floats_at_most = 1 << 24;
  const auto& shape = call.shape;
  PartialSums sums{};
  sums.weight1_size = sums.weight2_size = shape.hidden_channels * shape.channels;
  sums.bias1_size = shape.hidden_channels;
  sums.bias2_size = shape.channels;
  sums.output_weight_size = shape.out_channels * shape.output_inputs();
  sums.output_bias_size = shape.out_channels;
  const int64_t floats_of_part = 2 * sums.weight1_size + sums.output_weight_size;
  const int64_t wanted = std::max<int64_t>(1, std::min(parts_wanted, floats_at_most / floats_of_part));
  sums.tiles_per_part = std::max<int64_t>(1, blocks_of(tiles, wanted));
  sums.parts = blocks_of(tiles, sums.tiles_per_part);
  const auto take = [&](const void* gradient, int64_t size) {
    return gradient ? workspace.floats(sums.parts * size) : nullptr;
  };
  sums.first = {take(call.grad_weight1, sums.weight1_size),
                take(call.grad_bias1, sums.bias1_size),
                take(call.grad_weight2, sums.weight2_size),
                take(call.grad_bias2, sums.bias2_size),
                take(call.grad_output_weight, sums.output_weight_size),
                take(call.grad_output_bias, sums.output_bias_size)};
  return sums;
}

inline void add_up(const AmplitudePhaseBackward& call, const PartialSums& sums, cudaStream_t stream) {
  const auto job = [&](const float* rows, void* out, int64_t size) {
    return RowSums<float>{rows, static_cast<float*>(out), size, 1, sums.parts, 1, 1};
  };
  sum_rows(job(sums.first.weight1, call.grad_weight1, sums.weight1_size),
           job(sums.first.weight2, call.grad_weight2, sums.weight2_size), stream);
  sum_rows(job(sums.first.bias1, call.grad_bias1, sums.bias1_size),
           job(sums.first.bias2, call.grad_bias2, sums.bias2_size), stream);
  sum_rows(job(sums.first.output_weight, call.grad_output_weight, sums.output_weight_size),
           job(sums.first.output_bias, call.grad_output_bias, sums.output_bias_size), stream);
}

// Bins that a block works on at a time, and the dynamic shared memory this takes.
struct SharedBins {
  int bins;
  size_t bytes;
};

// The most bins, up to 64 and `bins_at_most`, with which `floats(bins)` fit; none where 8 do not.
template <typename Floats>
SharedBins bins_that_fit(int64_t bytes_at_most, int bins_at_most, Floats&& floats) {
  for (int bins = std::min(64, bins_at_most); bins >= 8; bins /= 2) {
    const int64_t bytes = floats(bins) * static_cast<int64_t>(sizeof(float));
    if (bytes <= bytes_at_most) return {bins, static_cast<size_t>(bytes)};
  }
  return {0, 0};
}

// Calls `with` with the constants (phase, tf32) of a kernel's template.
template <typename With>
void dispatch(const AmplitudePhaseShape& shape, With&& with) {
  if (shape.phase) {
    shape.tf32 ? with(std::true_type{}, std::true_type{}) : with(std::true_type{}, std::false_type{});
  } else {
    shape.tf32 ? with(std::false_type{}, std::true_type{}) : with(std::false_type{}, std::false_type{});
  }
}

}  // namespace mitnet_fast
