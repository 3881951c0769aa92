// Matrices transposed by square blocks in registers.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/vectors_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// As many rows as a row has lanes.
template <typename T>
struct Square {
  static constexpr int side = Vec<T>::size();
  typedef T Lanes __attribute__((vector_size(side * sizeof(T))));

  Lanes rows[side];

  void put(int i, const Vec<T>& row) { __builtin_memcpy(&rows[i], &row, sizeof(Lanes)); }

  Vec<T> row(int i) const {
    Vec<T> result;
    __builtin_memcpy(&result, &rows[i], sizeof(Lanes));
    return result;
  }

  // Each step swaps, between rows i and i + width, the lanes whose numbers differ by `width`.
  template <int width = side / 2>
  ALWAYS_INLINE void transpose() {
    UNROLLED_FOR(i, side) {
      if (!(i & width)) swap_lanes<width>(rows[i], rows[i + width], std::make_integer_sequence<int, side>());
    }
    if constexpr (width > 1) transpose<width / 2>();
  }

  // Row 0 gets the sums of the rows' lanes: lane i that of row i. The steps are those of transpose(), and after each
  // the rows that swapped are added.
  template <int width = side / 2>
  ALWAYS_INLINE void sum_lanes() {
    UNROLLED_FOR(i, width) {
      swap_lanes<width>(rows[i], rows[i + width], std::make_integer_sequence<int, side>());
      rows[i] += rows[i + width];
    }
    if constexpr (width > 1) sum_lanes<width / 2>();
  }

  template <int width, int... lane>
  static ALWAYS_INLINE void swap_lanes(Lanes& a, Lanes& b, std::integer_sequence<int, lane...>) {
    const Lanes before = a;
#if __has_builtin(__builtin_shufflevector)
    a = __builtin_shufflevector(before, b, (lane & width ? side + lane - width : lane)...);
    b = __builtin_shufflevector(before, b, (lane & width ? side + lane : lane + width)...);
#else  // GCC 11
    typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> Numbers __attribute__((vector_size(sizeof(Lanes))));
    a = __builtin_shuffle(before, b, Numbers{(lane & width ? side + lane - width : lane)...});
    b = __builtin_shuffle(before, b, Numbers{(lane & width ? side + lane : lane + width)...});
#endif
  }
};

// `count` consecutive elements in the arithmetic's type, a whole vector where that is all of them.
template <bool whole, typename S>
ALWAYS_INLINE Vec<Arithmetic<S>> load_lanes(const S* from, int64_t count) {
  using T = Arithmetic<S>;
  if constexpr (std::is_same_v<S, T>) {
    return whole ? Vec<T>::loadu(from) : Vec<T>::loadu(from, count);
  } else if constexpr (whole) {
    Vec<float> wide;
    at::vec::load_to_float<S>(from, wide);
    return wide;
  } else {
    T wide[Vec<T>::size()] = {};
    for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<T>(from[i]);
    return Vec<T>::loadu(wide);
  }
}

template <bool whole, typename S>
ALWAYS_INLINE void store_lanes(const Vec<Arithmetic<S>>& row, S* to, int64_t count) {
  if constexpr (std::is_same_v<S, Arithmetic<S>>) {
    if constexpr (whole) {
      row.store(to);
    } else {
      row.store(to, static_cast<int>(count));
    }
  } else {
    at::vec::convert_from_float<S>(row, Vec<float>(0)).store(to, static_cast<int>(count));
  }
}

// One block of at most side × side elements.
template <bool whole, typename From, typename To>
void transpose_block(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  using T = Arithmetic<From>;
  constexpr int side = Square<T>::side;
  Square<T> square;
  UNROLLED_FOR(i, side) {
    square.put(i, whole || i < rows ? load_lanes<whole>(from + i * from_pitch, columns) : Vec<T>(0));
  }
  square.transpose();
  UNROLLED_FOR(j, side) {
    if (whole || j < columns) store_lanes<whole>(square.row(j), to + j * to_pitch, whole ? side : rows);
  }
}

// to[j·to_pitch + i] = from[i·from_pitch + j] for rows × columns elements, converted to To.
template <typename From, typename To>
void transpose(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t rows, int64_t columns) {
  constexpr int64_t side = Square<Arithmetic<From>>::side;
  const auto for_each_block = [&](auto whole) {
    for (int64_t i = 0; i < rows; i += side) {
      const int64_t row = larger(0, smaller(i, rows - side));  // the last block overlaps the one before
      for (int64_t j = 0; j < columns; j += side) {
        const int64_t column = larger(0, smaller(j, columns - side));
        transpose_block<whole.value>(from + row * from_pitch + column, from_pitch, to + column * to_pitch + row,
                                     to_pitch, smaller(rows, side), smaller(columns, side));
      }
    }
  };
  if (rows >= side && columns >= side) {
    for_each_block(std::true_type());
  } else {
    for_each_block(std::false_type());
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
