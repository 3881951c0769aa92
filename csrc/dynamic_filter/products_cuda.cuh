// The three ways in which the predictor's products are done: IEEE float32, TF32 and half precision.
//
// What is multiplied comes in steps of 32 bytes, `depth` elements, for each pixel and each row of the weight.
// In a fragment, a thread with lane = 4·g + t holds two of a row's 8 words. Which words these are is free as
// long as both factors agree: t and t + 4, as the instruction's description has it, or 2t and 2t + 1, which
// one load brings to neighbouring registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace mitnet_fast {

// Two words of a step: 2 elements of float32, 4 of half precision.
using Slice = uint2;

__device__ __forceinline__ Slice load_slice(const void* from) { return *static_cast<const uint2*>(from); }

// Two neighbouring elements.
__device__ __forceinline__ float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ __forceinline__ float2 load_pair(const __half* from) {
  return __half22float2(*reinterpret_cast<const __half2*>(from));
}
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}

// Products in half precision are exact in float32, so that rounding them once is what eager does too.
template <typename Half>
struct HalfProducts {
  using Element = Half;
  static constexpr int depth = 16;
  static constexpr bool tensor_cores = true;
  static constexpr bool tf32 = false;

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], Slice b,
                                                      const float (&c)[4]) {
    const uint32_t b_fragment[2] = {b.x, b.y};
    mma_m16n8k16<Half>(d, a, b_fragment, c);
  }

  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b);

  static __device__ __forceinline__ Slice multiply(Slice a, Slice b) {
    return make_uint2(multiply(a.x, b.x), multiply(a.y, b.y));
  }
};

template <>
__device__ __forceinline__ uint32_t HalfProducts<__nv_bfloat16>::multiply(uint32_t a, uint32_t b) {
  union Word {
    uint32_t bits;
    __nv_bfloat162 pair;
  };
  Word x = {a}, y = {b}, product;
  product.pair = __hmul2(x.pair, y.pair);
  return product.bits;
}

template <>
__device__ __forceinline__ uint32_t HalfProducts<__half>::multiply(uint32_t a, uint32_t b) {
  union Word {
    uint32_t bits;
    __half2 pair;
  };
  Word x = {a}, y = {b}, product;
  product.pair = __hmul2(x.pair, y.pair);
  return product.bits;
}

// Both factors rounded to TF32 (to nearest), sums in float32.
struct Tf32Products {
  using Element = float;
  static constexpr int depth = 8;
  static constexpr bool tensor_cores = true;
  static constexpr bool tf32 = true;

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], Slice b,
                                                      const float (&c)[4]) {
    const uint32_t b_fragment[2] = {b.x, b.y};
    mma_m16n8k8_tf32(d, a, b_fragment, c);
  }

  static __device__ __forceinline__ Slice multiply(Slice a, Slice b) {
    return make_uint2(round_to_tf32(__uint_as_float(a.x) * __uint_as_float(b.x)),
                      round_to_tf32(__uint_as_float(a.y) * __uint_as_float(b.y)));
  }
};

// Fused multiply-adds; threads own the results that fragments give them.
struct IeeeProducts {
  using Element = float;
  static constexpr int depth = 8;
  static constexpr bool tensor_cores = false;
  static constexpr bool tf32 = false;
};

}  // namespace mitnet_fast
