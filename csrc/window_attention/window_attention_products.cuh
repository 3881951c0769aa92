// The three ways in which window attention multiplies matrices: IEEE float32, TF32 and half precision.
//
// A warp multiplies fragments of 16×depth by depth×8 (common/ptx.cuh), read from row-major tiles in shared
// memory. Where both factors run along the rows of their tiles, element `depth` of one lies in row `depth`
// of the other: for 32-bit elements these are taken in the order in which accumulators hold columns, 2t and
// 2t + 1 in the place of t and t + 4, so that results serve as factors as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace mitnet_fast {

template <typename Half>
struct HalfAttention {
  using Element = Half;
  static constexpr int depth = 16;
  static constexpr int steps_unrolled = 4;  // of products of two tiles

  static __device__ __forceinline__ Half operand(float value) { return static_cast<Half>(value); }

  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    union {
      Half halves[2];
      uint32_t bits;
    } pair;
    pair.halves[0] = static_cast<Half>(a);
    pair.halves[1] = static_cast<Half>(b);
    return pair.bits;
  }

  static __device__ __forceinline__ void write_pair(Half* to, float a, float b) {
    *reinterpret_cast<uint32_t*>(to) = pack(a, b);
  }

  // a = tile[0..15][k..k + 15]
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const Half* tile, int pitch, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + lane % 16 * pitch + k + lane / 16 * 8);
  }

  // a[row][k] = tile[k][row]
  static __device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Half* tile, int pitch, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(a, tile + (k + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
  }

  // Two neighbours b[k][n] = tile[n][k].
  static __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], const Half* tile, int pitch, int k) {
    const int lane = threadIdx.x % 32;
    uint32_t matrices[4];
    load_matrices(matrices, tile + (lane / 16 * 8 + lane % 8) * pitch + k + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = matrices[i];
  }

  // Two neighbours b[k][n] = tile[k][n].
  static __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Half* tile, int pitch, int k) {
    const int lane = threadIdx.x % 32;
    uint32_t matrices[4];
    load_matrices_transposed(matrices, tile + (k + lane % 16) * pitch + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = matrices[i];
  }

  // Columns step·16 … of a result as factor a.
  template <int tiles>
  static __device__ __forceinline__ void from_result(uint32_t (&a)[4], const float (&result)[tiles][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* half = result[2 * step + i / 2] + i % 2 * 2;
      a[i] = pack(half[0], half[1]);
    }
  }

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                      const float (&c)[4]) {
    mma_m16n8k16<Half>(d, a, b, c);
  }
};

// What TF32 and IEEE float32 share: fragments of 32-bit elements.
struct FloatFragments {
  using Element = float;
  static constexpr int depth = 8;

  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const float* tile, int pitch, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(tile[(g + i % 2 * 8) * pitch + k + t + i / 2 * 4]);
  }

  static __device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const float* tile, int pitch, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(tile[(k + 2 * t + i / 2) * pitch + g + i % 2 * 8]);
  }

  static __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], const float* tile, int pitch, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = __float_as_uint(tile[(i / 2 * 8 + g) * pitch + k + t + i % 2 * 4]);
  }

  static __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const float* tile, int pitch, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = __float_as_uint(tile[(k + 2 * t + i % 2) * pitch + i / 2 * 8 + g]);
  }
};

struct Tf32Attention : FloatFragments {
  static constexpr int steps_unrolled = 8;
  static __device__ __forceinline__ float operand(float value) { return __uint_as_float(round_to_tf32(value)); }

  static __device__ __forceinline__ void write_pair(float* to, float a, float b) {
    *reinterpret_cast<float2*>(to) = make_float2(operand(a), operand(b));
  }

  template <int tiles>
  static __device__ __forceinline__ void from_result(uint32_t (&a)[4], const float (&result)[tiles][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = round_to_tf32(result[step][i % 2 * 2 + i / 2]);
  }

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                      const float (&c)[4]) {
    mma_m16n8k8_tf32(d, a, b, c);
  }
};

// Fused multiply-adds on the same fragments, which lanes pass to each other.
struct IeeeAttention : FloatFragments {
  static constexpr int steps_unrolled = 1;  // a step is hundreds of instructions
  static __device__ __forceinline__ float operand(float value) { return value; }

  static __device__ __forceinline__ void write_pair(float* to, float a, float b) {
    *reinterpret_cast<float2*>(to) = make_float2(operand(a), operand(b));
  }

  template <int tiles>
  static __device__ __forceinline__ void from_result(uint32_t (&a)[4], const float (&result)[tiles][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(result[step][i % 2 * 2 + i / 2]);
  }

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                      const float (&c)[4]) {
    const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;
    float sums[4] = {c[0], c[1], c[2], c[3]};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float of_a[2], of_b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of_a[i] = __uint_as_float(__shfl_sync(0xffffffff, a[k / 4 * 2 + i], row + k % 4));
        of_b[i] = __uint_as_float(__shfl_sync(0xffffffff, b[k / 4], column + 4 * i + k % 4));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = fmaf(of_a[i / 2], of_b[i % 2], sums[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = sums[i];
  }
};

}  // namespace mitnet_fast
