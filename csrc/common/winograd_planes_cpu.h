// Winograd's minimal filtering (see winograd_cpu.h) with vectors that run along tiles, so that no number of channels
// leaves lanes empty. A map lies in memory as four planes for each channel, of the pixels in every second row and
// column: what a tile reads lies at its place in them, or at a constant distance from it.
//
// Places of tiles follow each other, with one column more than the map has tiles, so that the map's pixels are
// surrounded by zeros. Where a row of tiles is no whole vectors, these run over its end.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <utility>

#include "common/pixels_cpu.h"
#include "common/winograd_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int phases = winograd_outputs * winograd_outputs;  // planes of a channel, pixels of a tile's result
constexpr int filter_rows = many_registers ? 10 : 5;         // of a product in registers: they divide MITNet's widths
constexpr int sum_rows = many_registers ? 4 : 2, sum_columns = 4;  // the same where products are summed over tiles
constexpr int64_t gradient_rows = 40;  // of the left factor of such products, transformed at a time

// Places of some samples' tiles with rows in [first_row − 1, first_row + rows + 2). Pixel (i, j) of the 4×4 that a
// tile reads lies in plane (i % 2, j % 2), i / 2 · columns + j / 2 places after the tile's own; the first pixel of its
// result is number (1, 1) of them.
struct TilePlaces {
  int64_t height, width;  // of the map, pixels
  int64_t samples, first_row, rows;
  int64_t tile_columns = divide_up(width, winograd_outputs), columns = tile_columns + 1;
  int64_t of_sample = all_rows() * columns + 32;  // vectors run over the end of the last row

  int64_t all_rows() const { return rows + 3; }
  int64_t place(int64_t sample, int64_t row) const { return sample * of_sample + (row - first_row + 1) * columns; }
};

// A map's planes: [channels, phases, places].
template <typename T>
struct TilePlanes {
  T* values;
  int64_t channels, all_channels;  // whole blocks of sums, the last ones zeros
  int64_t plane;                   // elements from one to the next

  static TilePlanes take(Arena& arena, const TilePlaces& places, int64_t channels) {
    constexpr int64_t line = 64 / sizeof(T);
    // odd lines: a power of two would map all planes to the same few sets of the cache
    const int64_t plane = (divide_up(places.samples * places.of_sample, line) | 1) * line;
    const int64_t all_channels = round_up(channels, sum_columns);
    return {arena.take<T>(all_channels * phases * plane), channels, all_channels, plane};
  }

  // Pixel (i, j) of what the tiles read, in the order of their places.
  T* pixel(const TilePlaces& places, int64_t channel, int i, int j) const {
    return values + (channel * phases + i % 2 * winograd_outputs + j % 2) * plane + i / 2 * places.columns + j / 2;
  }

  // Zeros in rows [first, last) of all samples' places and one place behind, which is left of the map, and in all of
  // the channels that are none.
  void clear(const TilePlaces& places, int64_t first, int64_t last, int threads) const {
    const int64_t begin = first * places.columns;
    const int64_t count = (last < places.all_rows() ? last * places.columns + 1 : places.of_sample) - begin;
    parallel_tasks(all_channels, threads, [&](int64_t channel, int) {
      for (int64_t phase = channel * phases; phase < (channel + 1) * phases; ++phase) {
        if (channel >= channels) __builtin_memset(values + phase * plane, 0, plane * sizeof(T));
        for (int64_t sample = 0; sample < places.samples && channel < channels; ++sample)
          __builtin_memset(values + phase * plane + sample * places.of_sample + begin, 0, count * sizeof(T));
      }
    });
  }

  // Zeros left and right of the map.
  void clear_sides(const TilePlaces& places, int threads) const {
    parallel_tasks(channels, threads, [&](int64_t channel, int) {
      for (int i = 0; i < winograd_outputs; ++i) {
        T* const left = values + (channel * phases + i * winograd_outputs) * plane;
        for (int64_t sample = 0; sample < places.samples; ++sample) {
          for (int64_t row = 0; row < places.all_rows(); ++row) {
            const int64_t place = sample * places.of_sample + row * places.columns;
            left[place] = left[plane + place + places.tile_columns] = T(0);
          }
        }
      }
    });
  }

