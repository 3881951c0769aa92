// Tiles and tasks of feature mixing, and the choice of a kernel by data type.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

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

// Consecutive tiles of one sample, whose sums a task adds up: a function of shapes alone.
struct Groups {
  int64_t tiles;       // of a sample
  int64_t per_sample;  // groups

  Groups(const FeatureMixingShape& shape, const Tiling& tiling)
      : tiles(tiling.tiles()), per_sample(smaller(tiles, larger(1, most_groups / larger(1, shape.batch)))) {}

  int64_t first_tile(int64_t group) const { return group * tiles / per_sample; }
};

// Calls function with a kernel made for the call's data type.
template <template <typename S> class Kernel, typename Call, typename Function>
auto with_kernel(const Call& call, Function function) {
  switch (call.shape.dtype) {
    case DataType::float64:
      return function(Kernel<double>{call});
    case DataType::bfloat16:
      return function(Kernel<c10::BFloat16>{call});
    default:
      return function(Kernel<float>{call});
  }
}

template <template <typename S> class Kernel, typename Call>
int64_t workspace_bytes(const Call& call, int threads) {
  return with_kernel<Kernel>(call, [&](const auto& kernel) { return kernel.workspace_bytes(threads); });
}

template <template <typename S> class Kernel, typename Call>
void launch(const Call& call, void* workspace, int threads) {
  with_kernel<Kernel>(call, [&](const auto& kernel) { kernel.launch(workspace, threads); });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
