// Dynamic filter on CUDA devices, the filters given.
//
//   y[c, p] = Σ_k F[c, k](p) · x[c, p + o_k]  (+ x[c, p]),   k over the K×K offsets o_k
//   ∂x[c, q] = Σ_k F[c, k](q − o_k) · g[c, q − o_k]  (+ g[c, q]),   ∂F[c, k](p) = g[c, p] · x[c, p + o_k]
//
// Bound by memory: the filters are K² times as large as x, and every value of them is read, or written, once. A block
// has `channels` channels of a tile of `rows` × 32 pixels; y and ∂F bring their maps through shared memory, so that
// accesses to global memory are coalesced in both layouts. ∂x reads filters at pixels around the tile and leaves what
// the taps share to L1. Sums are float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/map_tile.cuh"

namespace mitnet_fast {

template <int K>
struct GivenSizes {
  static constexpr int taps = K * K;
  static constexpr int radius = K / 2;
  static constexpr int channels = K <= 3 ? 8 : 4;
  static constexpr int rows = K <= 5 ? 4 : 2;
  static constexpr int columns = 32;
  static constexpr int pixels = rows * columns;
  static constexpr int columns_with_halo = columns + K - 1;
  static constexpr int rows_with_halo = rows + K - 1;
  static constexpr int filter_channels = channels * taps;
  static constexpr int threads = 128;
  static constexpr int results = pixels * channels / threads;  // of a thread
  // Elements of shared memory: x with its halo, then filters. Neighbouring threads take neighbouring channels of
  // pixels; `channels` is a multiple of 4 and K² odd, so that 32 float32 values of one tap lie in 32 banks.
  static constexpr int x_elements = rows_with_halo * columns_with_halo * channels;
  static constexpr int shared = x_elements + pixels * filter_channels;
};

// Which part of the maps a block has.
struct GivenBlock {
  int64_t sample;
  int first_channel;
  Place place;
};

// How a grid counts its blocks: groups of channels fastest, then tiles along rows, row by row, sample by sample.
struct GivenGrid {
  int channel_groups;
  int tile_columns;
  int tile_rows;
  int channels;
  int height;
  int width;