  // Moves rows of one sample up, to rows [first, last) of places that begin `step` rows further down.
  void move(const TilePlaces& places, int64_t step, int64_t first, int64_t last) const {
    for (int64_t phase = 0; phase < channels * phases; ++phase) {
      T* const to = values + phase * plane + first * places.columns;
      __builtin_memmove(to, to + step * places.columns, (last - first) * places.columns * sizeof(T));
    }
  }
};

// So many places of one sample from one on, in runs of consecutive ones between which some are left out.
struct Strip {
  int64_t sample, place, count;
  int64_t first_run, run, left_out;

  // Calls function(n, place, count) for each run, which begins with the strip's place number n.
  template <typename Function>
  ALWAYS_INLINE void for_each_run(Function function) const {
    int64_t at = place, length = smaller(first_run, count);
    for (int64_t n = 0; n < count; n += length, at += length + left_out, length = smaller(run, count - n))
      function(n, at, length);
  }
};

// The tiles with rows in [first_row, last_row) of all samples, cut into strips of nearly equal size.
template <typename T>
struct Strips {
  static constexpr int64_t lanes = Vec<T>::size();

  const TilePlaces& places;
  int64_t first_row, last_row, most_vectors;
  bool runs_over = places.tile_columns % lanes != 0;  // the ends of rows
  int64_t row = runs_over ? places.columns : places.tile_columns;
  int64_t tiles = larger(0, last_row - first_row) * row;
  int64_t vectors = divide_up(tiles, lanes);
  int64_t of_sample = divide_up(vectors, most_vectors);
  int64_t count = places.samples * of_sample;

  Strip operator[](int64_t index) const {
    const int64_t sample = index / of_sample, part = index % of_sample;
    const int64_t first = part * vectors / of_sample * lanes;
    const int64_t count = smaller(tiles, (part + 1) * vectors / of_sample * lanes) - first;
    const int64_t begin = places.place(sample, first_row);
    if (runs_over) return {sample, begin + first, count, count, count, 0};
    return {sample, begin + first / row * places.columns + first % row,
            count,  row - first % row,
            row,    places.columns - row};
  }
};

// Values of a strip's tiles: [points, rows, places], for the points of minimal filtering or the pixels of results.
template <typename T>
struct StripValues {
  T* values;
  int64_t pitch;   // of a row
  int64_t stride;  // of a point

  static StripValues take(Arena& arena, int64_t points, int64_t rows, int64_t vectors) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t pitch = (vectors | 1) * Vec<T>::size();
    // products write whole blocks of rows, what is summed comes in whole blocks of sums, vectors run over the last row
    const int64_t all_rows = round_up(round_up(rows, sum_columns), 2 * filter_rows);
    const int64_t stride = (divide_up(all_rows * pitch + Vec<T>::size(), line) | 1) * line;
    return {arena.take<T>(points * stride), pitch, stride};
  }

  T* row(int64_t point, int64_t row) const { return values + point * stride + row * pitch; }
};

// Splits a row's pixels into those of even and of odd columns, `count` of each with zeros behind the last, for channels
// that lie `stride` apart.
template <typename S, typename T>
void split_row(const ConstMapView& map, int64_t sample, int64_t channels, int64_t row, int64_t width, int64_t count,
               T* even, T* odd, int64_t stride) {
  constexpr int64_t lanes = Vec<T>::size();
  const S* data = static_cast<const S*>(map.data) + sample * map.stride_n + row * map.stride_h;
  if (map.stride_w == 1) {
    for (int64_t c = 0; c < channels; ++c, data += map.stride_c, even += stride, odd += stride) {
      int64_t j = 0;
      for (; 2 * (j + lanes) <= width; j += lanes) {
        const auto [first, second] = at::vec::deinterleave2<T>(load_lanes<true>(data + 2 * j, lanes),
                                                               load_lanes<true>(data + 2 * j + lanes, lanes));
        first.store(even + j);
        second.store(odd + j);
      }
      for (; j < count; j += lanes) {
        const int64_t left = larger(0, width - 2 * j), in_first = smaller(left, lanes);
        const auto [first, second] = at::vec::deinterleave2<T>(
            load_lanes<false>(data + 2 * j, in_first), load_lanes<false>(data + 2 * j + lanes, left - in_first));
        first.store(even + j, static_cast<int>(smaller(lanes, count - j)));
        second.store(odd + j, static_cast<int>(smaller(lanes, count - j)));
      }
    }
    return;
  }
  const auto split = [&](const S* from, int64_t filled, T* to) {
    if (map.stride_c == 1) {
      transpose(from, 2 * map.stride_w, to, stride, filled, channels);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < filled; ++j)
          to[c * stride + j] = static_cast<T>(from[c * map.stride_c + 2 * j * map.stride_w]);
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t j = filled; j < count; ++j) to[c * stride + j] = T(0);
  };
  split(data, divide_up(width, 2), even);
  split(data + map.stride_w, width / 2, odd);
}

