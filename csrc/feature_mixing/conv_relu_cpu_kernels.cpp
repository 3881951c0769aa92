// Compiled once per instruction set. Winograd's F(2×2, 3×3): the weights are transformed once for a call and
// packed by panels of output channels. A task takes a strip of consecutive 4×4 tiles and some of the panels:
// it transforms the tiles into second-level cache, where for each of the 16 points a product over all input
// channels follows, and transforms the products of one panel back at a time. Nothing but the result is
// written to maps, and the two inputs are read where they lie.
//
// Where the weights are larger than the map, it is the other way round: all tiles are transformed once for a
// call, and a task transforms one panel of the weights into its cache, where it is used for all of them.

#include "common/winograd_tiles_cpu.h"
#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int taps = winograd_side * winograd_side;
constexpr int64_t panel_vectors = 2;
constexpr int64_t fewest_tiles = 48;     // of a strip: every strip reads all transformed weights
constexpr int64_t packed_channels = 64;  // at a time: pieces of memory that are worth fetching
constexpr int64_t few_tasks = 8;         // of small maps, whose panels are shared out as well

template <typename S>
struct ConvRelu {
  using T = Arithmetic<S>;
  static constexpr int64_t lanes = Vec<T>::size(), panel = panel_vectors * lanes;

  const ConvReluForward& call;
  const ConvReluShape& shape = call.shape;
  const int64_t depth = shape.channels + shape.joined_channels, columns = channel_pitch<T>(shape.out_channels);
  // one vector more than the channels: a pitch of a power of two would map all pixels to the same few sets of the cache
  const int64_t pitch = channel_pitch<T>(depth) + lanes;
  const int64_t tile_columns = divide_up(shape.width, winograd_outputs);
  const int64_t tiles_of_sample = divide_up(shape.height, winograd_outputs) * tile_columns;
  const int64_t tiles = shape.batch * tiles_of_sample;
  const bool has_few_tiles = tiles <= columns;
  // half of the cache for the transformed tiles, the rest for weights, products and pixels
  const int64_t most_tiles =
      larger(fewest_tiles, cache / 2 / (winograd_points * pitch * static_cast<int64_t>(sizeof(T))));
  const int64_t strips = has_few_tiles ? smaller(tiles, 1) : divide_up(tiles, most_tiles);
  const int64_t strip_tiles = round_up(divide_up(tiles, larger(strips, 1)), row_step);
  const int64_t panels = divide_up(columns, panel);
  const int64_t groups_of_panels = has_few_tiles ? panels : smaller(panels, divide_up(few_tasks, larger(strips, 1)));
  const int64_t tasks = strips * groups_of_panels;
  const int64_t values_pitch = strip_tiles * pitch + lanes;           // from point to point
  const int64_t products_pitch = strip_tiles * panel + lanes;         // from point to point
  const int64_t row_pixels = 2 * smaller(strip_tiles, tile_columns);  // of a strip's results

  // Transformed once for a call: the weights or, where there are few, the tiles.
  struct Shared {
    T *weights, *values, *scale, *shift;
  };

  Shared take_shared(Arena& arena) const {
    return {arena.take<T>(has_few_tiles ? 0 : winograd_points * (depth * columns + panels * lanes)),
            arena.take<T>(has_few_tiles ? winograd_points * values_pitch : 0), arena.take<T>(columns),
            arena.take<T>(columns)};
  }

  struct Scratch {
    T *pixels, *values, *weights, *filters, *products, *results;
  };

