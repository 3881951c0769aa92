// Compiled once per instruction set. The mean and the centred sum of squares of every tile, added up in the
// tiles' order in float64, give μ and σ of its sample; a second pass normalises tiles in cache, where the
// products find them (see pixels_cpu.h). With x̂ = (x − μ)/σ, N elements in a sample, g the incoming gradients:
//   grad_n = value_weightᵀ·g_value + query_key_weightᵀ·g_query_key
//   grad_norm_weight = Σ_pixels grad_n ⊙ x̂,  grad_norm_bias = Σ_pixels grad_n
//   grad_x = (norm_weight ⊙ grad_n − mean(norm_weight ⊙ grad_n) − x̂·mean(norm_weight ⊙ grad_n ⊙ x̂))/σ
//            + g_mean/N + x̂·g_deviation/N
// The backward finds μ and σ again; the first term waits in grad_x for the means over the sample.

#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t summed_pixels = 64;  // in the arithmetic's type, then in float64

// Σ term(channel, vector) over all vectors of pixels.
template <typename T, typename Term>
double sum_of_pixels(const T* pixels, int64_t pitch, int64_t count, Term term) {
  double total = 0;
  for (int64_t first = 0; first < count; first += summed_pixels) {
    const int64_t last = smaller(count, first + summed_pixels);
    for (int64_t c = 0; c < pitch; c += Vec<T>::size()) {
      Vec<T> sum(0);
      for (int64_t p = first; p < last; ++p) sum = sum + term(c, Vec<T>::loadu(pixels + p * pitch + c));
      total += static_cast<double>(sum_of_lanes(sum));
    }
  }
  return total;
}

// out = (in − centre) ⊙ scale + shift at every pixel.
template <typename T>
void rescale_pixels(const T* in, int64_t pitch, int64_t count, const T* centre, const T* scale, const T* shift,
                    T* out) {
  for (int64_t place = 0; place < count * pitch; place += pitch)
    for (int64_t c = 0; c < pitch; c += Vec<T>::size()) {
      const Vec<T> centred = Vec<T>::loadu(in + place + c) - Vec<T>::loadu(centre + c);
      at::vec::fmadd(centred, Vec<T>::loadu(scale + c), Vec<T>::loadu(shift + c)).store(out + place + c);
    }
}

// A number for every channel, zeros behind.
template <typename T>
void fill_channels(double value, int64_t channels, T* vector) {
  for (int64_t c = 0; c < channel_pitch<T>(channels); ++c) vector[c] = c < channels ? static_cast<T>(value) : T(0);
}

struct Moments {
  double mean;
  double squares;  // sum of the squared distances from it
};

// What forward and backward share: μ and σ of each sample.
template <typename S>
struct Normalization {
  using T = Arithmetic<S>;

  const FeatureMixingShape& shape;
  const ConstMapView& x;
  const Tiling& tiling;
  const int64_t channels = shape.channels, pitch = channel_pitch<T>(channels);
  const int64_t tiles = tiling.tiles();  // of a sample

  struct Found {
    Moments* of_tiles;         // [B, tiles]
    double *mean, *deviation;  // [B]
    T *centre, *inverse;       // [B, pitch], μ and 1/σ for every channel
  };

  Found found(Arena& arena) const {
    return {arena.take<Moments>(shape.batch * tiles), arena.take<double>(shape.batch), arena.take<double>(shape.batch),
            arena.take<T>(shape.batch * pitch), arena.take<T>(shape.batch * pitch)};
  }

  double elements() const { return static_cast<double>(channels * shape.height * shape.width); }  // of a sample

  Tile tile(int64_t task) const { return tiling.tile(task / tiles, task % tiles); }

  Moments of_tile(const Tile& tile, T* pixels, T* centre) const {
    const int64_t count = tile.height * tile.width;
    load_pixels<S>(x, channels, tile, pixels, tile.width * pitch);
    const double elements = static_cast<double>(count * channels);
    const double mean = sum_of_pixels(pixels, pitch, count, [](int64_t, const Vec<T>& v) { return v; }) / elements;
    fill_channels(mean, channels, centre);
    const double squares = sum_of_pixels(pixels, pitch, count, [&](int64_t c, const Vec<T>& v) {
      const Vec<T> distance = v - Vec<T>::loadu(centre + c);
      return distance * distance;
    });
    const double rounding = mean - static_cast<double>(centre[0]);
    return {mean, squares - elements * rounding * rounding};
  }