// The reverse, for a row's pixels in [column, width) of which the first is even.
template <typename S, typename T>
void join_row(const T* even, const T* odd, int64_t stride, int64_t count, const MapView& map, int64_t sample,
              int64_t channels, int64_t row, int64_t column, int64_t width) {
  constexpr int64_t lanes = Vec<T>::size();
  S* data = static_cast<S*>(map.data) + sample * map.stride_n + row * map.stride_h + column * map.stride_w;
  const int64_t pixels = larger(0, smaller(2 * count, width - column));
  if (map.stride_w == 1) {
    for (int64_t c = 0; c < channels; ++c, data += map.stride_c, even += stride, odd += stride) {
      int64_t j = 0;
      for (; 2 * (j + lanes) <= pixels; j += lanes) {
        const auto [first, second] = at::vec::interleave2<T>(Vec<T>::loadu(even + j), Vec<T>::loadu(odd + j));
        store_lanes<true>(first, data + 2 * j, lanes);
        store_lanes<true>(second, data + 2 * j + lanes, lanes);
      }
      for (; 2 * j < pixels; j += lanes) {
        const int64_t left = pixels - 2 * j, in_first = smaller(left, lanes);
        const auto [first, second] = at::vec::interleave2<T>(Vec<T>::loadu(even + j), Vec<T>::loadu(odd + j));
        store_lanes<false>(first, data + 2 * j, in_first);
        store_lanes<false>(second, data + 2 * j + lanes, smaller(left - in_first, lanes));
      }
    }
    return;
  }
  const auto join = [&](const T* from, int64_t filled, S* to) {
    if (map.stride_c == 1) {
      transpose(from, stride, to, 2 * map.stride_w, channels, filled);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < filled; ++j)
          to[c * map.stride_c + 2 * j * map.stride_w] = static_cast<S>(from[c * stride + j]);
    }
  };
  join(even, divide_up(pixels, 2), data);
  join(odd, pixels / 2, data + map.stride_w);
}

// Fills rows of a sample's places, [first, last), with the pixels of a map. What lies outside of it is left alone.
template <typename S, typename T>
void load_rows(ConstMapView map, int64_t first_sample, int64_t channels, const TilePlaces& places, int64_t sample,
               int64_t first, int64_t last, const TilePlanes<T>& planes, int64_t channel) {
  const int64_t share = map.stride_w == 1 ? 1 : channels;  // channel by channel where a channel's rows are close
  for (int64_t c = 0; c < channels; c += share) {
    for (int64_t row = larger(0, 2 * first - 1); row < smaller(places.height, 2 * last - 1); ++row) {
      const int i = static_cast<int>((row + 1) % winograd_outputs);
      const int64_t place = places.place(sample, (row + 1) / winograd_outputs);
      split_row<S>(map, first_sample + sample, share, row, places.width, places.columns,
                   planes.pixel(places, channel + c, i, 1) + place, planes.pixel(places, channel + c, i, 0) + place + 1,
                   phases * planes.plane);
    }
    map.data = static_cast<const S*>(map.data) + share * map.stride_c;
  }
}

// The reverse, of the map's rows [first, last).
template <typename S, typename T>
void store_rows(const TilePlanes<T>& planes, const TilePlaces& places, int64_t sample, int64_t first, int64_t last,
                MapView map, int64_t first_sample, int64_t channels) {
  const int64_t share = map.stride_w == 1 ? 1 : channels;
  for (int64_t c = 0; c < channels; c += share) {
    for (int64_t row = first; row < smaller(places.height, last); ++row) {
      const int i = static_cast<int>((row + 1) % winograd_outputs);
      const int64_t place = places.place(sample, (row + 1) / winograd_outputs);
      join_row<S>(planes.pixel(places, c, i, 1) + place, planes.pixel(places, c, i, 0) + place + 1,
                  phases * planes.plane, places.tile_columns, map, first_sample + sample, share, row, 0, places.width);
    }
    map.data = static_cast<S*>(map.data) + share * map.stride_c;
  }
}

