// Compiled once per instruction set. Every task is a tile of one sample, or several in a row where
// gradients of weights are summed. Tiles are held as pixels (see pixels_cpu.h); what lies between the
// convolutions exists in cache only, and the backward computes it again.
//
// Local mixing works on a tile and `radius` pixels around it, where value is continued by reflection:
//   m = local_weight * value + local_bias + attended,  u = proj_weight · m + proj_bias
// Backward, with g the incoming gradient and s the rescale:
//   grad_m     = proj_weightᵀ · (s ⊙ g)                                 grad_attended is the same
//   grad_value = Σ_taps local_weight(tap) · grad_m(q − tap)              over all places that reflection
//                                                                        reads q at
//   grad_proj_weight = Σ_pixels (s ⊙ g)·mᵀ,  grad_rescale = Σ_pixels g ⊙ u,  grad_rebias = Σ_pixels g

#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int side = 5, taps = side * side;  // of the depthwise convolution
constexpr int64_t radius = side / 2;
constexpr int depthwise_pixels = many_registers ? 6 : 2;           // held in registers at a time
constexpr int depthwise_rows_of_taps = many_registers ? side : 1;  // with a sum each

template <typename S>
struct MlpForward {
  using T = Arithmetic<S>;

  const PointwiseMlpForward& call;
  const FeatureMixingShape& shape = call.shape;
  const int64_t channels = shape.channels, hidden = shape.hidden;
  const int64_t pitch = channel_pitch<T>(channels), hidden_pitch = channel_pitch<T>(hidden);
  const Tiling tiling = small_pointwise_tiling(shape, (2 * pitch + hidden_pitch) * sizeof(T),
                                               rows_follow(call.x, shape) && rows_follow(call.y, shape));
  const int64_t pixels = tiling.tile_height * tiling.tile_width;
  const int64_t tasks = shape.batch * tiling.tiles();

  struct Weights {
    T *weight1, *bias1, *weight2, *bias2;
  };

  Weights weights(Arena& arena) const {
    return {arena.take<T>(channels * hidden_pitch), arena.take<T>(hidden_pitch), arena.take<T>(hidden * pitch),
            arena.take<T>(pitch)};
  }

  struct Scratch {
    T *x, *hidden, *y;
  };

  Scratch scratch(Arena& arena) const {
    return {take_pixels<T>(arena, pixels, pitch), take_pixels<T>(arena, pixels, hidden_pitch),
            take_pixels<T>(arena, pixels, pitch)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    weights(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Weights packed = weights(arena);
    fill_matrix<S>(call.weight1, hidden, channels, true, packed.weight1);
    fill_vector<S>(call.bias1, hidden, packed.bias1);
    fill_matrix<S>(call.weight2, channels, hidden, true, packed.weight2);
    fill_vector<S>(call.bias2, channels, packed.bias2);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const Tile tile = tiling.tile(task / tiling.tiles(), task % tiling.tiles());
      const int64_t count = tile.height * tile.width;
      load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
      multiply_pixels<false>(
          at.x, pitch, count, packed.weight1, hidden_pitch, hidden_pitch, channels,
          [&](int64_t p, int64_t j, const Vec<T>& sum) {
            at::vec::maximum(sum + Vec<T>::loadu(packed.bias1 + j), Vec<T>(0)).store(at.hidden + p * hidden_pitch + j);
          });
      multiply_pixels<false>(at.hidden, hidden_pitch, count, packed.weight2, pitch, pitch, hidden,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               const Vec<T> x = Vec<T>::loadu(at.x + p * pitch + j);
                               (x + (sum + Vec<T>::loadu(packed.bias2 + j))).store(at.y + p * pitch + j);
                             });
      store_pixels<S>(at.y, tile.width * pitch, channels, tile, call.y);
    });
  }
};

template <typename S>
struct MlpBackward {
  using T = Arithmetic<S>;

