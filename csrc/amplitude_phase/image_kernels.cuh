// The whole convolution in three kernels, for images whose sides are powers of two and whose columns, all channels
// of one, fit into shared memory: rows of x to their half spectra; columns there, the spectral step, and columns back;
// rows back to y. In the backward the rows of x and of the gradient go in, the rows of ∂x come out.
//
// Between the kernels a half spectrum lies as [B, W/2 + 1, C, H], so that a column is one piece of memory and 16 rows
// are 128 bytes of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "amplitude_phase/packed_map_cuda.cuh"
#include "amplitude_phase/spectral_tile.cuh"
#include "amplitude_phase/transforms.cuh"
#include "amplitude_phase/transforms_preferred.h"

namespace mitnet_fast {

constexpr int log2_rows_at_most = 4;  // of a block

struct ImageSize {
  int log2_height;
  int log2_width;

  __host__ __device__ int height() const { return 1 << log2_height; }
  __host__ __device__ int width() const { return 1 << log2_width; }
  __host__ __device__ int columns() const { return width() / 2 + 1; }
  __host__ __device__ int log2_rows() const {
    return log2_height < log2_rows_at_most ? log2_height : log2_rows_at_most;
  }
};

constexpr int twiddle_threads = 128;

// Grid: y 0 for rows, 1 for columns. The table of a side has as many entries.
static __global__ void __launch_bounds__(twiddle_threads)
    twiddle_kernel(const ImageSize size, float2* of_rows, float2* of_columns) {
  const int length = blockIdx.y ? size.height() : size.width();
  const int k = blockIdx.x * twiddle_threads + threadIdx.x;
  if (k < length) (blockIdx.y ? of_columns : of_rows)[k] = twiddle(k, length);
}

// Two real rows are the parts of one complex one: planes of half as many "channels" as a block has rows.
__device__ __forceinline__ ComplexPlanes row_planes(const ImageSize& size, float* shared) {
  const int pitch = pitch_of(size.width());
  return {{shared, pitch}, {shared + (pitch << (size.log2_rows() - 1)), pitch}};
}

inline size_t row_bytes(const ImageSize& size) {
  return (static_cast<size_t>(pitch_of(size.width())) << size.log2_rows()) * sizeof(float);
}

// Grid: samples and channels × groups of rows. Image [B, C, H, W] to spectrum [B, W/2 + 1, C, H].
static __global__ void __launch_bounds__(spectral_threads, 4)
    rows_kernel(const ImageSize size, int channels, const float* __restrict__ image, const float2* __restrict__ table,
                float2* __restrict__ spectrum) {
  extern __shared__ __align__(16) float shared[];
  const int rows = 1 << size.log2_rows(), width = size.width(), height = size.height();
  const int groups = height / rows, first_row = blockIdx.x % groups * rows;
  const int64_t plane = blockIdx.x / groups, n = plane / channels, c = plane % channels;
  const ComplexPlanes z = row_planes(size, shared);
  image += (plane * height + first_row) * width;
  for (int i = threadIdx.x; i < rows * width; i += spectral_threads) {
    const int row = i >> size.log2_width, w = i & (width - 1);
    (row % 2 ? z.imaginary : z.real).at(row / 2, w) = image[i];
  }
  __syncthreads();
  transform(z, rows / 2, size.log2_width, table);
  for (int i = threadIdx.x; i < rows * size.columns(); i += spectral_threads) {
    const int row = i & (rows - 1), k = i >> size.log2_rows();
    const float2 a = z.get(row / 2, bit_reversed(k, size.log2_width));
    const float2 b = z.get(row / 2, bit_reversed((width - k) & (width - 1), size.log2_width));
    const float2 value =
        row % 2 ? float2{0.5f * (a.y + b.y), 0.5f * (b.x - a.x)} : float2{0.5f * (a.x + b.x), 0.5f * (a.y - b.y)};
    spectrum[((n * size.columns() + k) * channels + c) * height + first_row + row] = value;
  }
}

// Grid as above. Spectrum [B, W/2 + 1, C, H], transformed back along H, to image [B, C, H, W]. Of columns 0 and W/2 the
// real part counts: the imaginary one is rounding.
static __global__ void __launch_bounds__(spectral_threads, 4)
    inverse_rows_kernel(const ImageSize size, int channels, const float2* __restrict__ spectrum,
                        const float2* __restrict__ table, float* __restrict__ image) {
  extern __shared__ __align__(16) float shared[];
  const int rows = 1 << size.log2_rows(), width = size.width(), height = size.height();
  const int groups = height / rows, first_row = blockIdx.x % groups * rows;
  const int64_t plane = blockIdx.x / groups, n = plane / channels, c = plane % channels;
  const ComplexPlanes z = row_planes(size, shared);
  for (int i = threadIdx.x; i < rows / 2 * size.columns(); i += spectral_threads) {
    const int pair = i & (rows / 2 - 1), k = i >> (size.log2_rows() - 1);
    const int64_t column = ((n * size.columns() + k) * channels + c) * height;
    const float4 both = *reinterpret_cast<const float4*>(spectrum + column + first_row + 2 * pair);
    const float2 a{both.x, both.y}, b{both.z, both.w};
    if (k == 0 || k == width / 2) {
      z.set(pair, bit_reversed(k, size.log2_width), {a.x, b.x});
    } else {
      z.set(pair, bit_reversed(k, size.log2_width), {a.x - b.y, a.y + b.x});
      z.set(pair, bit_reversed(width - k, size.log2_width), {a.x + b.y, b.x - a.y});
    }
  }
  __syncthreads();
  inverse_transform(z, rows / 2, size.log2_width, table);
  image += (plane * height + first_row) * width;
  for (int i = threadIdx.x; i < rows * width; i += spectral_threads) {
    const int row = i >> size.log2_width, w = i & (width - 1);
    image[i] = (row % 2 ? z.imaginary : z.real).at(row / 2, w);
  }
}

// Reads a column, transforms it, and sets the imaginary part of real bins to +0.
__device__ __forceinline__ void load_column(const float2* column, int channels, const ImageSize& size, bool edge,
                                            const float2* table, const ComplexPlanes& z) {
  const int height = size.height();
  for (int i = threadIdx.x; i < channels * height; i += spectral_threads) {
    z.set(i >> size.log2_height, i & (height - 1), column[i]);
  }
  __syncthreads();
  transform(z, channels, size.log2_height, table);
  if (edge) {  // frequencies 0 and H/2 lie in front, in bit-reversed order
    for (int i = threadIdx.x; i < 2 * channels; i += spectral_threads) z.imaginary.at(i / 2, i % 2) = 0;
    __syncthreads();
  }
}

// Makes a column Hermitian where it has to be, transforms it back and writes it.
__device__ __forceinline__ void store_column(float2* column, int channels, const ImageSize& size, bool edge,
                                             const float2* table, float scale, const ComplexPlanes& z) {
  const int height = size.height();
  if (edge) {
    for (int i = threadIdx.x; i < channels * (height / 2); i += spectral_threads) {
      const int c = i >> (size.log2_height - 1), k = i & (height / 2 - 1);
      if (k == 0) {
        z.imaginary.at(c, 0) = z.imaginary.at(c, 1) = 0;
      } else {
        const int p = bit_reversed(k, size.log2_height), q = bit_reversed(height - k, size.log2_height);
        const float2 a = z.get(c, p), b = z.get(c, q);
        z.set(c, p, {0.5f * (a.x + b.x), 0.5f * (a.y - b.y)});
        z.set(c, q, {0.5f * (a.x + b.x), 0.5f * (b.y - a.y)});
      }
    }
    __syncthreads();
  }
  inverse_transform(z, channels, size.log2_height, table);
  for (int i = threadIdx.x; i < channels * height; i += spectral_threads) {
    const float2 value = z.get(i >> size.log2_height, i & (height - 1));
    column[i] = {scale * value.x, scale * value.y};
  }
}

__device__ __forceinline__ float scale_of(const ImageSize& size) {
  return 1 / (static_cast<float>(size.height()) * static_cast<float>(size.width()));
}

// Takes planes from shared memory, one after another.
struct Planes {
  float* next;