// Calls function(tile row, tile column, count, place in the strip) for each part of a strip that lies in one row.
template <typename Function>
void for_each_row_of(const TilePlaces& places, const Strip& strip, Function function) {
  strip.for_each_run([&](int64_t n, int64_t place, int64_t count) {
    const int64_t first = place - places.place(strip.sample, places.first_row);
    for (int64_t done = 0; done < count;) {
      const int64_t column = (first + done) % places.columns;
      const int64_t in_row = smaller(count - done, places.columns - column);
      function(places.first_row + (first + done) / places.columns, column, in_row, n + done);
      done += in_row;
    }
  });
}

// The pixels of tiles' results, but for those outside the map.
template <typename S, typename T>
void store_strip(const StripValues<T>& values, const TilePlaces& places, const Strip& strip, const MapView& map,
                 int64_t first_sample, int64_t channels) {
  for_each_row_of(places, strip, [&](int64_t tile_row, int64_t column, int64_t count, int64_t place) {
    for (int i = 0; i < winograd_outputs; ++i) {
      const int64_t row = winograd_outputs * tile_row + i, width = row < places.height ? places.width : 0;
      join_row<S>(values.row(winograd_outputs * i, 0) + place, values.row(winograd_outputs * i + 1, 0) + place,
                  values.pitch, count, map, first_sample + strip.sample, channels, row, winograd_outputs * column,
                  width);
    }
  });
}

// The four pixels where tiles have their results, for channels in [first, last).
template <typename T>
void copy_strip(const TilePlanes<T>& planes, const TilePlaces& places, const Strip& strip, int64_t first, int64_t last,
                const StripValues<T>& values) {
  for (int64_t c = first; c < last; ++c) {
    strip.for_each_run([&](int64_t n, int64_t place, int64_t count) {
      for (int i = 0; i < winograd_outputs; ++i)
        for (int j = 0; j < winograd_outputs; ++j)
          __builtin_memcpy(values.row(winograd_outputs * i + j, c - first) + n,
                           planes.pixel(places, c, i + 1, j + 1) + place, count * sizeof(T));
    });
  }
}

// The 16 points of what a strip's tiles read.
template <typename T>
void transform_strip(const TilePlanes<T>& planes, const TilePlaces& places, const Strip& strip, int64_t channels,
                     const StripValues<T>& values) {
  for (int64_t c = 0; c < channels; ++c) {
    strip.for_each_run([&](int64_t first, int64_t place, int64_t count) {
      const T* const from = planes.pixel(places, c, 0, 0) + place;
      T* const to = values.row(0, c) + first;
      for (int64_t n = 0; n < count; n += Vec<T>::size()) {
        transform_both<winograd_tile, winograd_tile, Vec<T>>(
            [](const auto& in, auto& out) { transform_values(in, out); },
            [&](int i, int j) {
              return load_once(from + (i % 2 * winograd_outputs + j % 2) * planes.plane + i / 2 * places.columns +
                               j / 2 + n);
            },
            [&](int i, int j, const Vec<T>& value) { value.store(to + (i * winograd_tile + j) * values.stride + n); });
      }
    });
  }
}

// The four in row `i` of these points.
template <typename T>
void transform_row(const TilePlanes<T>& planes, const TilePlaces& places, const Strip& strip, int64_t channels, int i,
                   const StripValues<T>& values) {
  constexpr int rows[winograd_tile][2] = {{0, 2}, {1, 2}, {2, 1}, {1, 3}};  // of pixels, whose sum is wanted for i = 1
  const Vec<T> sign(i == 1 ? T(1) : T(-1));
  for (int64_t c = 0; c < channels; ++c) {
    strip.for_each_run([&](int64_t first, int64_t place, int64_t count) {
      const T* const one = planes.pixel(places, c, rows[i][0], 0) + place;
      const T* const other = planes.pixel(places, c, rows[i][1], 0) + place;
      T* const to = values.row(0, c) + first;
      for (int64_t n = 0; n < count; n += Vec<T>::size()) {
        Vec<T> row[winograd_tile], points[winograd_tile];
        UNROLLED_FOR(j, winograd_tile) {
          const int64_t pixel = j % 2 * planes.plane + j / 2 + n;
          row[j] = at::vec::fmadd(Vec<T>::loadu(other + pixel), sign, Vec<T>::loadu(one + pixel));
        }
        transform_values(row, points);
        UNROLLED_FOR(j, winograd_tile) { points[j].store(to + j * values.stride + n); }
      }
    });
  }
}

