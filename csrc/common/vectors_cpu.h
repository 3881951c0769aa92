// Vectors of the instruction set that a source is compiled for.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#define ALWAYS_INLINE inline __attribute__((always_inline))
// Accumulators are arrays that live in registers once every loop over them is unrolled.
#define UNROLLED_FOR(index, count) _Pragma("GCC unroll 64") for (int index = 0; index < (count); ++index)

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr bool many_registers = true;  // 32 vector registers, else 16
#else
constexpr bool many_registers = false;
#endif

template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Arithmetic of float64 maps is float64, of all others float32.
template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

#if defined(CPU_CAPABILITY_AVX512)
template <typename T>
using Register = std::conditional_t<std::is_same_v<T, double>, __m512d, __m512>;
#elif defined(CPU_CAPABILITY_AVX2)
template <typename T>
using Register = std::conditional_t<std::is_same_v<T, double>, __m256d, __m256>;
#endif

// A vector that is read from memory once: GCC would read it anew for every use, since it may.
template <typename T>
ALWAYS_INLINE Vec<T> load_once(const T* data) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  Register<T> value = Vec<T>::loadu(data);
  asm("" : "+v"(value));
  return value;
#else
  return Vec<T>::loadu(data);
#endif
}

template <typename T>
T sum_of_lanes(const Vec<T>& vector) {
  return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, vector);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