  Scratch scratch(Arena& arena) const {
    return {arena.take<T>(winograd_tile * (row_pixels + 2) * pitch),
            arena.take<T>(has_few_tiles ? 0 : winograd_points * values_pitch),
            arena.take<T>(has_few_tiles ? winograd_points * weights_pitch(panel) : 0),
            arena.take<T>(packed_channels * taps * lanes),
            arena.take<T>(winograd_points * products_pitch),
            arena.take<T>(winograd_outputs * row_pixels * panel)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    take_shared(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Shared shared = take_shared(arena);
    if (tiles == 0) return;
    threads = static_cast<int>(smaller(threads, tasks));  // that have a scratch
    const auto in_parallel = [&](int64_t count, auto function) {
      const int64_t bytes = scratch_bytes(*this, 1);
      parallel_tasks(count, threads, [&](int64_t task, int thread) {
        Arena own(arena.rest() + thread * bytes);
        function(task, scratch(own));
      });
    };
    if (has_few_tiles) {
      const int64_t rows = tiles / tile_columns;
      in_parallel(rows, [&](int64_t row, const Scratch& own) {
        transform(row * tile_columns, (row + 1) * tile_columns, own.pixels, shared.values + row * tile_columns * pitch);
      });
    } else {
      in_parallel(columns / lanes, [&](int64_t vector, const Scratch& own) {
        const int64_t column = vector * lanes;
        pack(column, shared.weights + place_of(column / panel * panel), own.filters);
      });
    }
    fill_vector<S>(call.scale, shape.out_channels, shared.scale);
    fill_vector<S>(call.shift, shape.out_channels, shared.shift);
    in_parallel(tasks, [&](int64_t task, const Scratch& own) {
      const int64_t strip = task / groups_of_panels, group = task % groups_of_panels;
      compute(strip * strip_tiles, smaller(tiles, (strip + 1) * strip_tiles), group * panels / groups_of_panels,
              (group + 1) * panels / groups_of_panels, shared, own);
    });
  }

  int64_t panel_width(int64_t column) const { return smaller(panel, columns - column); }
  int64_t weights_pitch(int64_t width) const { return depth * width + lanes; }  // from point to point
  // of the panel that begins there, among all transformed weights
  int64_t place_of(int64_t column) const { return winograd_points * (column * depth + column / panel * lanes); }

  // Panels follow each other, each 16 times [depth, width]. One vector of columns at a time is transformed.
  void pack(int64_t column, T* weights, T* filters) const {
    const int64_t width = panel_width(column / panel * panel);
    const int64_t count = smaller(lanes, shape.out_channels - column);
    // filters are [channels, taps, lanes] or [taps, channels, lanes], as the weights lie
    const int64_t tap_pitch = call.weight_is_channels_last ? packed_channels * lanes : lanes;
    const int64_t channel_pitch = call.weight_is_channels_last ? lanes : taps * lanes;
    const S* const from = static_cast<const S*>(call.weight) + column * depth * taps;
    T* const packed = weights + column % panel;
    if (count < lanes) __builtin_memset(filters, 0, packed_channels * taps * lanes * sizeof(T));
    for (int64_t begin = 0; begin < depth; begin += packed_channels) {
      const int64_t channels = smaller(packed_channels, depth - begin);
      if (call.weight_is_channels_last) {
        for (int tap = 0; tap < taps; ++tap)
          transpose(from + tap * depth + begin, depth * taps, filters + tap * tap_pitch, lanes, count, channels);
      } else {
        transpose(from + begin * taps, depth * taps, filters, lanes, count, channels * taps);
      }
      for (int64_t k = 0; k < channels; ++k) {
        const T* const filter = filters + k * channel_pitch;
        transform_both<winograd_side, winograd_tile, Vec<T>>(
            [](const auto& in, auto& out) { transform_weights(in, out); },
            [&](int i, int j) { return Vec<T>::loadu(filter + (i * winograd_side + j) * tap_pitch); },
            [&](int i, int j, const Vec<T>& value) {
              value.store(packed + (i * winograd_tile + j) * weights_pitch(width) + (begin + k) * width);
            });
      }
    }
  }

  // A part of a strip that lies in one row of tiles.
  struct Segment {
    int64_t sample, row, column, count;
  };

  // A segment as a map of its own.
  static WinogradTiles tiles_of(const Segment& segment) { return {winograd_outputs, 2 * segment.count, 1}; }

  template <typename Function>
  void for_each_segment(int64_t begin, int64_t end, Function function) const {
    for (int64_t tile = begin; tile < end;) {
      const int64_t place = tile % tiles_of_sample, column = place % tile_columns;
      const int64_t count = smaller(end - tile, tile_columns - column);
      function(Segment{tile / tiles_of_sample, place / tile_columns, column, count}, tile - begin);
      tile += count;
    }
  }

  void transform(int64_t begin, int64_t end, T* pixels, T* values) const {
    for_each_segment(begin, end, [&](const Segment& segment, int64_t place) {
      load(segment, pixels);
      transform_tiles<winograd_tile>([](const auto& in, auto& out) { transform_values(in, out); }, pixels,
                                     (2 * segment.count + 2) * pitch, pitch, channel_pitch<T>(depth), tiles_of(segment),
                                     0, segment.count, Transformed<T>{values + place * pitch, pitch, values_pitch});
    });
  }

  void compute(int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, const Shared& shared,
               const Scratch& own) const {
    if (!has_few_tiles) transform(begin, end, own.pixels, own.values);
    const T* const values = has_few_tiles ? shared.values : own.values;
    for (int64_t column = first_panel * panel; column < smaller(columns, last_panel * panel); column += panel) {
      const int64_t width = panel_width(column);
      if (has_few_tiles)
        for (int64_t c = 0; c < width; c += lanes) pack(column + c, own.weights, own.filters);
      const T* const weights = has_few_tiles ? own.weights : shared.weights + place_of(column);
      for (int point = 0; point < winograd_points; ++point) {
        T* const products = own.products + point * products_pitch;
        multiply_pixels<false>(
            values + point * values_pitch, pitch, end - begin, weights + point * weights_pitch(width), width, width,
            depth, [&](int64_t row, int64_t j, const Vec<T>& sum) { sum.store(products + row * width + j); });
      }
      for_each_segment(begin, end, [&](const Segment& segment, int64_t place) {
        finish(segment, own.products + place * width, column, shared, own.results);
      });
    }
  }

  // The pixels that a segment's tiles see, zeros where there is no image.
  void load(const Segment& segment, T* pixels) const {
    const int64_t seen = 2 * segment.count + 2, row_pitch = seen * pitch;
    const int64_t first = larger(0, 2 * segment.column - 1), skipped = first - (2 * segment.column - 1);
    const int64_t width = smaller(shape.width, 2 * segment.column - 1 + seen) - first;
    for (int64_t i = 0; i < winograd_tile; ++i, pixels += row_pitch) {
      const int64_t row = 2 * segment.row - 1 + i;
      if (row < 0 || row >= shape.height) {
        __builtin_memset(pixels, 0, row_pitch * sizeof(T));
        continue;
      }
      __builtin_memset(pixels, 0, skipped * pitch * sizeof(T));
      __builtin_memset(pixels + (skipped + width) * pitch, 0, (seen - skipped - width) * pitch * sizeof(T));
      const Tile tile{segment.sample, row, first, 1, width};
      load_pixels<S>(call.x, shape.channels, tile, pixels + skipped * pitch, 0, pitch);
      if (shape.joined_channels)
        load_pixels<S>(call.joined, shape.joined_channels, tile, pixels + skipped * pitch + shape.channels, 0, pitch);
    }
  }

  void finish(const Segment& segment, T* products, int64_t column, const Shared& shared, T* results) const {
    const int64_t width = panel_width(column), channels = smaller(panel, shape.out_channels - column);
    const int64_t row_pitch = 2 * segment.count * width;
    finish_tiles(
        Transformed<T>{products, width, products_pitch}, width, tiles_of(segment), 0, segment.count,
        [&](int64_t i, int64_t j, int64_t c, const Vec<T>& sum) {
          const Vec<T> scale = Vec<T>::loadu(shared.scale + column + c);
          const Vec<T> shift = Vec<T>::loadu(shared.shift + column + c);
          at::vec::maximum(at::vec::fmadd(sum, scale, shift), Vec<T>(0)).store(results + i * row_pitch + j * width + c);
        });
    MapView y = call.y;
    y.data = static_cast<S*>(y.data) + column * y.stride_c;
    const Tile tile{segment.sample, 2 * segment.row, 2 * segment.column, smaller(2, shape.height - 2 * segment.row),
                    smaller(2 * segment.count, shape.width - 2 * segment.column)};
    store_pixels<S>(results, row_pitch, channels, tile, y);
  }
};

}  // namespace

extern const ConvReluCpuKernels conv_relu_kernels;
const ConvReluCpuKernels conv_relu_kernels = {
    {workspace_bytes<ConvRelu, ConvReluForward>, launch<ConvRelu, ConvReluForward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