  const PointwiseMlpBackward& call;
  const FeatureMixingShape& shape = call.shape;
  const int64_t channels = shape.channels, hidden = shape.hidden;
  const int64_t pitch = channel_pitch<T>(channels), hidden_pitch = channel_pitch<T>(hidden);
  const Tiling tiling =
      pointwise_tiling(shape, (2 * pitch + 2 * hidden_pitch) * sizeof(T),
                       rows_follow(call.x, shape) && rows_follow(call.grad, shape) && rows_follow(call.grad_x, shape));
  const Groups groups{shape, tiling};
  const int64_t pixels = tiling.tile_height * tiling.tile_width;
  const int64_t tasks = shape.batch * groups.per_sample;
  const bool sums_weights = call.grad_weight1 || call.grad_bias1 || call.grad_weight2 || call.grad_bias2;
  // places in a task's sums
  const int64_t weight1_sum = 0, bias1_sum = hidden * pitch, weight2_sum = bias1_sum + hidden_pitch;
  const int64_t bias2_sum = weight2_sum + channels * hidden_pitch, sums_size = bias2_sum + pitch;

  struct Weights {
    T *weight1_transposed, *bias1, *weight1, *weight2, *sums;
  };

  Weights weights(Arena& arena) const {
    return {arena.take<T>(channels * hidden_pitch), arena.take<T>(hidden_pitch), arena.take<T>(hidden * pitch),
            arena.take<T>(channels * hidden_pitch), arena.take<T>(sums_weights ? tasks * sums_size : 0)};
  }

  struct Scratch {
    T *x, *grad, *hidden, *grad_hidden;
  };

  Scratch scratch(Arena& arena) const {
    return {take_pixels<T>(arena, pixels, pitch), take_pixels<T>(arena, pixels, pitch),
            take_pixels<T>(arena, pixels, hidden_pitch), take_pixels<T>(arena, pixels, hidden_pitch)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    weights(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Weights packed = weights(arena);
    fill_matrix<S>(call.weight1, hidden, channels, true, packed.weight1_transposed);
    fill_vector<S>(call.bias1, hidden, packed.bias1);
    fill_matrix<S>(call.weight1, hidden, channels, false, packed.weight1);
    fill_matrix<S>(call.weight2, channels, hidden, false, packed.weight2);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const int64_t sample = task / groups.per_sample, group = task % groups.per_sample;
      T* const sums = packed.sums + task * sums_size;
      if (sums_weights) __builtin_memset(sums, 0, sums_size * sizeof(T));
      for (int64_t index = groups.first_tile(group); index < groups.first_tile(group + 1); ++index)
        backward_tile(tiling.tile(sample, index), packed, at, sums);
    });
    if (sums_weights) {
      add_up<S>(packed.sums, sums_size, 0, tasks,
                {{call.grad_weight1, weight1_sum, hidden, channels, pitch},
                 {call.grad_bias1, bias1_sum, 1, hidden, hidden_pitch},
                 {call.grad_weight2, weight2_sum, channels, hidden, hidden_pitch},
                 {call.grad_bias2, bias2_sum, 1, channels, pitch}},
                threads);
    }
  }

  void backward_tile(const Tile& tile, const Weights& packed, const Scratch& at, T* sums) const {
    const int64_t count = tile.height * tile.width;
    load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
    load_pixels<S>(call.grad, channels, tile, at.grad, tile.width * pitch);
    multiply_pixels<false>(
        at.x, pitch, count, packed.weight1_transposed, hidden_pitch, hidden_pitch, channels,
        [&](int64_t p, int64_t j, const Vec<T>& sum) {
          at::vec::maximum(sum + Vec<T>::loadu(packed.bias1 + j), Vec<T>(0)).store(at.hidden + p * hidden_pitch + j);
        });
    multiply_pixels<false>(at.grad, pitch, count, packed.weight2, hidden_pitch, hidden_pitch, channels,
                           [&](int64_t p, int64_t j, const Vec<T>& sum) {
                             const Vec<T> is_positive = Vec<T>::loadu(at.hidden + p * hidden_pitch + j) > Vec<T>(0);
                             Vec<T>::blendv(Vec<T>(0), sum, is_positive).store(at.grad_hidden + p * hidden_pitch + j);
                           });
    if (sums_weights) {
      add_pixel_products(at.grad_hidden, hidden_pitch, hidden, at.x, pitch, count, sums + weight1_sum);
      add_pixels(at.grad_hidden, hidden_pitch, count, sums + bias1_sum);
      add_pixel_products(at.grad, pitch, channels, at.hidden, hidden_pitch, count, sums + weight2_sum);
      add_pixels(at.grad, pitch, count, sums + bias2_sum);
    }
    if (call.grad_x.data) {
      multiply_pixels<false>(at.grad_hidden, hidden_pitch, count, packed.weight1, pitch, pitch, hidden,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               (Vec<T>::loadu(at.grad + p * pitch + j) + sum).store(at.x + p * pitch + j);
                             });
      store_pixels<S>(at.x, tile.width * pitch, channels, tile, call.grad_x);
    }
  }
};

