// The spectral step on a tile of bins with all their channels in shared memory, whoever brings it there.
//
// A tile has a power of two of bins, 8 or more. What belongs to it lies in planes [channel][bin], channels padded to a
// multiple of 8 with zeros, since every product with a weight takes 8 of them at a time. The weights are
// packed: tiles of 16 rows × 8 channels in the order in which the lanes of a warp take them, in TF32
// already rounded. Products accumulate in float32, on tensor cores in TF32, else as IEEE multiplications
// in the same order of registers, so that both share all that follows a product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace mitnet_fast {

constexpr int spectral_threads = 256;
constexpr int spectral_warps = spectral_threads / 32;

__host__ __device__ constexpr int padded(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

// Floats between the channels of a plane: 8 modulo 16, so that the lanes of a product meet in no bank.
__host__ __device__ constexpr int pitch_of(int bins) { return bins % 16 ? bins : bins + 8; }

__host__ __device__ constexpr int64_t plane_size(int channels, int bins) {
  return static_cast<int64_t>(padded(channels, 8)) * pitch_of(bins);
}

__device__ __forceinline__ int log2_of(int bins) { return 31 - __clz(bins); }

struct Plane {
  float* data;
  int pitch;

  __device__ float& at(int channel, int bin) const { return data[channel * pitch + bin]; }
  // The same channels from another bin on.
  __device__ Plane from(int bin) const { return {data + bin, pitch}; }
};

// [rows, inner], padded to multiples of 16 and 8 with zeros.
struct PackedMatrix {
  const float* data;
  int rows;
  int inner;
};

__host__ __device__ constexpr int64_t packed_size(int rows, int inner) {
  return static_cast<int64_t>(padded(rows, 16)) * padded(inner, 8);
}

// M with its adjoint; what a kernel does not need may be empty.
struct PackedMap {
  PackedMatrix weight1;             // [Ch, C]
  PackedMatrix weight2;             // [C, Ch]
  PackedMatrix output_weight;       // [Co, C], of Y
  PackedMatrix skip_weight;         // [Co, C], of X
  PackedMatrix weight1_transposed;  // and so on
  PackedMatrix weight2_transposed;
  PackedMatrix output_weight_transposed;
  PackedMatrix skip_weight_transposed;
  const float* bias1;
  const float* bias2;
  const float* output_bias;
  float negative_slope;
};

__device__ __forceinline__ void zero_padding(const Plane& plane, int channels, int bins) {
  const int extra = padded(channels, 8) - channels;
  for (int i = threadIdx.x; i < extra * bins; i += spectral_threads) plane.at(channels + i / bins, i % bins) = 0;
}

// store(row, bin, values of the `count` products A·V) for all rows of A and all bins. A warp computes 16 × 16 of them
// at a time. Planes have to be complete; who reads what `store` wrote has to wait for all threads.
template <bool tf32, int count, typename Store>
__device__ __forceinline__ void multiply(const PackedMatrix& a, const Plane (&v)[count], int bins, Store&& store) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_tiles = (a.rows + 15) / 16, steps = (a.inner + 7) / 8;
  const int tasks = row_tiles * ((bins + 15) / 16);
  for (int task = threadIdx.x / 32; task < tasks; task += spectral_warps) {
    const int first_row = task % row_tiles * 16, first_bin = task / row_tiles * 16;
    const bool both = first_bin + 8 < bins;
    if constexpr (tf32) __syncwarp();  // lanes part where a task ends, and matrix instructions take whole warps
    const float4* weights =
        reinterpret_cast<const float4*>(a.data) + static_cast<int64_t>(task % row_tiles) * steps * 32;
    float d[count][2][4] = {};
    for (int step = 0; step < steps; ++step, weights += 32) {
      if constexpr (tf32) {
        const float4 own = weights[lane];
        const uint32_t a_fragment[4] = {__float_as_uint(own.x), __float_as_uint(own.y), __float_as_uint(own.z),
                                        __float_as_uint(own.w)};
#pragma unroll
        for (int i = 0; i < count; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            if (n && !both) continue;
            const float* values = &v[i].at(step * 8 + t, first_bin + n * 8 + g);
            const uint32_t b_fragment[2] = {round_to_tf32(values[0]), round_to_tf32(values[4 * v[i].pitch])};
            mma_m16n8k8_tf32(d[i][n], a_fragment, b_fragment, d[i][n]);
          }
        }
      } else {
#pragma unroll 2
        for (int j = 0; j < 4; ++j) {
          const float4 row = weights[4 * g + j];  // A[g][j], A[g + 8][j], A[g][j + 4], A[g + 8][j + 4]
#pragma unroll
          for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              if (n && !both) continue;
              const float* values = &v[i].at(step * 8 + j, first_bin + n * 8 + 2 * t);
              const float2 low = *reinterpret_cast<const float2*>(values);
              const float2 high = *reinterpret_cast<const float2*>(values + 4 * v[i].pitch);
              d[i][n][0] = fmaf(row.z, high.x, fmaf(row.x, low.x, d[i][n][0]));
              d[i][n][1] = fmaf(row.z, high.y, fmaf(row.x, low.y, d[i][n][1]));
              d[i][n][2] = fmaf(row.w, high.x, fmaf(row.y, low.x, d[i][n][2]));
              d[i][n][3] = fmaf(row.w, high.y, fmaf(row.y, low.y, d[i][n][3]));
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n && !both) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + g + e / 2 * 8;
        if (row >= a.rows) continue;
        float values[count];
#pragma unroll
        for (int i = 0; i < count; ++i) values[i] = d[i][n][e];
        store(row, first_bin + n * 8 + 2 * t + e % 2, values);
      }
    }
  }
}

