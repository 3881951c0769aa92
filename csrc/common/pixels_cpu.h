// Tiles of maps as pixels in cache: every pixel with all its channels one after the other, filled up with
// zeros to whole vectors, whatever the map's type and strides. Vectors run along channels, so that a 1×1
// convolution, both its gradients and a depthwise convolution need no sum over the lanes of a vector.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/planes_cpu.h"
#include "common/workspace_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// Accumulators of a product: rows × vectors of columns, all of them in registers.
template <int vectors>
constexpr int product_block = vectors == 3 ? (many_registers ? 8 : 4) : (many_registers ? 12 : 6);
constexpr int most_vectors = 3;
constexpr int64_t row_step = many_registers ? 24 : 12;  // products read and write rows up to a multiple of this

template <typename T>
int64_t channel_pitch(int64_t channels) {
  return round_up(channels, Vec<T>::size());
}

// Rows go up to a multiple of the block.
template <bool transposed, typename T, int vectors, int block = product_block<vectors>, typename Finish>
void multiply_columns(const T* a, int64_t a_pitch, int64_t rows, const T* b, int64_t b_pitch, int64_t depth,
                      Finish finish) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t row = 0; row < rows; row += block) {
    const T* left = a + (transposed ? row : row * a_pitch);
    const T* right = b;
    Vec<T> sum[block][vectors];
    UNROLLED_FOR(r, block) UNROLLED_FOR(v, vectors) { sum[r][v] = Vec<T>(0); }
    for (int64_t k = 0; k < depth; ++k, left += transposed ? a_pitch : 1, right += b_pitch) {
      Vec<T> value[vectors];
      UNROLLED_FOR(v, vectors) { value[v] = load_once(right + v * lanes); }
      UNROLLED_FOR(r, block) {
        const Vec<T> factor(left[transposed ? r : r * a_pitch]);
        UNROLLED_FOR(v, vectors) { sum[r][v] = at::vec::fmadd(factor, value[v], sum[r][v]); }
      }
    }
    UNROLLED_FOR(r, block) UNROLLED_FOR(v, vectors) { finish(row + r, v * lanes, sum[r][v]); }
  }
}

// Calls finish(row, column, sum) with vectors of Σ_k A[row, k] · b[k·b_pitch + column]; A[row, k] is
// a[row·a_pitch + k], or a[k·a_pitch + row] if transposed. Columns are whole vectors, rows go up to a
// multiple of row_step.
template <bool transposed, typename T, typename Finish>
void multiply_pixels(const T* a, int64_t a_pitch, int64_t rows, const T* b, int64_t b_pitch, int64_t columns,
                     int64_t depth, Finish finish) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t column = 0; column < columns;) {
    const auto shifted = [&](int64_t row, int64_t c, const Vec<T>& sum) { finish(row, column + c, sum); };
    const int64_t left = (columns - column) / lanes;
    if (left >= most_vectors) {
      multiply_columns<transposed, T, 3>(a, a_pitch, rows, b + column, b_pitch, depth, shifted);
      column += 3 * lanes;
    } else if (left == 2) {
      multiply_columns<transposed, T, 2>(a, a_pitch, rows, b + column, b_pitch, depth, shifted);
      column += 2 * lanes;
    } else {
      multiply_columns<transposed, T, 1>(a, a_pitch, rows, b + column, b_pitch, depth, shifted);
      column += lanes;
    }
  }
}

// sums[i·pitch + j] += Σ_pixels a[pixel, i] · b[pixel, j] for i below rows
template <typename T>
void add_pixel_products(const T* a, int64_t a_pitch, int64_t rows, const T* b, int64_t pitch, int64_t pixels, T* sums) {
  multiply_pixels<true>(a, a_pitch, rows, b, pitch, pitch, pixels, [&](int64_t i, int64_t j, const Vec<T>& sum) {
    if (i < rows) (Vec<T>::loadu(sums + i * pitch + j) + sum).store(sums + i * pitch + j);
  });
}