// A tile and the pixels around it that lie in the image.
struct Surroundings {
  int64_t row_pixels;  // of a row with its halo
  Tile inner;
  int64_t first;  // place of its first pixel

  Surroundings(const Tile& tile, const FeatureMixingShape& shape) : row_pixels(tile.width + 2 * radius) {
    const int64_t row = larger(0, tile.row - radius), column = larger(0, tile.column - radius);
    inner = {tile.sample, row, column, smaller(shape.height, tile.row + tile.height + radius) - row,
             smaller(shape.width, tile.column + tile.width + radius) - column};
    first = (row - tile.row + radius) * row_pixels + column - tile.column + radius;
  }
};

// Continues a tile's surroundings outside the image by reflection.
template <typename T>
void reflect(const Tile& tile, const FeatureMixingShape& shape, int64_t pitch, T* pixels) {
  const Surroundings around(tile, shape);
  const Tile& inner = around.inner;
  const int64_t row_pixels = around.row_pixels, bytes = pitch * sizeof(T);
  const auto mirrored = [](int64_t place, int64_t size) {
    return place < 0 ? -place : (place < size ? place : 2 * (size - 1) - place);
  };
  for (int64_t i = inner.row; i < inner.row + inner.height; ++i) {
    T* const row = pixels + (i - tile.row + radius) * row_pixels * pitch;
    for (int64_t j = 0; j < row_pixels; ++j) {
      const int64_t column = tile.column - radius + j, source = mirrored(column, shape.width);
      if (source != column) __builtin_memcpy(row + j * pitch, row + (source - tile.column + radius) * pitch, bytes);
    }
  }
  for (int64_t i = 0; i < tile.height + 2 * radius; ++i) {
    const int64_t row = tile.row - radius + i, source = mirrored(row, shape.height);
    if (source != row)
      __builtin_memcpy(pixels + i * row_pixels * pitch, pixels + (source - tile.row + radius) * row_pixels * pitch,
                       row_pixels * bytes);
  }
}

// out[i, j] = bias + Σ_taps weight[tap] · in[i + tap row, j + tap column], out in rows of `width` pixels.
template <typename T>
void depthwise(const T* in, int64_t row_pixels, int64_t pitch, const T* weight, const T* bias, int64_t height,
               int64_t width, T* out) {
  for (int64_t c = 0; c < pitch; c += Vec<T>::size()) {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; j += depthwise_pixels) {  // the last ones run over into the next row
        Vec<T> sum[depthwise_pixels];
        UNROLLED_FOR(p, depthwise_pixels) { sum[p] = Vec<T>::loadu(bias + c); }
        for (int dy = 0; dy < side; ++dy) {
          const T* row = in + ((i + dy) * row_pixels + j) * pitch + c;
          UNROLLED_FOR(dx, side) {
            const Vec<T> w = load_once(weight + (dy * side + dx) * pitch + c);
            UNROLLED_FOR(p, depthwise_pixels) {
              sum[p] = at::vec::fmadd(w, Vec<T>::loadu(row + (p + dx) * pitch), sum[p]);
            }
          }
        }
        UNROLLED_FOR(p, depthwise_pixels) { sum[p].store(out + (i * width + j + p) * pitch + c); }
      }
    }
  }
}