// The same of the gradients of tiles' results, for channels in [first, last).
template <typename T>
void transform_gradient_row(const TilePlanes<T>& planes, const TilePlaces& places, const Strip& strip, int64_t first,
                            int64_t last, int i, const StripValues<T>& values) {
  const Vec<T> sign(i == 1 ? T(1) : T(-1));
  for (int64_t c = first; c < last; ++c) {
    strip.for_each_run([&](int64_t begin, int64_t place, int64_t count) {
      const T *const above = planes.pixel(places, c, 1, 0) + place, *const below =
                                                                        planes.pixel(places, c, 2, 0) + place;
      T* const to = values.row(0, c - first) + begin;
      for (int64_t n = 0; n < count; n += Vec<T>::size()) {
        Vec<T> row[winograd_outputs], points[winograd_tile];
        UNROLLED_FOR(j, winograd_outputs) {
          const int64_t pixel = (j + 1) % 2 * planes.plane + (j + 1) / 2 + n;
          const Vec<T> first_row = Vec<T>::loadu(above + pixel), second_row = Vec<T>::loadu(below + pixel);
          row[j] = i == 0                   ? first_row
                   : i == winograd_tile - 1 ? second_row.neg()
                                            : at::vec::fmadd(second_row, sign, first_row);
        }
        transform_gradients(row, points);
        UNROLLED_FOR(j, winograd_tile) { points[j].store(to + j * values.stride + n); }
      }
    });
  }
}

// Weights as left-hand sides of products at some points, [points, blocks of rows, depth, rows of a block], which are
// read one after the other.
template <typename T>
struct Filters {
  T* values;
  int64_t rows, depth, stride;  // from point to point

  static Filters take(Arena& arena, int64_t points, int64_t rows, int64_t depth) {
    constexpr int64_t line = 64 / sizeof(T);
    // odd lines: a power of two would map all points to the same few sets of the cache
    const int64_t stride = (divide_up(round_up(rows, filter_rows) * depth, line) | 1) * line;
    return {arena.take<T>(points * stride), rows, depth, stride};
  }

  // A block of rows at a point.
  const T* block(int64_t point, int64_t row) const { return values + point * stride + row * depth; }

  // Calls fill(taps, distance, place, count) for `count` values at a time of each point, from a place on, and their
  // taps, `distance` apart. Those of a row and a depth lie at row · row_stride + k · depth_stride in the weight.
  template <int all_taps, typename S, typename Fill>
  void for_each_part(const S* weight, int64_t row_stride, int64_t depth_stride, int threads, Fill fill) const {
    constexpr int64_t share = 16, distance = share * filter_rows;  // of the depth: whole vectors
    parallel_tasks(divide_up(rows, filter_rows), threads, [&](int64_t block, int) {
      for (int64_t first = 0; first < depth; first += share) {
        const int64_t last = smaller(first + share, depth);
        alignas(64) T taps[all_taps * distance] = {};
        for (int64_t row = block * filter_rows; row < smaller(rows, (block + 1) * filter_rows); ++row)
          for (int64_t k = first; k < last; ++k)
            for (int tap = 0; tap < all_taps; ++tap)
              taps[tap * distance + (k - first) * filter_rows + row % filter_rows] =
                  static_cast<T>(weight[row * row_stride + k * depth_stride + tap]);
        fill(taps, distance, (block * depth + first) * filter_rows, (last - first) * filter_rows);
      }
    });
  }

  // The 16 points of a weight with nine taps, in the reverse order where the convolution goes `back`.
  template <typename S>
  void fill(const S* weight, int64_t row_stride, int64_t depth_stride, bool back, int threads) const {
    constexpr int all_taps = winograd_side * winograd_side;
    for_each_part<all_taps>(weight, row_stride, depth_stride, threads,
                            [&](const T* taps, int64_t distance, int64_t place, int64_t count) {
                              for (int64_t n = 0; n < count; n += Vec<T>::size()) {
                                transform_both<winograd_side, winograd_tile, Vec<T>>(
                                    [](const auto& in, auto& out) { transform_weights(in, out); },
                                    [&](int i, int j) {
                                      const int tap = i * winograd_side + j;
                                      return Vec<T>::loadu(taps + (back ? all_taps - 1 - tap : tap) * distance + n);
                                    },
                                    [&](int i, int j, const Vec<T>& value) {
                                      value.store(values + (i * winograd_tile + j) * stride + place + n,
                                                  static_cast<int>(smaller(Vec<T>::size(), count - n)));
                                    });
                              }
                            });
  }

