// CUDA's device functions: synchronisation, warp-wide instructions, atomics, memory hints, arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "cuda_on_host/block.h"

namespace cuda_on_host {

// A warp-wide instruction: every lane of `mask` gives an In and gets an Out. `compute` is a function
// object without state that fills outputs from inputs, arrays by lane, null for lanes outside the mask.
template <typename In, typename Out, typename Compute>
Out in_warp(const char* instruction, unsigned mask, const In& in, Site site, Compute) {
  static_assert(std::is_empty_v<Compute>);
  Out out{};
  current->block->warp(instruction, mask, &in, &out, site, [](const void* const* inputs, void* const* outputs) {
    Compute{}(reinterpret_cast<const In* const*>(inputs), reinterpret_cast<Out* const*>(outputs));
  });
  return out;
}

template <typename To, typename From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct Sent {
  T value;
  int from;  // lane whose value is wanted
};

template <typename T>
T shuffle(const char* instruction, unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  return in_warp<Sent<T>, T>(instruction, mask, Sent<T>{value, from}, site,
                             [](const Sent<T>* const* inputs, T* const* outputs) {
                               for (int lane = 0; lane < 32; ++lane) {
                                 if (!outputs[lane]) continue;
                                 const Sent<T>* source = inputs[inputs[lane]->from];
                                 if (!source)
                                   current->block->fail("a shuffle reads from a lane that its mask leaves out");
                                 *outputs[lane] = source->value;
                               }
                             });
}

// Lane that `lane` of a segment of `width` lanes reads from, itself if that lies outside the segment.
inline int in_segment(int lane, int from, int width) {
  return from >= lane / width * width && from < (lane / width + 1) * width ? from : lane;
}

inline unsigned ballot(const char* instruction, unsigned mask, bool predicate, Site site) {
  return in_warp<bool, unsigned>(instruction, mask, predicate, site,
                                 [](const bool* const* inputs, unsigned* const* outputs) {
                                   unsigned votes = 0;
                                   for (int lane = 0; lane < 32; ++lane) {
                                     if (inputs[lane] && *inputs[lane]) votes |= 1u << lane;
                                   }
                                   for (int lane = 0; lane < 32; ++lane) {
                                     if (outputs[lane]) *outputs[lane] = votes;
                                   }
                                 });
}

template <typename T, typename Combine>
T reduce(const char* instruction, unsigned mask, T value, Site site, Combine) {
  return in_warp<T, T>(instruction, mask, value, site, [](const T* const* inputs, T* const* outputs) {
    bool any = false;
    T total{};
    for (int lane = 0; lane < 32; ++lane) {
      if (!inputs[lane]) continue;
      total = any ? Combine{}(total, *inputs[lane]) : *inputs[lane];
      any = true;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (outputs[lane]) *outputs[lane] = total;
    }
  });
}

// *address ← update(*address), as one step. Gives the old value.
template <typename T, typename Update>
T atomic_update(T* address, Update update) {
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_SEQ_CST);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

}  // namespace cuda_on_host

// Where a device function is called from.
#define CUDA_ON_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_HOST_SITE) {
  cuda_on_host::current->block->barrier("__syncthreads", false, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::current->block->barrier("__syncthreads_count", predicate != 0, {file, line});
}
inline int __syncthreads_or(int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::current->block->barrier("__syncthreads_or", predicate != 0, {file, line}) > 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::current->block->barrier("__syncthreads_and", predicate == 0, {file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_HOST_SITE) {
  cuda_on_host::ballot("__syncwarp", mask, false, {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_HOST_SITE) {
  const int lane = cuda_on_host::current->lane();
  return cuda_on_host::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
  const int lane = cuda_on_host::current->lane();
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value,
                               cuda_on_host::in_segment(lane, lane - static_cast<int>(delta), width), {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
  const int lane = cuda_on_host::current->lane();
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value,
                               cuda_on_host::in_segment(lane, lane + static_cast<int>(delta), width), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_HOST_SITE) {
  const int lane = cuda_on_host::current->lane();
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, cuda_on_host::in_segment(lane, lane ^ lanes, width),
                               {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot("__all_sync", mask, predicate != 0, {file, line}) == mask;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::reduce("__reduce_add_sync", mask, value, {file, line}, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::reduce("__reduce_max_sync", mask, value, {file, line}, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::reduce("__reduce_min_sync", mask, value, {file, line}, [](T a, T b) { return std::min(a, b); });
}
#undef CUDA_ON_HOST_SITE

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { cuda_on_host::current->block->fail("__trap"); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T old) { return std::min(old, value); });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T old) { return old & value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_on_host::atomic_update(address, [compare, value](T old) { return old == compare ? value : old; });
}

// Loads and stores with a hint to the caches.
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b : a;
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b : a;
}

inline float __uint_as_float(unsigned a) { return cuda_on_host::bits<float>(a); }
inline unsigned __float_as_uint(float a) { return cuda_on_host::bits<unsigned>(a); }
inline float __int_as_float(int a) { return cuda_on_host::bits<float>(a); }
inline int __float_as_int(float a) { return cuda_on_host::bits<int>(a); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __sinf(float a) { return std::sin(a); }
inline float __saturatef(float a) { return std::fmin(std::fmax(a, 0.0f), 1.0f); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }

// π with the argument reduced exactly first, as CUDA does.
inline void sincospi(double a, double* sine, double* cosine) {
  const double quarter = std::nearbyint(2 * a), rest = a - 0.5 * quarter;
  const double s = std::sin(rest * 3.14159265358979323846), c = std::cos(rest * 3.14159265358979323846);
  switch (static_cast<long long>(quarter) & 3) {
    case 0:
      *sine = s, *cosine = c;
      break;
    case 1:
      *sine = c, *cosine = -s;
      break;
    case 2:
      *sine = -s, *cosine = -c;
      break;
    default:
      *sine = -c, *cosine = s;
  }
}
inline void sincospif(float a, float* sine, float* cosine) {
  double s, c;
  sincospi(a, &s, &c);
  *sine = static_cast<float>(s), *cosine = static_cast<float>(c);
}
inline double sinpi(double a) {
  double s, c;
  sincospi(a, &s, &c);
  return s;
}
inline double cospi(double a) {
  double s, c;
  sincospi(a, &s, &c);
  return c;
}
inline float sinpif(float a) { return static_cast<float>(sinpi(a)); }
inline float cospif(float a) { return static_cast<float>(cospi(a)); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = both >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    picked |= byte << 8 * i;
  }
  return picked;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