// sums[tap] += Σ_pixels grad[i, j] · in[i + tap row, j + tap column]
template <typename T>
void add_depthwise_products(const T* grad, const T* in, int64_t row_pixels, int64_t pitch, int64_t height,
                            int64_t width, T* sums) {
  for (int64_t c = 0; c < pitch; c += Vec<T>::size()) {
    for (int first = 0; first < side; first += depthwise_rows_of_taps) {
      Vec<T> sum[depthwise_rows_of_taps][side];
      UNROLLED_FOR(dy, depthwise_rows_of_taps) UNROLLED_FOR(dx, side) { sum[dy][dx] = Vec<T>(0); }
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const Vec<T> g = load_once(grad + (i * width + j) * pitch + c);
          UNROLLED_FOR(dy, depthwise_rows_of_taps) {
            const T* row = in + ((i + first + dy) * row_pixels + j) * pitch + c;
            UNROLLED_FOR(dx, side) { sum[dy][dx] = at::vec::fmadd(g, Vec<T>::loadu(row + dx * pitch), sum[dy][dx]); }
          }
        }
      }
      UNROLLED_FOR(dy, depthwise_rows_of_taps) UNROLLED_FOR(dx, side) {
        T* const total = sums + ((first + dy) * side + dx) * pitch + c;
        (Vec<T>::loadu(total) + sum[dy][dx]).store(total);
      }
    }
  }
}

// The places outside the image where reflection reads the pixel at `place` of `size`; returns how many.
int reflections(int64_t place, int64_t size, int64_t (&places)[2]) {
  int count = 0;
  if (place >= 1 && place <= radius) places[count++] = -place;
  if (place <= size - 2 && place >= size - 1 - radius) places[count++] = 2 * (size - 1) - place;
  return count;
}

// Adds to grad_value what reflection takes from a tile's pixels near the border. grad_m has a halo of zeros
// outside the image.
template <typename T>
void add_reflected(const Tile& tile, const FeatureMixingShape& shape, int64_t pitch, const T* grad_m, const T* weight,
                   T* grad_value) {
  const int64_t row_pixels = tile.width + 2 * radius;
  for (int64_t i = 0; i < tile.height; ++i) {
    int64_t rows[3] = {tile.row + i}, outside[2];
    int row_count = 1;
    for (int k = reflections(tile.row + i, shape.height, outside); k > 0; --k) rows[row_count++] = outside[k - 1];
    for (int64_t j = 0; j < tile.width; ++j) {
      int64_t columns[3] = {tile.column + j};
      int column_count = 1;
      for (int k = reflections(tile.column + j, shape.width, outside); k > 0; --k)
        columns[column_count++] = outside[k - 1];
      if (row_count * column_count == 1) continue;
      T* const target = grad_value + (i * tile.width + j) * pitch;
      for (int place = 1; place < row_count * column_count; ++place) {  // 0 is the pixel itself
        const int64_t y = rows[place / column_count], x = columns[place % column_count];
        for (int64_t dy = -radius; dy <= radius; ++dy) {
          if (y - dy < 0 || y - dy >= shape.height) continue;
          for (int64_t dx = -radius; dx <= radius; ++dx) {
            if (x - dx < 0 || x - dx >= shape.width) continue;
            const T* from =
                grad_m + ((y - dy - tile.row + radius) * row_pixels + x - dx - tile.column + radius) * pitch;
            const T* w = weight + ((dy + radius) * side + dx + radius) * pitch;
            for (int64_t c = 0; c < pitch; c += Vec<T>::size())
              at::vec::fmadd(Vec<T>::loadu(w + c), Vec<T>::loadu(from + c), Vec<T>::loadu(target + c))
                  .store(target + c);
          }
        }
      }
    }
  }
}

// The pixels of a tile from among those of its surroundings.
template <typename T>
void copy_tile(const T* surroundings, const Tile& tile, int64_t pitch, T* pixels) {
  const int64_t row_pixels = tile.width + 2 * radius;
  for (int64_t i = 0; i < tile.height; ++i)
    __builtin_memcpy(pixels + i * tile.width * pitch, surroundings + ((i + radius) * row_pixels + radius) * pitch,
                     tile.width * pitch * sizeof(T));
}

