// Winograd's minimal filtering F(2×2, 3×3): four results of a 3×3 convolution from 16 products instead of 36
// (Lavin and Gray, arXiv 1509.09308). With d a tile of 4×4 values and g the weights,
//   (Bᵀ d B) ⊙ (G g Gᵀ) = m,  Aᵀ m A = the 2×2 results,
// where m is summed over channels before the last step. From the gradient r of the results that of the weights is
//   Gᵀ [(Bᵀ d B) ⊙ (A r Aᵀ)] G,
// summed over tiles before the last step.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include "common/vectors_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int winograd_side = 3;  // of the filter
constexpr int winograd_tile = 4, winograd_points = 16, winograd_outputs = 2;

// Bᵀ d
template <typename V>
ALWAYS_INLINE void transform_values(const V (&d)[4], V (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// G g
template <typename V>
ALWAYS_INLINE void transform_weights(const V (&g)[3], V (&out)[4]) {
  const V half(0.5f), ends = half * (g[0] + g[2]), middle = half * g[1];
  out[0] = g[0];
  out[1] = ends + middle;
  out[2] = ends - middle;
  out[3] = g[2];
}

// Aᵀ m
template <typename V>
ALWAYS_INLINE void transform_products(const V (&m)[4], V (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}

// A r
template <typename V>
ALWAYS_INLINE void transform_gradients(const V (&r)[2], V (&out)[4]) {
  out[0] = r[0];
  out[1] = r[0] + r[1];
  out[2] = r[0] - r[1];
  out[3] = r[1].neg();
}

// Gᵀ u
template <typename V>
ALWAYS_INLINE void transform_weight_sums(const V (&u)[4], V (&out)[3]) {
  const V half(0.5f), even = half * (u[1] + u[2]), odd = half * (u[1] - u[2]);
  out[0] = u[0] + even;
  out[1] = odd;
  out[2] = even + u[3];
}

// Transforms along both dimensions: load(i, j) gives the values, store(i, j, value) takes the results.
template <int from, int to, typename V, typename Transform, typename Load, typename Store>
ALWAYS_INLINE void transform_both(Transform transform, Load load, Store store) {
  V columns[to][from];
  UNROLLED_FOR(j, from) {
    V value[from], changed[to];
    UNROLLED_FOR(i, from) { value[i] = load(i, j); }
    transform(value, changed);
    UNROLLED_FOR(i, to) { columns[i][j] = changed[i]; }
  }
  UNROLLED_FOR(i, to) {
    V changed[to];
    transform(columns[i], changed);
    UNROLLED_FOR(j, to) { store(i, j, changed[j]); }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
