// Tiles of maps as planes in cache: for one tile, every channel becomes a plane of the arithmetic's
// type, surrounded by a halo of `radius` pixels with zeros outside the image.
//
// Whatever the map's type and strides, kernels then see one layout only, and a shift by (dy, dx) is
// the constant dy·pitch + dx, so that vectors run over the ends of rows. What they compute between
// two rows is never stored.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/tensor_view.h"
#include "common/transpose_cpu.h"
#include "common/vectors_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

struct Tile {
  int64_t sample;
  int64_t row;     // of its first pixel
  int64_t column;  // of its first pixel
  int64_t height;
  int64_t width;
};

// How an image is cut into tiles: a function of shapes alone.
struct Tiling {
  int64_t image_height;
  int64_t image_width;
  int64_t tile_height;
  int64_t tile_width;

  // Tiles of about `pixels` pixels, at most `widest` wide, of nearly equal size.
  Tiling(int64_t image_height, int64_t image_width, int64_t pixels, int64_t widest)
      : image_height(image_height), image_width(image_width) {
    tile_width = divide_up(image_width, divide_up(image_width, widest));
    const int64_t rows = smaller(image_height, larger(1, pixels / tile_width));
    tile_height = divide_up(image_height, divide_up(image_height, rows));
  }

  int64_t columns() const { return divide_up(image_width, tile_width); }
  int64_t tiles() const { return divide_up(image_height, tile_height) * columns(); }  // per sample

  Tile tile(int64_t sample, int64_t index) const {
    const int64_t row = index / columns() * tile_height;
    const int64_t column = index % columns() * tile_width;
    return {sample, row, column, smaller(tile_height, image_height - row), smaller(tile_width, image_width - column)};
  }
};

// Places of a tile's pixels in a plane: pixel (i, j) of the tile lies at begin + i·pitch + j.
struct Planes {
  static constexpr int64_t line = 64 / sizeof(float);  // elements, a whole number of cache lines for all types
  static constexpr int64_t slack = 8 * line;           // vectors may run this far over the end of the last row

  int64_t radius;
  int64_t pitch;
  int64_t begin;   // of a vector that is aligned
  int64_t stride;  // from plane to plane

  Planes(const Tiling& tiling, int64_t radius) : radius(radius), pitch(tiling.tile_width + 2 * radius) {
    begin = round_up(radius * pitch + radius, line);
    const int64_t lines = divide_up(begin - radius + (tiling.tile_height + radius) * pitch + slack, line) + 1;
    stride = (lines | 1) * line;  // odd: a power of two would map all planes to the same few sets of the cache
  }

  int64_t end(const Tile& tile) const { return begin + (tile.height - 1) * pitch + tile.width; }  // of the pixels
  int64_t end_of_halo(const Tile& tile) const { return begin - radius + (tile.height + radius) * pitch; }
};

// Whole vectors: up to one vector less one element too many.
template <typename T>
void fill_zero(T* data, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec<T>::size()) Vec<T>(0).store(data + i);
}

// Consecutive elements, to or from the arithmetic's type.
template <typename From, typename To>
void convert_row(const From* from, To* to, int64_t count) {
  constexpr int64_t lanes = Vec<float>::size();
  if constexpr (std::is_same_v<From, To>) {
    __builtin_memcpy(to, from, count * sizeof(To));
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<To, float>) {
      for (; i + lanes <= count; i += lanes) {
        Vec<float> wide;
        at::vec::load_to_float<From>(from + i, wide);
        wide.store(to + i);
      }
    } else {
      for (; i + lanes <= count; i += lanes)
        at::vec::convert_from_float<To>(Vec<float>::loadu(from + i), Vec<float>(0)).store(to + i, lanes);
    }
    for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// Copies the rows [row, row + height) × columns [column, column + width) of `channels` channels of a
// map to planes, where the first element of the first row goes to planes[0].
template <typename S, typename T>
void copy_to_planes(const ConstMapView& map, int64_t sample, int64_t channel, int64_t channels, int64_t row,
                    int64_t height, int64_t column, int64_t width, T* planes, int64_t stride, int64_t pitch) {
  const S* data = static_cast<const S*>(map.data) + sample * map.stride_n + channel * map.stride_c +
                  row * map.stride_h + column * map.stride_w;
  if (map.stride_w == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height; ++i)
        convert_row(data + c * map.stride_c + i * map.stride_h, planes + c * stride + i * pitch, width);
  } else if (map.stride_c == 1) {
    for (int64_t i = 0; i < height; ++i)
      transpose(data + i * map.stride_h, map.stride_w, planes + i * pitch, stride, width, channels);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j)
          planes[c * stride + i * pitch + j] =
              static_cast<T>(data[c * map.stride_c + i * map.stride_h + j * map.stride_w]);
  }
}