// What forward and backward of local mixing share.
template <typename S>
struct Mixing {
  using T = Arithmetic<S>;

  const FeatureMixingShape& shape;
  const MixingWeights& weights;
  const int64_t pixel_buffers;  // of the scratch
  const bool has_attention = !weights.value_weight;
  const int64_t channels = shape.channels, pitch = channel_pitch<T>(channels);
  const Tiling tiling{shape.height, shape.width, tile_pixels(shape, pixel_buffers * pitch * sizeof(T), 128), 64};
  const int64_t pixels = tiling.tile_height * tiling.tile_width;
  const int64_t halo_pixels = (tiling.tile_height + 2 * radius) * (tiling.tile_width + 2 * radius);

  struct Packed {
    T *value_transposed, *value_bias, *local, *local_bias, *proj_transposed, *proj_bias, *rescale, *rebias;
  };

  Packed pack(Arena& arena) const {
    const int64_t matrix = channels * pitch, samples = has_attention ? shape.batch * pitch : 0;
    return {arena.take<T>(has_attention ? 0 : matrix),
            arena.take<T>(pitch),
            arena.take<T>(taps * pitch),
            arena.take<T>(pitch),
            arena.take<T>(matrix),
            arena.take<T>(pitch),
            arena.take<T>(samples),
            arena.take<T>(samples)};
  }

  void fill(const Packed& packed) const {
    if (!has_attention) fill_matrix<S>(weights.value_weight, channels, channels, true, packed.value_transposed);
    fill_vector<S>(weights.value_bias, channels, packed.value_bias);
    fill_matrix<S>(weights.local_weight, channels, taps, true, packed.local);
    fill_vector<S>(weights.local_bias, channels, packed.local_bias);
    fill_matrix<S>(weights.proj_weight, channels, channels, true, packed.proj_transposed);
    fill_vector<S>(weights.proj_bias, channels, packed.proj_bias);
    for (int64_t sample = 0; has_attention && sample < shape.batch; ++sample) {
      const int64_t row = sample * channels;
      fill_vector<S>(static_cast<const S*>(weights.rescale) + row, channels, packed.rescale + sample * pitch);
      fill_vector<S>(static_cast<const S*>(weights.rebias) + row, channels, packed.rebias + sample * pitch);
    }
  }

  // value on a tile and around it, and m on the tile. `x` are the pixels of x there too, without attention.
  void mix(const ConstMapView& value_map, const ConstMapView& attended_map, const Tile& tile, const Packed& packed,
           const T* x, T* value, T* attended, T* m) const {
    const Surroundings around(tile, shape);
    if (has_attention) {
      load_pixels<S>(value_map, channels, around.inner, value + around.first * pitch, around.row_pixels * pitch);
    } else {
      multiply_pixels<false>(x, pitch, (tile.height + 2 * radius) * around.row_pixels, packed.value_transposed, pitch,
                             pitch, channels, [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               (sum + Vec<T>::loadu(packed.value_bias + j)).store(value + p * pitch + j);
                             });
    }
    reflect(tile, shape, pitch, value);
    depthwise(value, around.row_pixels, pitch, packed.local, packed.local_bias, tile.height, tile.width, m);
    if (has_attention) {
      load_pixels<S>(attended_map, channels, tile, attended, tile.width * pitch);
      for (int64_t i = 0; i < tile.height * tile.width * pitch; i += Vec<T>::size())
        (Vec<T>::loadu(m + i) + Vec<T>::loadu(attended + i)).store(m + i);
    }
  }

  // finish(place, channel, proj · m + proj_bias)
  template <typename Finish>
  ALWAYS_INLINE void project(const Packed& packed, const T* m, int64_t count, Finish finish) const {
    multiply_pixels<false>(m, pitch, count, packed.proj_transposed, pitch, pitch, channels,
                           [&](int64_t p, int64_t j, const Vec<T>& sum) {
                             finish(p * pitch + j, j, sum + Vec<T>::loadu(packed.proj_bias + j));
                           });
  }
};

