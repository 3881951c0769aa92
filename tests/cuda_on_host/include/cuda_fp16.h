// float16 as CUDA names it; arithmetic goes through float, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_on_host/intrinsics.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float value) {
    const auto word = cuda_on_host::bits<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(word >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (value != value) {
      bits = 0x7fff;
    } else if (magnitude >= 65520.0f) {  // halfway to what would be 2^16
      bits = sign | 0x7c00;
    } else if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
      bits = sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
    } else {
      const uint32_t rounded = (word & 0x7fffffff) + 0xfff + (word >> 13 & 1);
      bits = sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
    }
  }
  explicit __half(double value) : __half(static_cast<float>(value)) {}
  operator float() const {
    const uint32_t sign = uint32_t{bits} << 16 & 0x80000000, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return cuda_on_host::bits<float>(sign | 0x7f800000 | magnitude << 13);
    const float value = magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f
                                          : cuda_on_host::bits<float>((magnitude << 13) + (112 << 23));
    return sign ? -value : value;
  }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline float __half2float(__half a) { return a; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {static_cast<float>(a.x) * static_cast<float>(b.x), static_cast<float>(a.y) * static_cast<float>(b.y)};
}
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short a) {
  __half b;
  b.bits = a;
  return b;
}