  // From the moments of all tiles.
  void finish(const Found& found) const {
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
      double mean = 0, squares = 0, elements = 0;
      for (int64_t index = 0; index < tiles; ++index) {
        const Tile tile = tiling.tile(sample, index);
        const Moments& moments = found.of_tiles[sample * tiles + index];
        const double added = static_cast<double>(tile.height * tile.width * channels);
        const double distance = moments.mean - mean, share = added / (elements + added);
        squares += moments.squares + distance * distance * elements * share;
        mean += distance * share;
        elements += added;
      }
      const double deviation = __builtin_sqrt(squares / elements + norm_eps);
      found.mean[sample] = mean;
      found.deviation[sample] = deviation;
      fill_channels(mean, channels, found.centre + sample * pitch);
      fill_channels(1 / deviation, channels, found.inverse + sample * pitch);
    }
  }
};

template <typename S>
struct QkvForward {
  using T = Arithmetic<S>;

  const NormalizedQkvForward& call;
  const FeatureMixingShape& shape = call.shape;
  const int64_t channels = shape.channels, pitch = channel_pitch<T>(channels);
  const int64_t query_key_pitch = channel_pitch<T>(2 * channels);
  const Tiling tiling = small_pointwise_tiling(
      shape, (2 * pitch + query_key_pitch) * sizeof(T),
      rows_follow(call.x, shape) && rows_follow(call.value, shape) && rows_follow(call.query_key, shape));
  const Normalization<S> normalization{shape, call.x, tiling};
  const int64_t pixels = tiling.tile_height * tiling.tile_width;
  const int64_t tasks = shape.batch * tiling.tiles();

  struct Weights {
    T *norm, *norm_bias, *value, *value_bias, *query_key, *query_key_bias;
  };

  Weights weights(Arena& arena) const {
    return {arena.take<T>(pitch),
            arena.take<T>(pitch),
            arena.take<T>(channels * pitch),
            arena.take<T>(pitch),
            arena.take<T>(channels * query_key_pitch),
            arena.take<T>(query_key_pitch)};
  }

  struct Scratch {
    T *x, *value, *query_key, *vector;
  };

  Scratch scratch(Arena& arena) const {
    return {take_pixels<T>(arena, pixels, pitch), take_pixels<T>(arena, pixels, pitch),
            take_pixels<T>(arena, pixels, query_key_pitch), arena.take<T>(pitch)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    weights(arena);
    normalization.found(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Weights packed = weights(arena);
    const auto found = normalization.found(arena);
    fill_vector<S>(call.weights.norm_weight, channels, packed.norm);
    fill_vector<S>(call.weights.norm_bias, channels, packed.norm_bias);
    fill_matrix<S>(call.weights.value_weight, channels, channels, true, packed.value);
    fill_vector<S>(call.weights.value_bias, channels, packed.value_bias);
    fill_matrix<S>(call.weights.query_key_weight, 2 * channels, channels, true, packed.query_key);
    fill_vector<S>(call.weights.query_key_bias, 2 * channels, packed.query_key_bias);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      found.of_tiles[task] = normalization.of_tile(normalization.tile(task), at.x, at.vector);
    });
    normalization.finish(found);
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
      static_cast<S*>(call.mean)[sample] = static_cast<S>(found.mean[sample]);
      static_cast<S*>(call.deviation)[sample] = static_cast<S>(found.deviation[sample]);
    }
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const Tile tile = normalization.tile(task);
      const int64_t count = tile.height * tile.width;
      for (int64_t c = 0; c < pitch; ++c) at.vector[c] = packed.norm[c] * found.inverse[tile.sample * pitch + c];
      load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
      rescale_pixels(at.x, pitch, count, found.centre + tile.sample * pitch, at.vector, packed.norm_bias, at.x);
      multiply_pixels<false>(at.x, pitch, count, packed.value, pitch, pitch, channels,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               (sum + Vec<T>::loadu(packed.value_bias + j)).store(at.value + p * pitch + j);
                             });
      store_pixels<S>(at.value, tile.width * pitch, channels, tile, call.value);
      multiply_pixels<false>(
          at.x, pitch, count, packed.query_key, query_key_pitch, query_key_pitch, channels,
          [&](int64_t p, int64_t j, const Vec<T>& sum) {
            (sum + Vec<T>::loadu(packed.query_key_bias + j)).store(at.query_key + p * query_key_pitch + j);
          });
      store_pixels<S>(at.query_key, tile.width * query_key_pitch, 2 * channels, tile, call.query_key);
    });
  }
};

template <typename S>
struct QkvBackward {
  using T = Arithmetic<S>;