// sums[row][column] (+)= factor · Σ over bins and planes of D[row][bin] · V[column][bin]; rows of sums are `pitch`
// apart.
template <bool tf32, int count>
__device__ __forceinline__ void accumulate_products(const Plane (&d)[count], int rows, const Plane (&v)[count],
                                                    int columns, int bins, float factor, float* sums, int pitch,
                                                    bool first) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_tiles = (rows + 15) / 16;
  const int tasks = row_tiles * ((columns + 15) / 16);
  for (int task = threadIdx.x / 32; task < tasks; task += spectral_warps) {
    const int first_row = task % row_tiles * 16, first_column = task / row_tiles * 16;
    // what lies beyond the last row or column is not stored: anything may be read for it
    const int row0 = min(first_row + g, rows - 1), row1 = min(first_row + g + 8, rows - 1);
    if constexpr (tf32) __syncwarp();
    float sum[2][4] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      for (int bin = 0; bin < bins; bin += 8) {
        if constexpr (tf32) {
          const float *low = &d[i].at(row0, bin + t), *high = &d[i].at(row1, bin + t);
          const uint32_t a_fragment[4] = {round_to_tf32(low[0]), round_to_tf32(high[0]), round_to_tf32(low[4]),
                                          round_to_tf32(high[4])};
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float* values = &v[i].at(min(first_column + n * 8 + g, columns - 1), bin + t);
            const uint32_t b_fragment[2] = {round_to_tf32(values[0]), round_to_tf32(values[4])};
            mma_m16n8k8_tf32(sum[n], a_fragment, b_fragment, sum[n]);
          }
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const float low = d[i].at(row0, bin + k), high = d[i].at(row1, bin + k);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const int column = first_column + n * 8 + 2 * t;
              const float left = v[i].at(min(column, columns - 1), bin + k);
              const float right = v[i].at(min(column + 1, columns - 1), bin + k);
              sum[n][0] = fmaf(low, left, sum[n][0]);
              sum[n][1] = fmaf(low, right, sum[n][1]);
              sum[n][2] = fmaf(high, left, sum[n][2]);
              sum[n][3] = fmaf(high, right, sum[n][3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + g + e / 2 * 8, column = first_column + n * 8 + 2 * t + e % 2;
        if (row >= rows || column >= columns) continue;
        float& total = sums[static_cast<int64_t>(row) * pitch + column];
        total = first ? factor * sum[n][e] : fmaf(factor, sum[n][e], total);
      }
    }
  }
}

