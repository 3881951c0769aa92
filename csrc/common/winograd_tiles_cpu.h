// Winograd's minimal filtering (see winograd_cpu.h) of maps as pixels in cache (see pixels_cpu.h): all tiles of a
// strip are transformed, so that their products at each point are those of matrices. Inputs and results of a tile
// lie `dilation` apart: tiles of a dilated convolution interleave.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/pixels_cpu.h"
#include "common/winograd_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// How a map is cut into tiles; those at its end may reach over it, by up to `dilation` pixels, and their
// inputs by twice that.
struct WinogradTiles {
  int64_t height, width, dilation;

  int64_t along(int64_t size) const {
    return size / (2 * dilation) * dilation + smaller(size % (2 * dilation), dilation);
  }
  int64_t first(int64_t index) const { return index / dilation * 2 * dilation + index % dilation; }
  int64_t count() const { return along(height) * along(width); }
  int64_t row(int64_t tile) const { return first(tile / along(width)); }  // of the first result
  int64_t column(int64_t tile) const { return first(tile % along(width)); }
};

// Values [points, tiles, channels] of some tiles.
template <typename T>
struct Transformed {
  T* values;
  int64_t pitch;   // of a tile
  int64_t stride;  // of a point

  Transformed from_channel(int64_t channel) const { return {values + channel, pitch, stride}; }

  // Room for so many tiles, and for what products touch beyond the last one.
  static Transformed take(Arena& arena, int64_t tiles, int64_t channels) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t pitch = channel_pitch<T>(channels);
    // odd lines: a power of two would map all points to the same few sets of the cache
    const int64_t stride = (divide_up(round_up(tiles, row_step) * pitch, line) | 1) * line;
    return {arena.take<T>(winograd_points * stride + row_step), pitch, stride};
  }
};

// Transforms `channels` channels of side × side pixels, from `pixels` on for the tile at (0, 0), for the tiles in
// [first, last).
template <int side, typename T, typename Transform>
void transform_tiles(Transform transform, const T* pixels, int64_t row_pitch, int64_t pitch, int64_t channels,
                     const WinogradTiles& tiles, int64_t first, int64_t last, const Transformed<T>& transformed) {
  constexpr int64_t lanes = Vec<T>::size();
  const int64_t below = tiles.dilation * row_pitch, beside = tiles.dilation * pitch;
  for (int64_t tile = first; tile < last; ++tile) {
    const T* const from = pixels + tiles.row(tile) * row_pitch + tiles.column(tile) * pitch;
    T* const to = transformed.values + (tile - first) * transformed.pitch;
    for (int64_t c = 0; c < channels; c += lanes) {
      const auto store = [&](int i, int j, const Vec<T>& value) {
        value.store(to + (i * winograd_tile + j) * transformed.stride + c);
      };
      const int64_t left = channels - c;
      if (left >= lanes) {
        transform_both<side, winograd_tile, Vec<T>>(
            transform, [&](int i, int j) { return Vec<T>::loadu(from + i * below + j * beside + c); }, store);
      } else {
        transform_both<side, winograd_tile, Vec<T>>(
            transform, [&](int i, int j) { return Vec<T>::loadu(from + i * below + j * beside + c, left); }, store);
      }
    }
  }
}

// product[point, tile, column] = Σ_k values[point, tile, k] · filters[point, k, column]
template <typename T>
void multiply_tiles(const Transformed<T>& values, int64_t tiles, const T* filters, int64_t columns, int64_t depth,
                    const Transformed<T>& product) {
  for (int point = 0; point < winograd_points; ++point) {
    T* const out = product.values + point * product.stride;
    multiply_pixels<false>(
        values.values + point * values.stride, values.pitch, tiles, filters + point * depth * columns, columns, columns,
        depth,
        [&](int64_t tile, int64_t column, const Vec<T>& sum) { sum.store(out + tile * product.pitch + column); });
  }
}

// Calls finish(row, column, channel, sum) with vectors of the results of the tiles in [first, last).
template <typename T, typename Finish>
void finish_tiles(const Transformed<T>& product, int64_t channels, const WinogradTiles& tiles, int64_t first,
                  int64_t last, Finish finish) {
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tiles.row(tile), column = tiles.column(tile);
    const T* const from = product.values + (tile - first) * product.pitch;
    for (int64_t c = 0; c < channels; c += Vec<T>::size()) {
      transform_both<winograd_tile, winograd_outputs, Vec<T>>(
          [](const auto& in, auto& out) { transform_products(in, out); },
          [&](int i, int j) { return Vec<T>::loadu(from + (i * winograd_tile + j) * product.stride + c); },
          [&](int i, int j, const Vec<T>& sum) {
            const int64_t y = row + i * tiles.dilation, x = column + j * tiles.dilation;
            if (y < tiles.height && x < tiles.width) finish(y, x, c, sum);
          });
    }
  }
}

// filters[point, k, output] of a weight [outputs, depth, 3, 3]: outputs filled up with zeros.
template <typename S, typename T>
void fill_filters(const S* weight, int64_t outputs, int64_t depth, T* filters) {
  constexpr int64_t lanes = Vec<T>::size(), taps = winograd_side * winograd_side, block = 16;
  const int64_t pitch = channel_pitch<T>(outputs);
  for (int64_t output = 0; output < outputs; output += lanes) {
    alignas(64) T turned[block * taps * lanes] = {};
    for (int64_t first = 0; first < depth; first += block) {
      const int64_t count = smaller(block, depth - first);
      transpose(weight + (output * depth + first) * taps, depth * taps, turned, lanes, smaller(lanes, outputs - output),
                count * taps);
      for (int64_t k = 0; k < count; ++k) {
        const T* const filter = turned + k * taps * lanes;
        T* const to = filters + (first + k) * pitch + output;
        transform_both<winograd_side, winograd_tile, Vec<T>>(
            [](const auto& in, auto& out) { transform_weights(in, out); },
            [&](int i, int j) { return Vec<T>::loadu(filter + (i * winograd_side + j) * lanes); },
            [&](int i, int j, const Vec<T>& value) { value.store(to + (i * winograd_tile + j) * depth * pitch); });
      }
    }
  }
}

// The same filters for the convolution back, turned around: flipped[point, output, k].
template <typename T>
void flip_filters(const T* filters, int64_t outputs, int64_t depth, T* flipped, int64_t flipped_pitch) {
  constexpr int mirrored[winograd_tile] = {3, 1, 2, 0};
  const int64_t pitch = channel_pitch<T>(outputs);
  for (int i = 0; i < winograd_tile; ++i)
    for (int j = 0; j < winograd_tile; ++j)
      transpose(filters + (mirrored[i] * winograd_tile + mirrored[j]) * depth * pitch, pitch,
                flipped + (i * winograd_tile + j) * outputs * flipped_pitch, flipped_pitch, depth, outputs);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