// Reads a tile's pixels of `channels` channels, leaving everything around them as it is.
template <typename S, typename T>
void load_tile(const ConstMapView& map, int64_t channel, int64_t channels, const Tile& tile, const Planes& layout,
               T* planes) {
  copy_to_planes<S>(map, tile.sample, channel, channels, tile.row, tile.height, tile.column, tile.width,
                    planes + layout.begin, layout.stride, layout.pitch);
}

// Reads a tile's pixels and its halo, zeros where there is no image, and zeros to the end of the slack.
template <typename S, typename T>
void load_tile_with_halo(const ConstMapView& map, int64_t channel, int64_t channels, const Tile& tile,
                         const Tiling& tiling, const Planes& layout, T* planes) {
  const int64_t first_row = larger(0, tile.row - layout.radius);
  const int64_t first_column = larger(0, tile.column - layout.radius);
  const int64_t height = smaller(tiling.image_height, tile.row + tile.height + layout.radius) - first_row;
  const int64_t width = smaller(tiling.image_width, tile.column + tile.width + layout.radius) - first_column;
  const int64_t begin = layout.begin + (first_row - tile.row) * layout.pitch + first_column - tile.column;
  const int64_t end = begin + (height - 1) * layout.pitch + width;
  for (int64_t c = 0; c < channels; ++c) {
    T* plane = planes + c * layout.stride;
    fill_zero(plane, begin);
    for (int64_t i = 1; i < height; ++i)
      fill_zero(plane + begin + (i - 1) * layout.pitch + width, layout.pitch - width);
    fill_zero(plane + end, layout.end_of_halo(tile) + Planes::slack - end);
  }
  copy_to_planes<S>(map, tile.sample, channel, channels, first_row, height, first_column, width, planes + begin,
                    layout.stride, layout.pitch);
}

// The reverse of copy_to_planes.
template <typename S, typename T>
void copy_from_planes(const T* planes, int64_t stride, int64_t pitch, const MapView& map, int64_t sample,
                      int64_t channel, int64_t channels, int64_t row, int64_t height, int64_t column, int64_t width) {
  S* data = static_cast<S*>(map.data) + sample * map.stride_n + channel * map.stride_c + row * map.stride_h +
            column * map.stride_w;
  if (map.stride_w == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height; ++i)
        convert_row(planes + c * stride + i * pitch, data + c * map.stride_c + i * map.stride_h, width);
  } else if (map.stride_c == 1) {
    for (int64_t i = 0; i < height; ++i)
      transpose(planes + i * pitch, stride, data + i * map.stride_h, map.stride_w, channels, width);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j)
          data[c * map.stride_c + i * map.stride_h + j * map.stride_w] =
              static_cast<S>(planes[c * stride + i * pitch + j]);
  }
}

// Writes a tile's pixels of `channels` channels.
template <typename S, typename T>
void store_tile(const T* planes, const Planes& layout, const Tile& tile, const MapView& map, int64_t channel,
                int64_t channels) {
  copy_from_planes<S>(planes + layout.begin, layout.stride, layout.pitch, map, tile.sample, channel, channels, tile.row,
                      tile.height, tile.column, tile.width);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