// sums[row] (+)= factor · Σ over bins of D[row][bin].
__device__ __forceinline__ void accumulate_rows(const Plane& d, int rows, int bins, float factor, float* sums,
                                                bool first) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < rows; row += spectral_warps) {
    float sum = 0;
    for (int bin = lane; bin < bins; bin += 32) sum += d.at(row, bin);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) sums[row] = first ? factor * sum : fmaf(factor, sum, sums[row]);
  }
}

// X = amplitude · (cosine + i·sine); where |X| counts as zero 0 · (1 + 0i).
struct Polar {
  float amplitude;
  float cosine;
  float sine;
};

__device__ __forceinline__ Polar polar(float real, float imaginary) {
  const float largest = fmaxf(fabsf(real), fabsf(imaginary));
  // powers of two bring the squares into float32's range and change no bit of a quotient
  const float scale = largest > 0x1p60f ? 0x1p-80f : largest < 0x1p-40f ? 0x1p80f : 1.0f;
  const float unscale = largest > 0x1p60f ? 0x1p80f : largest < 0x1p-40f ? 0x1p-80f : 1.0f;
  real *= scale;
  imaginary *= scale;
  const float length = sqrtf(fmaf(real, real, imaginary * imaginary));
  if (length * unscale < 1e-30f) return {0, 1, 0};
  const float inverse = 1 / length;
  return {length * unscale, real * inverse, imaginary * inverse};
}

// Both to about 1 ulp of 1. The argument is reduced in float64, which takes the phases of any network and,
// other than the reduction of sincosf, no local memory.
__device__ __forceinline__ void cosine_and_sine(float angle, float& cosine, float& sine) {
  const double quarters = angle * 0.63661977236758134;
  const double whole = rint(quarters);
  const int quadrant = static_cast<int>(whole - 4 * floor(whole * 0.25));
  const float r = static_cast<float>((quarters - whole) * 1.5707963267948966), z = r * r;
  const float s =
      fmaf(fmaf(fmaf(-0.0001951463200384751f, z, 0.008332155644893646f), z, -0.16666655242443085f), r * z, r);
  float c = fmaf(fmaf(2.443241282890085e-05f, z, -0.0013887309469282627f), z, 0.04166664555668831f);
  c = fmaf(fmaf(c, z, -0.5f), z, 1.0f);
  cosine = quadrant & 1 ? s : c;
  sine = quadrant & 1 ? c : s;
  if ((quadrant + 1) & 2) cosine = -cosine;
  if (quadrant & 2) sine = -sine;
}

__device__ __forceinline__ float leaky(float value, float negative_slope) {
  return value > 0 ? value : negative_slope * value;
}

// Y, where X was. `values` [C] and `hidden` [Ch] are for what lies between.
template <bool phase, bool tf32>
__device__ __forceinline__ void map_tile(const PackedMap& map, const Plane& real, const Plane& imaginary,
                                         const Plane& values, const Plane& hidden, int bins) {
  const int log2_bins = log2_of(bins);
  for (int i = threadIdx.x; i < map.weight1.inner * bins; i += spectral_threads) {
    const int c = i >> log2_bins, p = i & (bins - 1);
    const Polar x = polar(real.at(c, p), imaginary.at(c, p));
    if constexpr (phase) {
      values.at(c, p) = atan2f(x.sine, x.cosine);
      real.at(c, p) = x.amplitude;
    } else {
      values.at(c, p) = x.amplitude;
      real.at(c, p) = x.cosine;
      imaginary.at(c, p) = x.sine;
    }
  }
  __syncthreads();
  multiply<tf32, 1>(map.weight1, {values}, bins, [&](int h, int p, const float (&product)[1]) {
    hidden.at(h, p) = leaky(product[0] + map.bias1[h], map.negative_slope);
  });
  __syncthreads();
  multiply<tf32, 1>(map.weight2, {hidden}, bins, [&](int c, int p, const float (&product)[1]) {
    const float mapped = product[0] + map.bias2[c];
    if constexpr (phase) {
      const float amplitude = real.at(c, p);
      float cosine, sine;
      cosine_and_sine(mapped, cosine, sine);
      real.at(c, p) = amplitude * cosine;
      imaginary.at(c, p) = amplitude * sine;
    } else {
      real.at(c, p) *= mapped;
      imaginary.at(c, p) *= mapped;
    }
  });
  __syncthreads();
}

