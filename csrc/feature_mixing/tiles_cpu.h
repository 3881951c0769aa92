// Tiles and tasks of feature mixing.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include "common/kernel_of_type_cpu.h"
#include "common/pixels_cpu.h"
#include "feature_mixing/feature_mixing.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t most_groups = 32;  // of tiles, with sums of their own

// Pixels of a tile that needs so many bytes for each: they stay in the second-level cache, and small maps
// give several threads something to do.
inline int64_t tile_pixels(const FeatureMixingShape& shape, int64_t bytes_per_pixel, int64_t fewest) {
  constexpr int64_t parts = 4;
  const int64_t share = divide_up(shape.batch * shape.height * shape.width, parts);
  return larger(fewest, smaller(cache / bytes_per_pixel, share));
}

template <typename Map>
bool rows_follow(const Map& map, const FeatureMixingShape& shape) {
  return !map.data || map.stride_h == shape.width * map.stride_w;
}

// Pixels apart from their neighbours: where all rows follow each other, the map is a single one.
inline Tiling pointwise_tiling(const FeatureMixingShape& shape, int64_t bytes_per_pixel, bool is_one_row) {
  const int64_t pixels = tile_pixels(shape, bytes_per_pixel, 2 * row_step);
  if (is_one_row) return Tiling(1, shape.height * shape.width, pixels, pixels);
  return Tiling(shape.height, shape.width, pixels, 64);
}

// The same for what sums nothing over pixels: tiles so small that the processor fetches the next one while it
// computes, and of whole blocks of a product.
inline Tiling small_pointwise_tiling(const FeatureMixingShape& shape, int64_t bytes_per_pixel, bool is_one_row) {
  constexpr int64_t first_level_cache = 1 << 16;
  Tiling tiling = pointwise_tiling(shape, bytes_per_pixel * (cache / first_level_cache), is_one_row);
  if (is_one_row) tiling.tile_width = smaller(tiling.image_width, round_up(tiling.tile_width, row_step));
  return tiling;
}

// Consecutive tiles of one sample, whose sums a task adds up: a function of shapes alone.
struct Groups {
  int64_t tiles;       // of a sample
  int64_t per_sample;  // groups

  Groups(const FeatureMixingShape& shape, const Tiling& tiling)
      : tiles(tiling.tiles()), per_sample(smaller(tiles, larger(1, most_groups / larger(1, shape.batch)))) {}

  int64_t first_tile(int64_t group) const { return group * tiles / per_sample; }
};

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
