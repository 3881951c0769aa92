// Complex transforms of a power-of-two length along the bins of planes in shared memory, in place.
//
// Forward (e^−) by decimation in frequency: what comes out lies in bit-reversed order. Inverse (e^+, unscaled) by
// decimation in time: it takes that order and leaves the natural one. In between bins are independent of each other,
// so that nothing is ever permuted. Two stages of radix 2 are one pass; the last of an odd number stays alone.
#pragma once

#include <cuda_runtime.h>

#include "amplitude_phase/spectral_tile.cuh"

namespace mitnet_fast {

// Where frequency `index` of 2^log2_length lies, and the other way round.
__device__ __forceinline__ int bit_reversed(int index, int log2_length) {
  return static_cast<int>(__brev(static_cast<unsigned>(index)) >> (32 - log2_length));
}

// table[k] = e^(−2πik / length), each rounded once from float64.
__device__ __forceinline__ float2 twiddle(int k, int length) {
  double sine, cosine;
  sincospi(2.0 * k / length, &sine, &cosine);
  return {static_cast<float>(cosine), static_cast<float>(-sine)};
}

__device__ __forceinline__ float2 product(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
__device__ __forceinline__ float2 conjugate_product(float2 a, float2 b) {  // a · conj b
  return {fmaf(a.x, b.x, a.y * b.y), fmaf(a.y, b.x, -a.x * b.y)};
}

struct ComplexPlanes {
  Plane real, imaginary;

  __device__ float2 get(int channel, int bin) const { return {real.at(channel, bin), imaginary.at(channel, bin)}; }
  __device__ void set(int channel, int bin, float2 value) const {
    real.at(channel, bin) = value.x;
    imaginary.at(channel, bin) = value.y;
  }
};

// Sums and differences of neighbours: the stage of length 2, its own inverse but for the scale.
__device__ __forceinline__ void transform_pairs(const ComplexPlanes& z, int channels, int log2_length) {
  const int log2_pairs = log2_length - 1;
  for (int i = threadIdx.x; i < channels << log2_pairs; i += spectral_threads) {
    const int c = i >> log2_pairs, p = (i & ((1 << log2_pairs) - 1)) * 2;
    const float2 a = z.get(c, p), b = z.get(c, p + 1);
    z.set(c, p, {a.x + b.x, a.y + b.y});
    z.set(c, p + 1, {a.x - b.x, a.y - b.y});
  }
  __syncthreads();
}

// All threads have to have written the planes before; all may read them afterwards.
__device__ __forceinline__ void transform(const ComplexPlanes& z, int channels, int log2_length, const float2* table) {
  const int log2_quads = log2_length - 2;
  for (int log2_block = log2_length; log2_block >= 2; log2_block -= 2) {
    const int quarter = 1 << (log2_block - 2), step = 1 << (log2_length - log2_block);
    for (int i = threadIdx.x; i < channels << log2_quads; i += spectral_threads) {
      const int c = i >> log2_quads, in_channel = i & ((1 << log2_quads) - 1);
      const int j = in_channel & (quarter - 1), p = (in_channel - j) * 4 + j;
      const float2 a0 = z.get(c, p), a1 = z.get(c, p + quarter), a2 = z.get(c, p + 2 * quarter),
                   a3 = z.get(c, p + 3 * quarter);
      const float2 s0{a0.x + a2.x, a0.y + a2.y}, s1{a1.x + a3.x, a1.y + a3.y};
      const float2 d0{a0.x - a2.x, a0.y - a2.y}, d1{a1.x - a3.x, a1.y - a3.y};
      z.set(c, p, {s0.x + s1.x, s0.y + s1.y});
      z.set(c, p + quarter, product({s0.x - s1.x, s0.y - s1.y}, table[2 * j * step]));
      z.set(c, p + 2 * quarter, product({d0.x + d1.y, d0.y - d1.x}, table[j * step]));
      z.set(c, p + 3 * quarter, product({d0.x - d1.y, d0.y + d1.x}, table[3 * j * step]));
    }
    __syncthreads();
  }
  if (log2_length % 2) transform_pairs(z, channels, log2_length);
}

__device__ __forceinline__ void inverse_transform(const ComplexPlanes& z, int channels, int log2_length,
                                                  const float2* table) {
  if (log2_length % 2) transform_pairs(z, channels, log2_length);
  const int log2_quads = log2_length - 2;
  for (int log2_block = 2 + log2_length % 2; log2_block <= log2_length; log2_block += 2) {
    const int quarter = 1 << (log2_block - 2), step = 1 << (log2_length - log2_block);
    for (int i = threadIdx.x; i < channels << log2_quads; i += spectral_threads) {
      const int c = i >> log2_quads, in_channel = i & ((1 << log2_quads) - 1);
      const int j = in_channel & (quarter - 1), p = (in_channel - j) * 4 + j;
      const float2 b0 = z.get(c, p), b1 = conjugate_product(z.get(c, p + quarter), table[2 * j * step]);
      const float2 b2 = conjugate_product(z.get(c, p + 2 * quarter), table[j * step]);
      const float2 b3 = conjugate_product(z.get(c, p + 3 * quarter), table[3 * j * step]);
      const float2 s0{b0.x + b1.x, b0.y + b1.y}, s1{b0.x - b1.x, b0.y - b1.y};
      const float2 d0{b2.x + b3.x, b2.y + b3.y}, d1{b3.y - b2.y, b2.x - b3.x};  // i·(b2 − b3)
      z.set(c, p, {s0.x + d0.x, s0.y + d0.y});
      z.set(c, p + quarter, {s1.x + d1.x, s1.y + d1.y});
      z.set(c, p + 2 * quarter, {s0.x - d0.x, s0.y - d0.y});
      z.set(c, p + 3 * quarter, {s1.x - d1.x, s1.y - d1.y});
    }
    __syncthreads();
  }
}

}  // namespace mitnet_fast