// Sums of one block; null for what is not needed.
struct WeightSums {
  float* weight1;
  float* bias1;
  float* weight2;
  float* bias2;
  float* output_weight;
  float* output_bias;
};

// Of a tile in the backward. Those of `grad` have Co channels and are those of `y` where there is no output_weight;
// `values` is `amplitude` in amplitude mode.
struct BackwardPlanes {
  Plane real, imaginary;            // X, then ∂X
  Plane grad_real, grad_imaginary;  // of the gradient of y
  Plane amplitude, values, mapped;
  Plane y_real, y_imaginary;  // Y, then G, then what M's adjoint takes and what it leaves
  Plane hidden, grad_hidden;
};

// sums[o] (+)= the gradient of output_bias: bin (0, 0) of that of y, the first of a tile that has it.
__device__ __forceinline__ void accumulate_bias(const Plane& grad_real, int outputs, bool has_bin, float* sums,
                                                bool first) {
  for (int o = threadIdx.x; o < outputs; o += spectral_threads) {
    const float value = has_bin ? grad_real.at(o, 0) : 0.0f;
    sums[o] = first ? value : sums[o] + value;
  }
}

// ∂X / c where X was, 1/HW = `scale` folded in, and c = `weight` times the gradients of the weights added to the sums.
template <bool phase, bool tf32>
__device__ __forceinline__ void backward_tile(const PackedMap& map, const BackwardPlanes& at, int bins, float scale,
                                              float weight, const WeightSums& sums, bool first) {
  const int channels = map.weight1.inner, hidden_channels = map.weight1.rows, log2_bins = log2_of(bins);
  const bool skip = map.skip_weight.data;
  const int output_inputs = skip ? 2 * channels : channels;
  if (skip && sums.output_weight) {
    accumulate_products<tf32, 2>({at.grad_real, at.grad_imaginary}, map.output_weight.rows, {at.real, at.imaginary},
                                 channels, bins, scale * weight, sums.output_weight, output_inputs, first);
    __syncthreads();
  }
#pragma unroll 1  // a loop is long, and two turns at a time have no registers
  for (int i = threadIdx.x; i < channels * bins; i += spectral_threads) {
    const int c = i >> log2_bins, p = i & (bins - 1);
    const Polar x = polar(at.real.at(c, p), at.imaginary.at(c, p));
    at.amplitude.at(c, p) = x.amplitude;
    at.real.at(c, p) = x.cosine;
    at.imaginary.at(c, p) = x.sine;
    if constexpr (phase) at.values.at(c, p) = atan2f(x.sine, x.cosine);
  }
  __syncthreads();
  multiply<tf32, 1>(map.weight1, {at.values}, bins, [&](int h, int p, const float (&product)[1]) {
    const float before = product[0] + map.bias1[h];
    at.hidden.at(h, p) = leaky(before, map.negative_slope);
    at.grad_hidden.at(h, p) = before > 0 ? 1 : map.negative_slope;
  });
  __syncthreads();
  multiply<tf32, 1>(map.weight2, {at.hidden}, bins, [&](int c, int p, const float (&product)[1]) {
    const float mapped = product[0] + map.bias2[c];
    at.mapped.at(c, p) = mapped;
    if (sums.output_weight) {
      float cosine = at.real.at(c, p), sine = at.imaginary.at(c, p);
      if constexpr (phase) cosine_and_sine(mapped, cosine, sine);
      const float amplitude = phase ? at.amplitude.at(c, p) : mapped;
      at.y_real.at(c, p) = amplitude * cosine;
      at.y_imaginary.at(c, p) = amplitude * sine;
    }
  });
  __syncthreads();
  if (sums.output_weight) {
    accumulate_products<tf32, 2>({at.grad_real, at.grad_imaginary}, map.output_weight.rows, {at.y_real, at.y_imaginary},
                                 channels, bins, scale * weight, sums.output_weight + output_inputs - channels,
                                 output_inputs, first);
    __syncthreads();
  }
  if (map.output_weight.data) {
    multiply<tf32, 2>(map.output_weight_transposed, {at.grad_real, at.grad_imaginary}, bins,
                      [&](int c, int p, const float (&product)[2]) {
                        at.y_real.at(c, p) = product[0];
                        at.y_imaginary.at(c, p) = product[1];
                      });
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < channels * bins; i += spectral_threads) {
    const int c = i >> log2_bins, p = i & (bins - 1);
    const float grad_real = scale * at.y_real.at(c, p), grad_imaginary = scale * at.y_imaginary.at(c, p);
    float cosine = at.real.at(c, p), sine = at.imaginary.at(c, p);
    if constexpr (phase) cosine_and_sine(at.mapped.at(c, p), cosine, sine);
    const float factor = phase ? at.amplitude.at(c, p) : at.mapped.at(c, p);
    at.y_real.at(c, p) = cosine * grad_real + sine * grad_imaginary;
    at.y_imaginary.at(c, p) = factor * (cosine * grad_imaginary - sine * grad_real);
  }
  const Plane& grad_mapped = phase ? at.y_imaginary : at.y_real;
  __syncthreads();
  multiply<tf32, 1>(map.weight2_transposed, {grad_mapped}, bins,
                    [&](int h, int p, const float (&product)[1]) { at.grad_hidden.at(h, p) *= product[0]; });
  __syncthreads();
  if (sums.weight1) {
    accumulate_products<tf32, 1>({at.grad_hidden}, hidden_channels, {at.values}, channels, bins, weight, sums.weight1,
                                 channels, first);
  }
  if (sums.weight2) {
    accumulate_products<tf32, 1>({grad_mapped}, channels, {at.hidden}, hidden_channels, bins, weight, sums.weight2,
                                 hidden_channels, first);
  }
  if (sums.bias1) accumulate_rows(at.grad_hidden, hidden_channels, bins, weight, sums.bias1, first);
  if (sums.bias2) accumulate_rows(grad_mapped, channels, bins, weight, sums.bias2, first);
  multiply<tf32, 1>(map.weight1_transposed, {at.grad_hidden}, bins, [&](int c, int p, const float (&product)[1]) {
    const float amplitude = at.amplitude.at(c, p), cosine = at.real.at(c, p), sine = at.imaginary.at(c, p);
    const float radial = phase ? at.y_real.at(c, p) : product[0];
    const float angular = phase ? product[0] : at.y_imaginary.at(c, p);
    const float turned = amplitude > 0 ? angular / amplitude : 0;
    at.real.at(c, p) = amplitude > 0 ? cosine * radial - sine * turned : 0;
    at.imaginary.at(c, p) = amplitude > 0 ? sine * radial + cosine * turned : 0;
  });
  __syncthreads();
  if (skip) {
    multiply<tf32, 2>(map.skip_weight_transposed, {at.grad_real, at.grad_imaginary}, bins,
                      [&](int c, int p, const float (&product)[2]) {
                        at.real.at(c, p) = fmaf(scale, product[0], at.real.at(c, p));
                        at.imaginary.at(c, p) = fmaf(scale, product[1], at.imaginary.at(c, p));
                      });
    __syncthreads();
  }
}

}  // namespace mitnet_fast