// sums[j] += Σ_pixels a[pixel, j]
template <typename T>
void add_pixels(const T* a, int64_t pitch, int64_t pixels, T* sums) {
  for (int64_t j = 0; j < pitch; j += Vec<T>::size()) {
    Vec<T> sum(0);
    for (int64_t p = 0; p < pixels; ++p) sum = sum + Vec<T>::loadu(a + p * pitch + j);
    (Vec<T>::loadu(sums + j) + sum).store(sums + j);
  }
}

// Room for so many pixels of `pitch` channels, and for what products and vectors touch beyond the last one.
template <typename T>
T* take_pixels(Arena& arena, int64_t pixels, int64_t pitch) {
  return arena.take<T>((round_up(pixels, row_step) + 8) * pitch + row_step);
}

// A matrix [rows, columns], or its transpose, as right-hand side of products: columns filled up with zeros.
template <typename S, typename T>
void fill_matrix(const void* from, int64_t rows, int64_t columns, bool transposed, T* matrix) {
  const S* source = static_cast<const S*>(from);
  const int64_t pitch = channel_pitch<T>(transposed ? rows : columns);
  for (int64_t k = 0; k < (transposed ? columns : rows); ++k)
    for (int64_t j = transposed ? rows : columns; j < pitch; ++j) matrix[k * pitch + j] = T(0);
  if (transposed) {
    transpose(source, columns, matrix, pitch, rows, columns);
  } else {
    for (int64_t k = 0; k < rows; ++k) convert_row(source + k * columns, matrix + k * pitch, columns);
  }
}

// A vector, filled up with zeros; zeros alone from null.
template <typename S, typename T>
void fill_vector(const void* from, int64_t count, T* vector) {
  const S* source = static_cast<const S*>(from);
  for (int64_t j = 0; j < channel_pitch<T>(count); ++j)
    vector[j] = source && j < count ? static_cast<T>(source[j]) : T(0);
}

// Sums of every task one after the other, `size` of them each. Part of them, as rows × columns that lie
// `pitch` apart, becomes a contiguous tensor, unless that is null.
struct SummedTensor {
  void* out;
  int64_t place;
  int64_t rows;
  int64_t columns;
  int64_t pitch;
};

// The second stage: sums of the tasks in [first, last) are added in their order.
template <typename S, typename T, int count>
void add_up(const T* sums, int64_t size, int64_t first, int64_t last, const SummedTensor (&tensors)[count],
            int threads) {
  constexpr int64_t chunk = 64;
  int64_t rows = 0;
  for (const SummedTensor& tensor : tensors) rows += tensor.out ? tensor.rows : 0;
  const int64_t share = divide_up(rows, 4 * threads);
  parallel_tasks(divide_up(rows, larger(share, 1)), threads, [&](int64_t task, int) {
    int64_t before = 0;
    for (const SummedTensor& tensor : tensors) {
      if (!tensor.out) continue;
      const int64_t end = smaller(tensor.rows, (task + 1) * share - before);
      for (int64_t row = larger(0, task * share - before); row < end; ++row) {
        for (int64_t column = 0; column < tensor.columns; column += chunk) {
          const int64_t width = smaller(chunk, tensor.columns - column);
          double total[chunk] = {};
          for (int64_t i = first; i < last; ++i) {
            const T* part = sums + i * size + tensor.place + row * tensor.pitch + column;
            for (int64_t j = 0; j < width; ++j) total[j] += part[j];
          }
          S* out = static_cast<S*>(tensor.out) + row * tensor.columns + column;
          for (int64_t j = 0; j < width; ++j) out[j] = static_cast<S>(total[j]);
        }
      }
      before += tensor.rows;
    }
  });
}

