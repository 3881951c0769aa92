// The spectral step between the transforms of a library, for images of any size.
//
// A block owns a tile of bins with all their channels. Bins of columns 0 and W/2 (even W) have tiles of their
// own, whose second half holds the mirror images (−ky) of the first: Y(ky) and conj Y(−ky) are averaged there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "amplitude_phase/packed_map_cuda.cuh"
#include "amplitude_phase/spectral_tile.cuh"

namespace mitnet_fast {

constexpr int bins_of_tile_at_most = 64;
// What a block may have in shared memory on every GPU since compute capability 8.0: 8.6 has the least.
constexpr int64_t shared_bytes_everywhere = 99 * 1024;
// Channels C, Ch and Co, each, of which 8 bins fit there in the backward.
constexpr int64_t channels_at_most = 256;

// How the bins of a half spectrum are divided into tiles: first those of the self-conjugate columns.
struct BinTiles {
  int height;
  int width;
  int bins;

  __host__ __device__ int columns() const { return width / 2 + 1; }
  __host__ __device__ int self_conjugate_columns() const { return 2 - width % 2; }
  // Rows 0 … H/2; the others are mirror images.
  __host__ __device__ int upper_rows() const { return height / 2 + 1; }
  __host__ __device__ int edge_tiles() const {
    return (self_conjugate_columns() * upper_rows() + bins / 2 - 1) / (bins / 2);
  }
  __host__ __device__ int tiles() const {
    const int64_t interior = static_cast<int64_t>(height) * (columns() - self_conjugate_columns());
    return edge_tiles() + static_cast<int>((interior + bins - 1) / bins);
  }
};

// Where the bins of a tile lie in a plane of the spectrum, and which of them are real for every real image.
struct BinTable {
  int offset[bins_of_tile_at_most];  // -1: there is none. A bin that is its own mirror image is only in the first half.
  bool real[bins_of_tile_at_most];
};

__device__ __forceinline__ bool describe_tile(const BinTiles& tiles, int tile, BinTable& table) {
  const bool edge = tile < tiles.edge_tiles();
  const int p = threadIdx.x;
  if (p < tiles.bins) {
    int offset = -1;
    bool real = false;
    if (edge) {
      const int pairs = tiles.bins / 2, i = tile * pairs + p % pairs;
      const int row = i % tiles.upper_rows(), mirrored = (tiles.height - row) % tiles.height;
      if (i < tiles.self_conjugate_columns() * tiles.upper_rows() && (p < pairs || mirrored != row)) {
        const int column = i / tiles.upper_rows() * (tiles.width / 2);
        offset = (p < pairs ? row : mirrored) * tiles.columns() + column;
        real = mirrored == row;
      }
    } else {
      const int interior = tiles.columns() - tiles.self_conjugate_columns();
      const int i = (tile - tiles.edge_tiles()) * tiles.bins + p;
      if (i / interior < tiles.height) offset = i / interior * tiles.columns() + 1 + i % interior;
    }
    table.offset[p] = offset;
    table.real[p] = real;
  }
  __syncthreads();
  return edge;
}

__device__ __forceinline__ void load_tile(const float2* spectrum, int64_t size, const BinTable& table, int channels,
                                          int bins, const Plane& real, const Plane& imaginary) {
  const int log2_bins = log2_of(bins);
  for (int i = threadIdx.x; i < channels * bins; i += spectral_threads) {
    const int c = i >> log2_bins, p = i & (bins - 1), offset = table.offset[p];
    const float2 value = offset < 0 ? float2{0, 0} : spectrum[c * size + offset];
    real.at(c, p) = value.x;
    imaginary.at(c, p) = table.real[p] ? 0.0f : value.y;
  }
}

__device__ __forceinline__ void store_tile(float2* spectrum, int64_t size, const BinTable& table, int channels,
                                           int bins, float scale, const Plane& real, const Plane& imaginary) {
  const int log2_bins = log2_of(bins);
  for (int i = threadIdx.x; i < channels * bins; i += spectral_threads) {
    const int c = i >> log2_bins, p = i & (bins - 1), offset = table.offset[p];
    if (offset >= 0) spectrum[c * size + offset] = {scale * real.at(c, p), scale * imaginary.at(c, p)};
  }
}

// ½(Y + conj of its mirror image), in an edge tile.
__device__ __forceinline__ void make_hermitian(const BinTable& table, int channels, int bins, const Plane& real,
                                               const Plane& imaginary) {
  const int pairs = bins / 2;
  for (int i = threadIdx.x; i < channels * pairs; i += spectral_threads) {
    const int c = i / pairs, p = i % pairs;
    if (table.real[p]) {
      imaginary.at(c, p) = 0;
    } else {
      const float mean = 0.5f * (real.at(c, p) + real.at(c, p + pairs));
      const float half = 0.5f * (imaginary.at(c, p) - imaginary.at(c, p + pairs));
      real.at(c, p) = real.at(c, p + pairs) = mean;
      imaginary.at(c, p) = half;
      imaginary.at(c, p + pairs) = -half;
    }
  }
  __syncthreads();
}

// Bins of a tile of the forward.
inline SharedBins bins_of_forward(const AmplitudePhaseShape& shape) {
  const int channels = static_cast<int>(shape.channels), hidden = static_cast<int>(shape.hidden_channels);
  const int outputs = static_cast<int>(shape.out_channels);
  return bins_that_fit(shared_bytes_everywhere - sizeof(BinTable), bins_of_tile_at_most, [&](int bins) {
    return 3 * plane_size(channels, bins) + plane_size(hidden, bins) + (shape.skip ? 2 : 0) * plane_size(outputs, bins);
  });
}

// Grid: samples × tiles, tiles fastest.
template <bool phase, bool tf32>
__global__ void __launch_bounds__(spectral_threads, 2)
    spectral_forward_kernel(const BinTiles tiles, const PackedMap map, const float2* __restrict__ x,
                            float2* __restrict__ y) {
  extern __shared__ __align__(16) float shared[];
  __shared__ BinTable table;
  const int bins = tiles.bins, channels = map.weight1.inner, hidden_channels = map.weight1.rows;
  const int tile = blockIdx.x % tiles.tiles();
  const int64_t n = blockIdx.x / tiles.tiles(), size = static_cast<int64_t>(tiles.height) * tiles.columns();
  const bool edge = describe_tile(tiles, tile, table);

  const int pitch = pitch_of(bins);
  const Plane real{shared, pitch}, imaginary{real.data + plane_size(channels, bins), pitch};
  const Plane values{imaginary.data + plane_size(channels, bins), pitch};
  const Plane hidden{values.data + plane_size(channels, bins), pitch};
  const bool skip = map.skip_weight.data;
  const int outputs = map.output_weight.rows;
  const Plane skip_real{hidden.data + plane_size(hidden_channels, bins), pitch};
  const Plane skip_imaginary{skip_real.data + plane_size(outputs, bins), pitch};
  load_tile(x + n * channels * size, size, table, channels, bins, real, imaginary);
  zero_padding(real, channels, bins);
  zero_padding(imaginary, channels, bins);
  zero_padding(values, channels, bins);
  zero_padding(hidden, hidden_channels, bins);
  __syncthreads();
  if (skip) {  // before Y takes the place of X
    multiply<tf32, 2>(map.skip_weight, {real, imaginary}, bins, [&](int o, int p, const float (&product)[2]) {
      skip_real.at(o, p) = product[0];
      skip_imaginary.at(o, p) = product[1];
    });
    __syncthreads();
  }
  map_tile<phase, tf32>(map, real, imaginary, values, hidden, bins);
  if (edge) make_hermitian(table, channels, bins, real, imaginary);
  if (edge && skip) make_hermitian(table, outputs, bins, skip_real, skip_imaginary);

  const float scale = 1 / (static_cast<float>(tiles.height) * static_cast<float>(tiles.width));
  if (!map.output_weight.data) {
    store_tile(y + n * channels * size, size, table, channels, bins, scale, real, imaginary);
    return;
  }
  y += n * outputs * size;
  multiply<tf32, 2>(map.output_weight, {real, imaginary}, bins, [&](int o, int p, const float (&product)[2]) {
    const int offset = table.offset[p];
    if (offset < 0) return;
    const float2 sum = skip ? float2{product[0] + skip_real.at(o, p), product[1] + skip_imaginary.at(o, p)}
                            : float2{product[0], product[1]};
    const float bias = map.output_bias && offset == 0 ? map.output_bias[o] : 0.0f;
    y[o * size + offset] = {fmaf(scale, sum.x, bias), scale * sum.y};
  });
}

// Bins of a tile of the backward.
inline SharedBins bins_of_backward(const AmplitudePhaseShape& shape, bool has_output_weight) {
  const int channels = static_cast<int>(shape.channels), hidden = static_cast<int>(shape.hidden_channels);
  const int outputs = static_cast<int>(shape.out_channels);
  return bins_that_fit(shared_bytes_everywhere - sizeof(BinTable), bins_of_tile_at_most, [&](int bins) {
    return (shape.phase ? 7 : 6) * plane_size(channels, bins) + 2 * plane_size(hidden, bins) +
           (has_output_weight ? 2 : 0) * plane_size(outputs, bins);
  });
}

// Grid: parts, each so many tiles of the batch one after another.
template <bool phase, bool tf32>
__global__ void __launch_bounds__(spectral_threads, 2)
    spectral_backward_kernel(const BinTiles tiles, const PackedMap map, const float2* __restrict__ grad,
                             const float2* __restrict__ x, float2* __restrict__ grad_x, const PartialSums partial,
                             int64_t all_tiles) {
  extern __shared__ __align__(16) float shared[];
  __shared__ BinTable table;
  const int bins = tiles.bins, pitch = pitch_of(bins);
  const int channels = map.weight1.inner, hidden_channels = map.weight1.rows;
  const int outputs = map.output_weight.data ? map.output_weight.rows : channels;
  const int64_t size = static_cast<int64_t>(tiles.height) * tiles.columns();
  const float scale = 1 / (static_cast<float>(tiles.height) * static_cast<float>(tiles.width));

  float* next = shared;
  const auto plane = [&](int of_channels) {
    const Plane result{next, pitch};
    next += plane_size(of_channels, bins);
    zero_padding(result, of_channels, bins);
    return result;
  };
  BackwardPlanes at;
  at.real = plane(channels);
  at.imaginary = plane(channels);
  at.amplitude = plane(channels);
  at.values = phase ? plane(channels) : at.amplitude;
  at.mapped = plane(channels);
  at.y_real = plane(channels);
  at.y_imaginary = plane(channels);
  at.hidden = plane(hidden_channels);
  at.grad_hidden = plane(hidden_channels);
  at.grad_real = map.output_weight.data ? plane(outputs) : at.y_real;
  at.grad_imaginary = map.output_weight.data ? plane(outputs) : at.y_imaginary;

  const WeightSums sums = partial.of(blockIdx.x);
  const int64_t begin = blockIdx.x * partial.tiles_per_part;
  const int64_t end = begin + partial.tiles_per_part < all_tiles ? begin + partial.tiles_per_part : all_tiles;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / tiles.tiles();
    const bool edge = describe_tile(tiles, static_cast<int>(i % tiles.tiles()), table);
    load_tile(x + n * channels * size, size, table, channels, bins, at.real, at.imaginary);
    load_tile(grad + n * outputs * size, size, table, outputs, bins, at.grad_real, at.grad_imaginary);
    __syncthreads();
    if (sums.output_bias) {
      accumulate_bias(at.grad_real, outputs, i % tiles.tiles() == 0, sums.output_bias, i == begin);
    }
    backward_tile<phase, tf32>(map, at, bins, scale, edge ? 1.0f : 2.0f, sums, i == begin);
    if (grad_x) {
      if (edge) make_hermitian(table, channels, bins, at.real, at.imaginary);
      store_tile(grad_x + n * channels * size, size, table, channels, bins, 1.0f, at.real, at.imaginary);
    }
    __syncthreads();
  }
}

}  // namespace mitnet_fast