template <typename S>
struct LocalForward {
  using T = Arithmetic<S>;

  const LocalMixingForward& call;
  const Mixing<S> mixing{call.shape, call.weights, 5};
  const int64_t pitch = mixing.pitch, channels = mixing.channels;
  const int64_t tasks = call.shape.batch * mixing.tiling.tiles();

  struct Scratch {
    T *around_x, *value, *x, *m, *y;
  };

  Scratch scratch(Arena& arena) const {
    return {take_pixels<T>(arena, mixing.has_attention ? 0 : mixing.halo_pixels, pitch),
            take_pixels<T>(arena, mixing.halo_pixels, pitch), take_pixels<T>(arena, mixing.pixels, pitch),
            take_pixels<T>(arena, mixing.pixels, pitch), take_pixels<T>(arena, mixing.pixels, pitch)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    mixing.pack(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const auto packed = mixing.pack(arena);
    mixing.fill(packed);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const Tile tile = mixing.tiling.tile(task / mixing.tiling.tiles(), task % mixing.tiling.tiles());
      const Surroundings around(tile, call.shape);
      if (!mixing.has_attention)
        load_pixels<S>(call.x, channels, around.inner, at.around_x + around.first * pitch, around.row_pixels * pitch);
      mixing.mix(call.value, call.attended, tile, packed, at.around_x, at.value, at.y, at.m);
      if (mixing.has_attention) {
        load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
      } else {
        copy_tile(at.around_x, tile, pitch, at.x);
      }
      const T* rescale = packed.rescale + tile.sample * pitch;
      const T* rebias = packed.rebias + tile.sample * pitch;
      mixing.project(packed, at.m, tile.height * tile.width, [&](int64_t place, int64_t j, const Vec<T>& projected) {
        Vec<T> added = projected;
        if (mixing.has_attention)
          added = at::vec::fmadd(projected, Vec<T>::loadu(rescale + j), Vec<T>::loadu(rebias + j));
        (Vec<T>::loadu(at.x + place) + added).store(at.y + place);
      });
      store_pixels<S>(at.y, tile.width * pitch, channels, tile, call.y);
    });
  }
};

template <typename S>
struct LocalBackward {
  using T = Arithmetic<S>;

  const LocalMixingBackward& call;
  const FeatureMixingShape& shape = call.shape;
  const Mixing<S> mixing{shape, call.weights, 9};
  const Groups groups{shape, mixing.tiling};
  const int64_t pitch = mixing.pitch, channels = mixing.channels;
  const int64_t tasks = shape.batch * groups.per_sample;
  const bool sums_weights = call.grad_value_weight || call.grad_value_bias || call.grad_local_weight ||
                            call.grad_local_bias || call.grad_proj_weight || call.grad_proj_bias || call.grad_rescale ||
                            call.grad_rebias;
  const bool needs_value = call.grad_x.data || call.grad_value.data || call.grad_value_weight || call.grad_value_bias;
  // places in a task's sums
  const int64_t value_sum = 0, value_bias_sum = channels * pitch, local_sum = value_bias_sum + pitch;
  const int64_t local_bias_sum = local_sum + taps * pitch, proj_sum = local_bias_sum + pitch;
  const int64_t proj_bias_sum = proj_sum + channels * pitch, rescale_sum = proj_bias_sum + pitch;
  const int64_t rebias_sum = rescale_sum + pitch, sums_size = rebias_sum + pitch;

  struct Own {
    T *local_flipped, *zeros, *proj, *value, *local_sums, *sums;
  };

  Own own_weights(Arena& arena) const {
    return {arena.take<T>(taps * pitch),     arena.take<T>(pitch),
            arena.take<T>(channels * pitch), arena.take<T>(mixing.has_attention ? 0 : channels * pitch),
            arena.take<T>(taps * channels),  arena.take<T>(sums_weights ? tasks * sums_size : 0)};
  }