// One pixel's channels, filled up with zeros to whole vectors.
template <typename S, typename T>
ALWAYS_INLINE void load_channels(const S* from, int64_t channels, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    int64_t c = 0;
    for (; c + Vec<T>::size() <= channels; c += Vec<T>::size()) Vec<T>::loadu(from + c).store(to + c);
    if (c < channels) Vec<T>::loadu(from + c, channels - c).store(to + c);
  } else {
    convert_row(from, to, channels);
    for (int64_t c = channels; c < channel_pitch<T>(channels); ++c) to[c] = T(0);
  }
}

template <typename S, typename T>
ALWAYS_INLINE void store_channels(const T* from, int64_t channels, S* to) {
  if constexpr (std::is_same_v<S, T>) {
    int64_t c = 0;
    for (; c + Vec<T>::size() <= channels; c += Vec<T>::size()) Vec<T>::loadu(from + c).store(to + c);
    if (c < channels) Vec<T>::loadu(from + c).store(to + c, static_cast<int>(channels - c));
  } else {
    convert_row(from, to, channels);
  }
}

// Reads rows × columns of pixels; pixel (i, j) goes to pixels + i·row_pitch + j·pitch. Pixels that lie further
// apart than whole vectors of channels keep what is behind these.
template <typename S, typename T>
void load_pixels(const ConstMapView& map, int64_t channels, const Tile& tile, T* pixels, int64_t row_pitch,
                 int64_t pitch) {
  const int64_t filled = channel_pitch<T>(channels);
  const S* data = static_cast<const S*>(map.data) + tile.sample * map.stride_n + tile.row * map.stride_h +
                  tile.column * map.stride_w;
  for (int64_t i = 0; i < tile.height; ++i, data += map.stride_h, pixels += row_pitch) {
    if (map.stride_c == 1 && map.stride_w == pitch && channels == pitch) {
      convert_row(data, pixels, tile.width * pitch);
      continue;
    }
    if (map.stride_c == 1) {
      for (int64_t j = 0; j < tile.width; ++j) load_channels(data + j * map.stride_w, channels, pixels + j * pitch);
      continue;
    }
    if (channels < filled) {
      for (int64_t j = 0; j < tile.width; ++j) Vec<T>(0).store(pixels + j * pitch + filled - Vec<T>::size());
    }
    if (map.stride_w == 1) {
      transpose(data, map.stride_c, pixels, pitch, channels, tile.width);
    } else {
      for (int64_t j = 0; j < tile.width; ++j)
        for (int64_t c = 0; c < channels; ++c)
          pixels[j * pitch + c] = static_cast<T>(data[j * map.stride_w + c * map.stride_c]);
    }
  }
}

template <typename S, typename T>
void load_pixels(const ConstMapView& map, int64_t channels, const Tile& tile, T* pixels, int64_t row_pitch) {
  load_pixels<S>(map, channels, tile, pixels, row_pitch, channel_pitch<T>(channels));
}

// Writes rows × columns of pixels.
template <typename S, typename T>
void store_pixels(const T* pixels, int64_t row_pitch, int64_t channels, const Tile& tile, const MapView& map) {
  const int64_t pitch = channel_pitch<T>(channels);
  S* data =
      static_cast<S*>(map.data) + tile.sample * map.stride_n + tile.row * map.stride_h + tile.column * map.stride_w;
  for (int64_t i = 0; i < tile.height; ++i, data += map.stride_h, pixels += row_pitch) {
    if (map.stride_c == 1 && map.stride_w == pitch && channels == pitch) {
      convert_row(pixels, data, tile.width * pitch);
    } else if (map.stride_c == 1) {
      for (int64_t j = 0; j < tile.width; ++j) store_channels(pixels + j * pitch, channels, data + j * map.stride_w);
    } else if (map.stride_w == 1) {
      transpose(pixels, pitch, data, map.stride_c, tile.width, channels);
    } else {
      for (int64_t j = 0; j < tile.width; ++j)
        for (int64_t c = 0; c < channels; ++c)
          data[j * map.stride_w + c * map.stride_c] = static_cast<S>(pixels[j * pitch + c]);
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