  // A matrix, scaled.
  template <typename S>
  void fill_scaled(const S* weight, int64_t row_stride, int64_t depth_stride, T scale, int threads) const {
    for_each_part<1>(weight, row_stride, depth_stride, threads,
                     [&](const T* taps, int64_t, int64_t place, int64_t count) {
                       for (int64_t n = 0; n < count; ++n) values[place + n] = scale * taps[n];
                     });
  }
};

// product[row, place] = Σ_k filters[first + row, k] · values[k, place] for `count` places and rows in [first, last),
// where `first` begins a block. Rows go up to whole blocks.
template <typename T>
void multiply_places(const Filters<T>& filters, int64_t point, int64_t first, int64_t last, const T* values,
                     int64_t values_pitch, int64_t count, T* product, int64_t product_pitch) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t n = 0; n < count; n += 2 * lanes) {
    for (int64_t row = first; row < last; row += filter_rows) {
      T* const to = product + (row - first) * product_pitch + n;
      const auto multiply = [&](auto vectors) {
        multiply_columns<true, T, vectors.value, filter_rows>(
            filters.block(point, row), filter_rows, filter_rows, values + n, values_pitch, filters.depth,
            [&](int64_t r, int64_t lane, const Vec<T>& sum) { sum.store(to + r * product_pitch + lane); });
      };
      if (n + lanes < count) {
        multiply(std::integral_constant<int, 2>());
      } else {
        multiply(std::integral_constant<int, 1>());
      }
    }
  }
}

// The same of a matrix and the four pixels where tiles have their results.
template <typename T>
void multiply_pixels_of(const Filters<T>& filters, int64_t first, int64_t last, const TilePlanes<T>& planes,
                        const TilePlaces& places, const Strip& strip, const StripValues<T>& product) {
  for (int i = 0; i < winograd_outputs; ++i) {
    for (int j = 0; j < winograd_outputs; ++j) {
      strip.for_each_run([&](int64_t n, int64_t place, int64_t count) {
        multiply_places(filters, 0, first, last, planes.pixel(places, 0, i + 1, j + 1) + place, phases * planes.plane,
                        count, product.row(winograd_outputs * i + j, 0) + n, product.pitch);
      });
    }
  }
}

// Calls finish(row, n, place, count, results) with vectors of the 2×2 results of a strip's tiles for rows in
// [first, last): those of `count` tiles, the strip's number n and the following ones, of which the first has that
// place.
template <typename T, typename Finish>
void convolve_strip(const TilePlanes<T>& planes, const TilePlaces& places, const Strip& strip,
                    const Filters<T>& filters, int64_t first, int64_t last, const StripValues<T>& values,
                    const StripValues<T>& product, Finish finish) {
  constexpr int64_t lanes = Vec<T>::size();
  transform_strip(planes, places, strip, filters.depth, values);
  for (int point = 0; point < winograd_points; ++point) {
    multiply_places(filters, point, first, last, values.row(point, 0), values.pitch, strip.count, product.row(point, 0),
                    product.pitch);
  }
  for (int64_t row = first; row < last; ++row) {
    strip.for_each_run([&](int64_t begin, int64_t place, int64_t count) {
      const T* const from = product.row(0, row - first) + begin;
      for (int64_t n = 0; n < count; n += lanes) {
        Vec<T> results[winograd_outputs][winograd_outputs];
        transform_both<winograd_tile, winograd_outputs, Vec<T>>(
            [](const auto& in, auto& out) { transform_products(in, out); },
            [&](int i, int j) { return load_once(from + (i * winograd_tile + j) * product.stride + n); },
            [&](int i, int j, const Vec<T>& sum) { results[i][j] = sum; });
        finish(row, begin + n, place + n, smaller(lanes, count - n), results);
      }
    });
  }
}