  const NormalizedQkvBackward& call;
  const FeatureMixingShape& shape = call.shape;
  const int64_t channels = shape.channels, pitch = channel_pitch<T>(channels);
  // the gradients of value and of query_key, one behind the other
  const int64_t projected = 3 * channels;
  const int64_t projected_pitch = channel_pitch<T>(channels + channel_pitch<T>(2 * channels));
  const Tiling tiling =
      pointwise_tiling(shape, (3 * pitch + projected_pitch) * sizeof(T),
                       rows_follow(call.x, shape) && rows_follow(call.grad_value, shape) &&
                           rows_follow(call.grad_query_key, shape) && rows_follow(call.grad_x, shape));
  const Normalization<S> normalization{shape, call.x, tiling};
  const Groups groups{shape, tiling};
  const int64_t pixels = tiling.tile_height * tiling.tile_width;
  const int64_t tasks = shape.batch * tiling.tiles();
  const int64_t sums_count = shape.batch * groups.per_sample;
  const bool sums_products = call.grad_value_weight || call.grad_query_key_weight;
  // places in a group's sums
  const int64_t norm_sum = 0, norm_bias_sum = pitch, weight_sum = norm_bias_sum + pitch;
  const int64_t bias_sum = weight_sum + projected * pitch, sums_size = bias_sum + projected_pitch;

  struct Weights {
    T *norm, *norm_bias, *zeros, *projection, *sums;
    T *same, *slope;  // [B]: what all elements of grad_x have in common, and what goes with x̂
  };

  Weights weights(Arena& arena) const {
    return {arena.take<T>(pitch),
            arena.take<T>(pitch),
            arena.take<T>(pitch),
            arena.take<T>(projected * pitch),
            arena.take<T>(sums_count * sums_size),
            arena.take<T>(shape.batch),
            arena.take<T>(shape.batch)};
  }

  struct Scratch {
    T *x, *n, *grad_n, *grad, *vector;
  };