  struct Scratch {
    T *around_x, *around_grad, *value, *grad_m, *x, *grad, *m, *tile_grad_m, *grad_value;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t halo = mixing.halo_pixels, pixels = mixing.pixels;
    Scratch at;
    at.around_x = take_pixels<T>(arena, mixing.has_attention ? 0 : halo, pitch);
    at.around_grad = take_pixels<T>(arena, halo, pitch);
    at.value = take_pixels<T>(arena, halo, pitch);
    at.grad_m = take_pixels<T>(arena, halo, pitch);
    at.x = take_pixels<T>(arena, pixels, pitch);
    at.grad = take_pixels<T>(arena, pixels, pitch);
    at.m = take_pixels<T>(arena, pixels, pitch);
    at.tile_grad_m = take_pixels<T>(arena, pixels, pitch);
    at.grad_value = take_pixels<T>(arena, pixels, pitch);
    return at;
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    mixing.pack(arena);
    own_weights(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const auto packed = mixing.pack(arena);
    mixing.fill(packed);
    const Own own = own_weights(arena);
    for (int tap = 0; tap < taps; ++tap)
      __builtin_memcpy(own.local_flipped + tap * pitch, packed.local + (taps - 1 - tap) * pitch, pitch * sizeof(T));
    fill_vector<S>(nullptr, channels, own.zeros);
    fill_matrix<S>(call.weights.proj_weight, channels, channels, false, own.proj);
    if (!mixing.has_attention) fill_matrix<S>(call.weights.value_weight, channels, channels, false, own.value);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const int64_t sample = task / groups.per_sample, group = task % groups.per_sample;
      T* const sums = own.sums + task * sums_size;
      if (sums_weights) __builtin_memset(sums, 0, sums_size * sizeof(T));
      for (int64_t index = groups.first_tile(group); index < groups.first_tile(group + 1); ++index)
        backward_tile(mixing.tiling.tile(sample, index), packed, own, at, sums);
    });
    if (sums_weights) add_up_sums(own, threads);
  }

  void backward_tile(const Tile& tile, const typename Mixing<S>::Packed& packed, const Own& own, const Scratch& at,
                     T* sums) const {
    constexpr int64_t lanes = Vec<T>::size();
    const Surroundings around(tile, shape);
    const int64_t row_pitch = around.row_pixels * pitch, count = tile.height * tile.width;
    const int64_t halo_count = (tile.height + 2 * radius) * around.row_pixels;
    __builtin_memset(at.around_grad, 0, halo_count * pitch * sizeof(T));
    load_pixels<S>(call.grad, channels, around.inner, at.around_grad + around.first * pitch, row_pitch);
    if (!mixing.has_attention) {
      load_pixels<S>(call.x, channels, around.inner, at.around_x + around.first * pitch, row_pitch);
      copy_tile(at.around_x, tile, pitch, at.x);
    }
    if (sums_weights) mixing.mix(call.value, call.attended, tile, packed, at.around_x, at.value, at.grad_value, at.m);
    if (mixing.has_attention) {
      if (sums_weights) sum_rescale(tile, packed, at, sums);
      const T* rescale = packed.rescale + tile.sample * pitch;
      for (int64_t p = 0; p < halo_count * pitch; p += pitch)
        for (int64_t c = 0; c < pitch; c += lanes)
          (Vec<T>::loadu(at.around_grad + p + c) * Vec<T>::loadu(rescale + c)).store(at.around_grad + p + c);
    }
    copy_tile(at.around_grad, tile, pitch, at.grad);
    multiply_pixels<false>(at.around_grad, pitch, halo_count, own.proj, pitch, pitch, channels,
                           [&](int64_t p, int64_t j, const Vec<T>& sum) { sum.store(at.grad_m + p * pitch + j); });
    copy_tile(at.grad_m, tile, pitch, at.tile_grad_m);
    if (call.grad_attended.data)
      store_pixels<S>(at.tile_grad_m, tile.width * pitch, channels, tile, call.grad_attended);
    if (sums_weights) {
      add_pixel_products(at.grad, pitch, channels, at.m, pitch, count, sums + proj_sum);
      add_pixels(at.grad, pitch, count, sums + proj_bias_sum);
      add_depthwise_products(at.tile_grad_m, at.value, around.row_pixels, pitch, tile.height, tile.width,
                             sums + local_sum);
      add_pixels(at.tile_grad_m, pitch, count, sums + local_bias_sum);
    }
    if (!needs_value) return;
    depthwise(at.grad_m, around.row_pixels, pitch, own.local_flipped, own.zeros, tile.height, tile.width,
              at.grad_value);
    add_reflected(tile, shape, pitch, at.grad_m, packed.local, at.grad_value);
    if (call.grad_value.data) store_pixels<S>(at.grad_value, tile.width * pitch, channels, tile, call.grad_value);
    if (mixing.has_attention) return;
    if (sums_weights) {
      add_pixel_products(at.grad_value, pitch, channels, at.x, pitch, count, sums + value_sum);
      add_pixels(at.grad_value, pitch, count, sums + value_bias_sum);
    }
    if (call.grad_x.data) {
      multiply_pixels<false>(at.grad_value, pitch, count, own.value, pitch, pitch, channels,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               (Vec<T>::loadu(at.grad + p * pitch + j) + sum).store(at.x + p * pitch + j);
                             });
      store_pixels<S>(at.x, tile.width * pitch, channels, tile, call.grad_x);
    }
  }

  // The sums of g and of g ⊙ u, while around_grad still holds g.
  void sum_rescale(const Tile& tile, const typename Mixing<S>::Packed& packed, const Scratch& at, T* sums) const {
    const int64_t count = tile.height * tile.width;
    copy_tile(at.around_grad, tile, pitch, at.grad);
    add_pixels(at.grad, pitch, count, sums + rebias_sum);
    mixing.project(packed, at.m, count, [&](int64_t place, int64_t, const Vec<T>& projected) {
      (Vec<T>::loadu(at.grad + place) * projected).store(at.x + place);
    });
    add_pixels(at.x, pitch, count, sums + rescale_sum);
  }

  void add_up_sums(const Own& own, int threads) const {
    add_up<S>(own.sums, sums_size, 0, tasks,
              {{call.grad_value_weight, value_sum, channels, channels, pitch},
               {call.grad_value_bias, value_bias_sum, 1, channels, pitch},
               {call.grad_local_bias, local_bias_sum, 1, channels, pitch},
               {call.grad_proj_weight, proj_sum, channels, channels, pitch},
               {call.grad_proj_bias, proj_bias_sum, 1, channels, pitch}},
              threads);
    if (call.grad_local_weight) {
      S* const by_tap = reinterpret_cast<S*>(own.local_sums);
      add_up<S>(own.sums, sums_size, 0, tasks, {{by_tap, local_sum, taps, channels, pitch}}, threads);
      S* const out = static_cast<S*>(call.grad_local_weight);
      for (int64_t c = 0; c < channels; ++c)
        for (int tap = 0; tap < taps; ++tap) out[c * taps + tap] = by_tap[tap * channels + c];
    }
    for (int64_t sample = 0; sample < shape.batch && (call.grad_rescale || call.grad_rebias); ++sample) {
      const auto row = [&](void* out) { return out ? static_cast<S*>(out) + sample * channels : nullptr; };
      add_up<S>(own.sums, sums_size, sample * groups.per_sample, (sample + 1) * groups.per_sample,
                {{row(call.grad_rescale), rescale_sum, 1, channels, pitch},
                 {row(call.grad_rebias), rebias_sum, 1, channels, pitch}},
                threads);
    }
  }
};

}  // namespace

extern const FeatureMixingCpuKernels feature_mixing_kernels;
const FeatureMixingCpuKernels feature_mixing_kernels = {
    {&workspace_bytes<MlpForward, PointwiseMlpForward>, &launch<MlpForward, PointwiseMlpForward>},
    {&workspace_bytes<MlpBackward, PointwiseMlpBackward>, &launch<MlpBackward, PointwiseMlpBackward>},
    {&workspace_bytes<LocalForward, LocalMixingForward>, &launch<LocalForward, LocalMixingForward>},
    {&workspace_bytes<LocalBackward, LocalMixingBackward>, &launch<LocalBackward, LocalMixingBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