// Adds factor · Σ a · b to a block of sums; add_products(add) calls add(a, pitch of its rows, b, pitch, count) for so
// many consecutive places of each.
template <typename T, typename AddProducts>
ALWAYS_INLINE void add_block(T factor, T* sums, AddProducts add_products) {
  constexpr int lanes = Vec<T>::size(), block = sum_rows * sum_columns;
  static_assert(block % lanes == 0);
  __builtin_prefetch(sums, 1);
  Vec<T> sum[sum_rows][sum_columns];
  UNROLLED_FOR(i, sum_rows) UNROLLED_FOR(j, sum_columns) { sum[i][j] = Vec<T>(0); }
  add_products([&](const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t count) {
    const auto add = [&](int64_t n, auto load) {
      Vec<T> right[sum_columns];
      UNROLLED_FOR(j, sum_columns) { right[j] = load(b + j * b_pitch + n); }
      UNROLLED_FOR(i, sum_rows) {
        const Vec<T> left = load(a + i * a_pitch + n);
        UNROLLED_FOR(j, sum_columns) { sum[i][j] = at::vec::fmadd(left, right[j], sum[i][j]); }
      }
    };
    int64_t n = 0;
    for (; n + lanes <= count; n += lanes) add(n, [](const T* from) { return load_once(from); });
    if (n < count) add(n, [&](const T* from) { return Vec<T>::loadu(from, count - n); });
  });
  UNROLLED_FOR(part, block / lanes) {
    Square<T> square;
    UNROLLED_FOR(i, lanes) { square.put(i, sum[(part * lanes + i) / sum_columns][(part * lanes + i) % sum_columns]); }
    square.sum_lanes();
    T* const total = sums + part * lanes;
    at::vec::fmadd(Vec<T>(factor), square.row(0), Vec<T>::loadu(total)).store(total);
  }
}

// Sums of products of all pairs of rows, in blocks of sum_rows × sum_columns.
struct PairSums {
  int64_t rows, columns;
  int64_t row_blocks = divide_up(rows, sum_rows), column_blocks = divide_up(columns, sum_columns);
  int64_t of_row_block = column_blocks * sum_rows * sum_columns, size = row_blocks * of_row_block;

  int64_t place(int64_t row, int64_t column) const {
    return row / sum_rows * of_row_block + column / sum_columns * sum_rows * sum_columns +
           row % sum_rows * sum_columns + column % sum_columns;
  }

  // Calls function(row, column) for all blocks with rows in [first, last): some columns, which stay in first-level
  // cache, with all rows.
  template <typename Function>
  void for_each_block(int64_t first, int64_t last, Function function) const {
    constexpr int64_t share = 3 * sum_columns;
    for (int64_t begin = 0; begin < columns; begin += share)
      for (int64_t row = first; row < last; row += sum_rows)
        for (int64_t column = begin; column < smaller(begin + share, columns); column += sum_columns)
          function(row, column);
  }
};

// sums[row, column] += factor · Σ_points, places a[point, row − first, place] · b[point, column, place], at the four
// pixels of results.
template <typename T>
void add_pixel_products_of(const StripValues<T>& a, const StripValues<T>& b, int64_t first, int64_t last, int64_t count,
                           T factor, const PairSums& layout, T* sums) {
  layout.for_each_block(first, last, [&](int64_t row, int64_t column) {
    add_block(factor, sums + layout.place(row, column), [&](auto add) {
      for (int point = 0; point < phases; ++point)
        add(a.row(point, row - first), a.pitch, b.row(point, column), b.pitch, count);
    });
  });
}

// What a strip adds to the gradient of filters at the 16 points, for rows in [first, last) of each. One row of points
// at a time is transformed and summed.
template <typename T>
void add_filter_gradients(const TilePlanes<T>& gradients, const TilePlanes<T>& planes, const TilePlaces& places,
                          const Strip& strip, int64_t first, int64_t last, const StripValues<T>& of_gradients,
                          const StripValues<T>& values, const PairSums& layout, T* sums) {
  for (int i = 0; i < winograd_tile; ++i) {
    transform_row(planes, places, strip, planes.all_channels, i, values);
    for (int64_t begin = first; begin < last; begin += gradient_rows) {
      const int64_t end = smaller(last, begin + gradient_rows);
      transform_gradient_row(gradients, places, strip, begin, round_up(end, sum_rows), i, of_gradients);
      for (int j = 0; j < winograd_tile; ++j) {
        T* const of_point = sums + (i * winograd_tile + j) * layout.size;
        layout.for_each_block(begin, end, [&](int64_t row, int64_t column) {
          add_block(T(1), of_point + layout.place(row, column), [&](auto add) {
            add(of_gradients.row(j, row - begin), of_gradients.pitch, values.row(j, column), values.pitch, strip.count);
          });
        });
      }
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