  Scratch scratch(Arena& arena) const {
    return {take_pixels<T>(arena, pixels, pitch), take_pixels<T>(arena, pixels, pitch),
            take_pixels<T>(arena, pixels, pitch), take_pixels<T>(arena, pixels, projected_pitch), arena.take<T>(pitch)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    weights(arena);
    normalization.found(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Weights packed = weights(arena);
    const auto found = normalization.found(arena);
    fill_vector<S>(call.weights.norm_weight, channels, packed.norm);
    fill_vector<S>(call.weights.norm_bias, channels, packed.norm_bias);
    fill_vector<S>(nullptr, channels, packed.zeros);
    fill_matrix<S>(call.weights.value_weight, channels, channels, false, packed.projection);
    fill_matrix<S>(call.weights.query_key_weight, 2 * channels, channels, false, packed.projection + channels * pitch);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      found.of_tiles[task] = normalization.of_tile(normalization.tile(task), at.x, at.vector);
    });
    normalization.finish(found);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      if (task >= sums_count) return;  // groups of tiles, which may be fewer
      const int64_t sample = task / groups.per_sample, group = task % groups.per_sample;
      T* const sums = packed.sums + task * sums_size;
      __builtin_memset(sums, 0, sums_size * sizeof(T));
      for (int64_t index = groups.first_tile(group); index < groups.first_tile(group + 1); ++index)
        sum_tile(tiling.tile(sample, index), packed, found, at, sums);
    });
    add_up_sums(packed, threads);
    if (!call.grad_x.data) return;
    for (int64_t sample = 0; sample < shape.batch; ++sample) {
      const auto term = [&](const void* grad, int64_t place) {
        const double incoming = static_cast<double>(static_cast<const S*>(grad)[sample]) / normalization.elements();
        return static_cast<T>(incoming - mean_of(packed, sample, place) / found.deviation[sample]);
      };
      packed.same[sample] = term(call.grad_mean, norm_bias_sum);
      packed.slope[sample] = term(call.grad_deviation, norm_sum);
    }
    for_each_task(*this, arena.rest(), threads,
                  [&](int64_t task, const Scratch& at) { finish_tile(normalization.tile(task), packed, found, at); });
  }

  // Sums over a tile, and norm_weight ⊙ grad_n/σ as grad_x.
  void sum_tile(const Tile& tile, const Weights& packed, const typename Normalization<S>::Found& found,
                const Scratch& at, T* sums) const {
    const int64_t count = tile.height * tile.width;
    const T* inverse = found.inverse + tile.sample * pitch;
    load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
    rescale_pixels(at.x, pitch, count, found.centre + tile.sample * pitch, inverse, packed.zeros, at.x);
    load_pixels<S>(call.grad_value, channels, tile, at.grad, tile.width * projected_pitch, projected_pitch);
    load_pixels<S>(call.grad_query_key, 2 * channels, tile, at.grad + channels, tile.width * projected_pitch,
                   projected_pitch);
    multiply_pixels<false>(at.grad, projected_pitch, count, packed.projection, pitch, pitch, projected,
                           [&](int64_t p, int64_t j, const Vec<T>& sum) { sum.store(at.grad_n + p * pitch + j); });
    for (int64_t c = 0; c < pitch; c += Vec<T>::size()) {
      Vec<T> of_weight(0), of_bias(0);
      for (int64_t place = c; place < count * pitch; place += pitch) {
        const Vec<T> grad = Vec<T>::loadu(at.grad_n + place);
        of_weight = at::vec::fmadd(grad, Vec<T>::loadu(at.x + place), of_weight);
        of_bias = of_bias + grad;
      }
      (Vec<T>::loadu(sums + norm_sum + c) + of_weight).store(sums + norm_sum + c);
      (Vec<T>::loadu(sums + norm_bias_sum + c) + of_bias).store(sums + norm_bias_sum + c);
    }
    if (sums_products) {
      rescale_pixels(at.x, pitch, count, packed.zeros, packed.norm, packed.norm_bias, at.n);
      add_pixel_products(at.grad, projected_pitch, projected, at.n, pitch, count, sums + weight_sum);
    }
    add_pixels(at.grad, projected_pitch, count, sums + bias_sum);
    if (call.grad_x.data) {
      for (int64_t c = 0; c < pitch; ++c) at.vector[c] = packed.norm[c] * inverse[c];
      rescale_pixels(at.grad_n, pitch, count, packed.zeros, at.vector, packed.zeros, at.grad_n);
      store_pixels<S>(at.grad_n, tile.width * pitch, channels, tile, call.grad_x);
    }
  }

  void add_up_sums(const Weights& packed, int threads) const {
    add_up<S>(packed.sums, sums_size, 0, sums_count,
              {{call.grad_norm_weight, norm_sum, 1, channels, pitch},
               {call.grad_norm_bias, norm_bias_sum, 1, channels, pitch},
               {call.grad_value_weight, weight_sum, channels, channels, pitch},
               {call.grad_query_key_weight, weight_sum + channels * pitch, 2 * channels, channels, pitch},
               {call.grad_value_bias, bias_sum, 1, channels, pitch},
               {call.grad_query_key_bias, bias_sum + channels, 1, 2 * channels, pitch}},
              threads);
  }

  // Mean over a sample of norm_weight ⊙ what was summed at `place`.
  double mean_of(const Weights& packed, int64_t sample, int64_t place) const {
    double total = 0;
    for (int64_t group = sample * groups.per_sample; group < (sample + 1) * groups.per_sample; ++group)
      for (int64_t c = 0; c < channels; ++c)
        total += static_cast<double>(packed.norm[c]) * static_cast<double>(packed.sums[group * sums_size + place + c]);
    return total / normalization.elements();
  }

  // Adds to grad_x what the sums over its sample give.
  void finish_tile(const Tile& tile, const Weights& packed, const typename Normalization<S>::Found& found,
                   const Scratch& at) const {
    const Vec<T> same(packed.same[tile.sample]), slope(packed.slope[tile.sample]);
    const ConstMapView begun{call.grad_x.data, call.grad_x.stride_n, call.grad_x.stride_c, call.grad_x.stride_h,
                             call.grad_x.stride_w};
    const int64_t count = tile.height * tile.width;
    load_pixels<S>(call.x, channels, tile, at.x, tile.width * pitch);
    rescale_pixels(at.x, pitch, count, found.centre + tile.sample * pitch, found.inverse + tile.sample * pitch,
                   packed.zeros, at.x);
    load_pixels<S>(begun, channels, tile, at.grad_n, tile.width * pitch);
    for (int64_t i = 0; i < count * pitch; i += Vec<T>::size())
      (at::vec::fmadd(Vec<T>::loadu(at.x + i), slope, same) + Vec<T>::loadu(at.grad_n + i)).store(at.grad_n + i);
    store_pixels<S>(at.grad_n, tile.width * pitch, channels, tile, call.grad_x);
  }
};

}  // namespace

extern const NormalizedQkvCpuKernels normalized_qkv_kernels;
const NormalizedQkvCpuKernels normalized_qkv_kernels = {
    {&workspace_bytes<QkvForward, NormalizedQkvForward>, &launch<QkvForward, NormalizedQkvForward>},
    {&workspace_bytes<QkvBackward, NormalizedQkvBackward>, &launch<QkvBackward, NormalizedQkvBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