  __device__ Plane take(int channels, int bins) {
    const Plane plane{next, pitch_of(bins)};
    next += plane_size(channels, bins);
    zero_padding(plane, channels, bins);
    return plane;
  }
};

inline int64_t forward_column_floats(const ImageSize& size, int channels, int hidden, int outputs,
                                     bool has_output_weight, int bins) {
  const int widest = channels > outputs ? channels : outputs;
  return 2 * size.height() + 2 * plane_size(widest, size.height()) + plane_size(channels, bins) +
         plane_size(hidden, bins) + (has_output_weight ? 2 * plane_size(outputs, bins) : 0);
}

// Grid: samples × columns. A block owns a column with all channels; the spectral step takes `bins` of its bins at a
// time. x [B, W/2 + 1, C, H] to y [B, W/2 + 1, Co, H].
template <bool phase, bool tf32>
__global__ void __launch_bounds__(spectral_threads, 2)
    columns_kernel(const ImageSize size, int bins, const PackedMap map, const float2* __restrict__ x,
                   const float2* __restrict__ table_in_memory, float2* __restrict__ y) {
  extern __shared__ __align__(16) float shared[];
  const int channels = map.weight1.inner, hidden_channels = map.weight1.rows, height = size.height();
  const int outputs = map.output_weight.data ? map.output_weight.rows : channels;
  const int column = blockIdx.x % size.columns();
  const bool edge = column == 0 || column == size.width() / 2;

  float2* table = reinterpret_cast<float2*>(shared);
  for (int k = threadIdx.x; k < height; k += spectral_threads) table[k] = table_in_memory[k];
  Planes planes{shared + 2 * height};
  const int widest = max(channels, outputs);
  const ComplexPlanes z{planes.take(widest, height), planes.take(widest, height)};
  zero_padding(z.real, channels, height);
  zero_padding(z.imaginary, channels, height);
  const Plane values = planes.take(channels, bins), hidden = planes.take(hidden_channels, bins);
  const int64_t index = blockIdx.x;
  load_column(x + index * channels * height, channels, size, edge, table, z);
  if (!map.output_weight.data) {
    for (int bin = 0; bin < height; bin += bins) {
      map_tile<phase, tf32>(map, z.real.from(bin), z.imaginary.from(bin), values, hidden, bins);
    }
  } else {
    const Plane real = planes.take(outputs, bins), imaginary = planes.take(outputs, bins);
    const int log2_bins = log2_of(bins);
    const bool skip = map.skip_weight.data;
    for (int bin = 0; bin < height; bin += bins) {
      const Plane part_real = z.real.from(bin), part_imaginary = z.imaginary.from(bin);
      if (skip) {  // before Y takes the place of X
        multiply<tf32, 2>(map.skip_weight, {part_real, part_imaginary}, bins,
                          [&](int o, int p, const float (&sums)[2]) {
                            real.at(o, p) = sums[0];
                            imaginary.at(o, p) = sums[1];
                          });
        __syncthreads();
      }
      map_tile<phase, tf32>(map, part_real, part_imaginary, values, hidden, bins);
      multiply<tf32, 2>(map.output_weight, {part_real, part_imaginary}, bins,
                        [&](int o, int p, const float (&sums)[2]) {
                          real.at(o, p) = skip ? real.at(o, p) + sums[0] : sums[0];
                          imaginary.at(o, p) = skip ? imaginary.at(o, p) + sums[1] : sums[1];
                        });
      __syncthreads();
      for (int i = threadIdx.x; i < outputs * bins; i += spectral_threads) {
        const int o = i >> log2_bins, p = i & (bins - 1);
        z.set(o, bin + p, {real.at(o, p), imaginary.at(o, p)});
      }
      __syncthreads();
    }
  }
  if (map.output_bias && column == 0) {  // frequency 0 lies in front
    for (int o = threadIdx.x; o < outputs; o += spectral_threads) {
      z.real.at(o, 0) += map.output_bias[o] * static_cast<float>(height * size.width());
    }
    __syncthreads();
  }
  store_column(y + index * outputs * height, outputs, size, edge, table, scale_of(size), z);
}

inline int64_t backward_column_floats(const ImageSize& size, int channels, int hidden, int outputs, bool phase,
                                      bool has_output_weight, int bins) {
  return 2 * size.height() + 2 * plane_size(channels, size.height()) + 2 * plane_size(outputs, size.height()) +
         ((phase ? 3 : 2) + (has_output_weight ? 2 : 0)) * plane_size(channels, bins) + 2 * plane_size(hidden, bins);
}

// Grid: parts, each so many columns of the batch one after another. grad [B, W/2 + 1, Co, H] and x as above to
// grad_x [B, W/2 + 1, C, H], if it is wanted, which may be x.
template <bool phase, bool tf32>
__global__ void __launch_bounds__(spectral_threads, 1)
    backward_columns_kernel(const ImageSize size, int bins, const PackedMap map, const float2* __restrict__ grad,
                            const float2* x, const float2* __restrict__ table_in_memory, float2* grad_x,
                            const PartialSums partial, int64_t all_columns) {
  extern __shared__ __align__(16) float shared[];
  const int channels = map.weight1.inner, hidden_channels = map.weight1.rows, height = size.height();
  const bool has_output_weight = map.output_weight.data;
  const int outputs = has_output_weight ? map.output_weight.rows : channels;

  float2* table = reinterpret_cast<float2*>(shared);
  for (int k = threadIdx.x; k < height; k += spectral_threads) table[k] = table_in_memory[k];
  Planes planes{shared + 2 * height};
  const ComplexPlanes z{planes.take(channels, height), planes.take(channels, height)};
  const ComplexPlanes g{planes.take(outputs, height), planes.take(outputs, height)};
  BackwardPlanes at;
  at.amplitude = planes.take(channels, bins);
  at.values = phase ? planes.take(channels, bins) : at.amplitude;
  at.mapped = planes.take(channels, bins);
  at.hidden = planes.take(hidden_channels, bins);
  at.grad_hidden = planes.take(hidden_channels, bins);
  if (has_output_weight) {
    at.y_real = planes.take(channels, bins);
    at.y_imaginary = planes.take(channels, bins);
  }

  const WeightSums sums = partial.of(blockIdx.x);
  const int64_t begin = blockIdx.x * partial.tiles_per_part;
  const int64_t end = begin + partial.tiles_per_part < all_columns ? begin + partial.tiles_per_part : all_columns;
  for (int64_t i = begin; i < end; ++i) {
    const int column = static_cast<int>(i % size.columns());
    const bool edge = column == 0 || column == size.width() / 2;
    load_column(x + i * channels * height, channels, size, edge, table, z);
    load_column(grad + i * outputs * height, outputs, size, edge, table, g);
    if (sums.output_bias) accumulate_bias(g.real, outputs, column == 0, sums.output_bias, i == begin);
    for (int bin = 0; bin < height; bin += bins) {
      at.real = z.real.from(bin);
      at.imaginary = z.imaginary.from(bin);
      at.grad_real = g.real.from(bin);
      at.grad_imaginary = g.imaginary.from(bin);
      if (!has_output_weight) {
        at.y_real = at.grad_real;
        at.y_imaginary = at.grad_imaginary;
      }
      backward_tile<phase, tf32>(map, at, bins, scale_of(size), edge ? 1.0f : 2.0f, sums, i == begin && bin == 0);
    }
    if (grad_x) store_column(grad_x + i * channels * height, channels, size, edge, table, 1.0f, z);
    __syncthreads();
  }
}

inline size_t spectrum_bytes(const ImageSize& size, int channels) {
  return static_cast<size_t>(2 * size.height() + 2 * plane_size(channels, size.height())) * sizeof(float);
}

// Grid: samples × columns. The half spectrum [B, C, H, W/2 + 1] that the other kernels see.
static __global__ void __launch_bounds__(spectral_threads)
    spectrum_kernel(const ImageSize size, int channels, const float2* __restrict__ x,
                    const float2* __restrict__ table_in_memory, float2* __restrict__ spectrum) {
  extern __shared__ __align__(16) float shared[];
  const int height = size.height(), column = blockIdx.x % size.columns();
  float2* table = reinterpret_cast<float2*>(shared);
  for (int k = threadIdx.x; k < height; k += spectral_threads) table[k] = table_in_memory[k];
  Planes planes{shared + 2 * height};
  const ComplexPlanes z{planes.take(channels, height), planes.take(channels, height)};
  const int64_t index = blockIdx.x, n = index / size.columns();
  const bool edge = column == 0 || column == size.width() / 2;
  load_column(x + index * channels * height, channels, size, edge, table, z);
  for (int i = threadIdx.x; i < channels * height; i += spectral_threads) {
    const int c = i >> size.log2_height, k = i & (height - 1);
    spectrum[((n * channels + c) * height + k) * size.columns() + column] = z.get(c, bit_reversed(k, size.log2_height));
  }
}

// Shared memory of a block on GPUs of data centers: 163 KB on compute capability 8.0.
constexpr int64_t shared_bytes_of_column = 163 * 1024;

// 0 for a side of which there are no transforms.
inline int log2_of_side(int64_t side) {
  for (int power = log2_side_at_least; power <= log2_side_at_most; ++power) {
    if (side == int64_t{1} << power) return power;
  }
  return 0;
}

inline ImageSize size_of(const AmplitudePhaseShape& shape) {
  return {log2_of_side(shape.height), log2_of_side(shape.width)};
}

inline SharedBins forward_column(const AmplitudePhaseShape& shape, bool has_output_weight) {
  return bins_that_fit(shared_bytes_of_column, size_of(shape).height(), [&](int bins) {
    return forward_column_floats(size_of(shape), static_cast<int>(shape.channels),
                                 static_cast<int>(shape.hidden_channels), static_cast<int>(shape.out_channels),
                                 has_output_weight, bins);
  });
}

inline SharedBins backward_column(const AmplitudePhaseShape& shape, bool has_output_weight) {
  return bins_that_fit(shared_bytes_of_column, size_of(shape).height(), [&](int bins) {
    return backward_column_floats(size_of(shape), static_cast<int>(shape.channels),
                                  static_cast<int>(shape.hidden_channels), static_cast<int>(shape.out_channels),
                                  shape.phase, has_output_weight, bins);
  });
}

}  // namespace mitnet_fast