  template <int K>
  __device__ GivenBlock block() const {
    const int group = blockIdx.x % channel_groups, tile = blockIdx.x / channel_groups;
    const int in_sample = tile % (tile_columns * tile_rows);
    return {tile / (tile_columns * tile_rows),
            group * GivenSizes<K>::channels,
            {in_sample / tile_columns * GivenSizes<K>::rows, in_sample % tile_columns * GivenSizes<K>::columns, height,
             width}};
  }
};

// The pixel of a thread's i-th result: its channel is threadIdx.x % channels.
template <int K>
__device__ __forceinline__ int pixel_of(int i) {
  return (static_cast<int>(threadIdx.x) + i * GivenSizes<K>::threads) / GivenSizes<K>::channels;
}

template <int K, typename T>
__device__ __forceinline__ void load_with_halo(T* tile, const Map<const T>& x, const GivenBlock& block, int present) {
  using Sizes = GivenSizes<K>;
  load_tile<Sizes::threads, Sizes::rows_with_halo, Sizes::columns_with_halo, Sizes::channels, Sizes::channels>(
      tile, x, x.plane(block.sample, block.first_channel), present,
      {block.place.row - Sizes::radius, block.place.column - Sizes::radius, block.place.height, block.place.width});
}

// y. Grid: GivenGrid.
template <int K, typename T>
__global__ void __launch_bounds__(GivenSizes<K>::threads)
    filter_kernel(const Map<const T> x, const Map<const T> filters, const Map<T> y, const GivenGrid grid,
                  const bool residual) {
  using Sizes = GivenSizes<K>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const x_tile = reinterpret_cast<T*>(shared_memory);
  T* const filter_tile = x_tile + Sizes::x_elements;
  const GivenBlock block = grid.block<K>();
  const int present = grid.channels - block.first_channel;
  load_with_halo<K>(x_tile, x, block, present);
  load_tile<Sizes::threads, Sizes::rows, Sizes::columns, Sizes::filter_channels, Sizes::filter_channels>(
      filter_tile, filters, filters.plane(block.sample, int64_t{block.first_channel} * Sizes::taps),
      present * Sizes::taps, block.place);
  __syncthreads();

  const int channel = threadIdx.x % Sizes::channels;
  float sums[Sizes::results];
#pragma unroll
  for (int i = 0; i < Sizes::results; ++i) {
    const int pixel = pixel_of<K>(i);
    const T* const f = filter_tile + pixel * Sizes::filter_channels + channel * Sizes::taps;
    const T* const corner =
        x_tile + (pixel / Sizes::columns * Sizes::columns_with_halo + pixel % Sizes::columns) * Sizes::channels +
        channel;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < Sizes::taps; ++k) {
      const int offset = (k / K * Sizes::columns_with_halo + k % K) * Sizes::channels;
      sum = fmaf(static_cast<float>(f[k]), static_cast<float>(corner[offset]), sum);
    }
    if (residual) {
      sum += static_cast<float>(corner[Sizes::radius * (Sizes::columns_with_halo + 1) * Sizes::channels]);
    }
    sums[i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Sizes::results; ++i) {
    filter_tile[pixel_of<K>(i) * Sizes::channels + channel] = static_cast<T>(sums[i]);
  }
  __syncthreads();
  store_tile<Sizes::threads, Sizes::rows, Sizes::columns, Sizes::channels, Sizes::channels>(
      filter_tile, y, y.plane(block.sample, block.first_channel), present, block.place);
}

// ∂F. Grid: GivenGrid.
template <int K, typename T>
__global__ void __launch_bounds__(GivenSizes<K>::threads)
    grad_filters_kernel(const Map<const T> grad, const Map<const T> x, const Map<T> grad_filters,
                        const GivenGrid grid) {
  using Sizes = GivenSizes<K>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const x_tile = reinterpret_cast<T*>(shared_memory);
  T* const filter_tile = x_tile + Sizes::x_elements;
  const GivenBlock block = grid.block<K>();
  const int present = grid.channels - block.first_channel;
  load_with_halo<K>(x_tile, x, block, present);
  load_tile<Sizes::threads, Sizes::rows, Sizes::columns, Sizes::channels, Sizes::channels>(
      filter_tile, grad, grad.plane(block.sample, block.first_channel), present, block.place);
  __syncthreads();

  const int channel = threadIdx.x % Sizes::channels;
  float gradients[Sizes::results];
#pragma unroll
  for (int i = 0; i < Sizes::results; ++i) {
    gradients[i] = static_cast<float>(filter_tile[pixel_of<K>(i) * Sizes::channels + channel]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Sizes::results; ++i) {
    const int pixel = pixel_of<K>(i);
    T* const f = filter_tile + pixel * Sizes::filter_channels + channel * Sizes::taps;
    const T* const corner =
        x_tile + (pixel / Sizes::columns * Sizes::columns_with_halo + pixel % Sizes::columns) * Sizes::channels +
        channel;
#pragma unroll
    for (int k = 0; k < Sizes::taps; ++k) {
      const int offset = (k / K * Sizes::columns_with_halo + k % K) * Sizes::channels;
      f[k] = static_cast<T>(gradients[i] * static_cast<float>(corner[offset]));
    }
  }
  __syncthreads();
  store_tile<Sizes::threads, Sizes::rows, Sizes::columns, Sizes::filter_channels, Sizes::filter_channels>(
      filter_tile, grad_filters, grad_filters.plane(block.sample, int64_t{block.first_channel} * Sizes::taps),
      present * Sizes::taps, block.place);
}

// ∂x. Grid: GivenGrid. Neighbouring threads take neighbouring pixels, or channels where those are neighbours in memory.
template <int K, typename T>
__global__ void __launch_bounds__(GivenSizes<K>::threads)
    grad_x_kernel(const Map<const T> grad, const Map<const T> filters, const Map<T> grad_x, const GivenGrid grid,
                  const bool residual) {
  using Sizes = GivenSizes<K>;
  const GivenBlock block = grid.block<K>();
  const bool along_rows = filters.access == Access::rows;
#pragma unroll 1
  for (int i = threadIdx.x; i < Sizes::pixels * Sizes::channels; i += Sizes::threads) {
    const int pixel = along_rows ? i % Sizes::pixels : i / Sizes::channels;
    const int channel = block.first_channel + (along_rows ? i / Sizes::pixels : i % Sizes::channels);
    const int row = block.place.row + pixel / Sizes::columns, column = block.place.column + pixel % Sizes::columns;
    if (channel >= grid.channels || row >= grid.height || column >= grid.width) continue;
    const T* const g = grad.plane(block.sample, channel);
    const T* const f = filters.plane(block.sample, int64_t{channel} * Sizes::taps);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < Sizes::taps; ++k) {
      const int from_row = row - (k / K - Sizes::radius), from_column = column - (k % K - Sizes::radius);
      if (from_row < 0 || from_row >= grid.height || from_column < 0 || from_column >= grid.width) continue;
      sum = fmaf(
          static_cast<float>(f[k * filters.stride_c + from_row * filters.stride_h + from_column * filters.stride_w]),
          static_cast<float>(g[from_row * grad.stride_h + from_column * grad.stride_w]), sum);
    }
    if (residual) sum += static_cast<float>(g[row * grad.stride_h + column * grad.stride_w]);
    grad_x.plane(block.sample, channel)[row * grad_x.stride_h + column * grad_x.stride_w] = static_cast<T>(sum);
  }
}

}  // namespace mitnet_fast
