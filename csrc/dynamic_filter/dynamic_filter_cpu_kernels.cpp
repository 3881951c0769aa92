// Compiled once per instruction set. Every task is one tile of one sample, or several in a row where
// gradients of weights are summed. Maps are read into planes (see planes_cpu.h), vectors run along
// pixels, and filters are products of W with a block of pixels of the features held in registers.
//
// Backward, with g the incoming gradient and x_k the map x shifted by offset(k):
//   grad_features[j] = Σ_c g[c] · (Σ_k W[c, k, j] · x_k[c])
//   grad_W[c, k, j]  = Σ_pixels x_k[c] · (g[c] · features[j])      the bias is a feature of ones
//   grad_x[c, q]     = Σ_k (filters[c, k] · g[c])(q − offset(k))   filters recomputed on the halo

#include "common/planes_cpu.h"
#include "common/workspace_cpu.h"
#include "dynamic_filter/dynamic_filter_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// How many accumulators a loop holds in registers. `taps` of the K² are computed at a time.
template <int K>
struct Blocking;
template <>
struct Blocking<1> {
  static constexpr int taps = 1;
  static constexpr int vectors = many_registers ? 8 : 4;   // of pixels, with `taps` filters each
  static constexpr int features = many_registers ? 8 : 4;  // with `taps` weight gradients each
};
template <>
struct Blocking<3> {
  static constexpr int taps = many_registers ? 9 : 3;
  static constexpr int vectors = 3;
  static constexpr int features = 3;
};
template <>
struct Blocking<5> {
  static constexpr int taps = 5;
  static constexpr int vectors = many_registers ? 5 : 2;
  static constexpr int features = many_registers ? 5 : 2;
};
template <>
struct Blocking<7> {
  static constexpr int taps = 7;
  static constexpr int vectors = many_registers ? 3 : 1;
  static constexpr int features = many_registers ? 3 : 1;
};
// Features × vectors of pixels of the gradient of features, held twice.
constexpr int gradient_features = many_registers ? 4 : 3;
constexpr int gradient_vectors = many_registers ? 3 : 2;

template <int K>
ALWAYS_INLINE int64_t offset(int tap, int64_t pitch) {
  return (tap / K - K / 2) * pitch + tap % K - K / 2;
}

// Filters of one channel at `vectors` vectors of pixels: bias[t] + Σ_j weight[j·K² + t] · features[j].
template <typename T, int K>
ALWAYS_INLINE void predict(const T* features, int64_t stride, int64_t feature_channels, const T* weight, const T* bias,
                           Vec<T> (&filters)[Blocking<K>::taps][Blocking<K>::vectors]) {
  constexpr int taps = Blocking<K>::taps, vectors = Blocking<K>::vectors, lanes = Vec<T>::size();
  UNROLLED_FOR(t, taps) UNROLLED_FOR(v, vectors) { filters[t][v] = Vec<T>(0); }
  for (int64_t j = 0; j < feature_channels; ++j, features += stride, weight += K * K) {
    Vec<T> feature[vectors];
    UNROLLED_FOR(v, vectors) { feature[v] = Vec<T>::loadu(features + v * lanes); }
    UNROLLED_FOR(t, taps) {
      const Vec<T> w(weight[t]);
      UNROLLED_FOR(v, vectors) { filters[t][v] = at::vec::fmadd(w, feature[v], filters[t][v]); }
    }
  }
  // last, as a convolution does: added first, the bias would make every rounding of the sum larger
  UNROLLED_FOR(t, taps) UNROLLED_FOR(v, vectors) { filters[t][v] = filters[t][v] + Vec<T>(bias[t]); }
}

template <typename T, int K>
void predicted_forward_tile(const Planes& layout, int64_t begin, int64_t end, int64_t channels,
                            int64_t feature_channels, const T* x, const T* features, const T* weight, const T* bias,
                            bool residual, T* y) {
  constexpr int taps = Blocking<K>::taps, vectors = Blocking<K>::vectors, lanes = Vec<T>::size();
  for (int64_t p = begin; p < end; p += vectors * lanes) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* centre = x + c * layout.stride + p;
      Vec<T> sum[vectors];
      UNROLLED_FOR(v, vectors) { sum[v] = residual ? Vec<T>::loadu(centre + v * lanes) : Vec<T>(0); }
      for (int tap = 0; tap < K * K; tap += taps) {
        Vec<T> filters[taps][vectors];
        predict<T, K>(features + p, layout.stride, feature_channels, weight + c * feature_channels * K * K + tap,
                      bias + c * K * K + tap, filters);
        UNROLLED_FOR(t, taps) {
          const T* shifted = centre + offset<K>(tap + t, layout.pitch);
          UNROLLED_FOR(v, vectors) {
            sum[v] = at::vec::fmadd(filters[t][v], Vec<T>::loadu(shifted + v * lanes), sum[v]);
          }
        }
      }
      UNROLLED_FOR(v, vectors) { sum[v].store(y + c * layout.stride + p + v * lanes); }
    }
  }
}

template <typename T, int K>
void forward_tile(const Planes& layout, int64_t begin, int64_t end, int64_t channels, const T* x, const T* filters,
                  bool residual, T* y) {
  constexpr int lanes = Vec<T>::size();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = begin; p < end; p += lanes) {
      const T* centre = x + c * layout.stride + p;
      Vec<T> sum = residual ? Vec<T>::loadu(centre) : Vec<T>(0);
      UNROLLED_FOR(k, K * K) {
        sum = at::vec::fmadd(Vec<T>::loadu(filters + (c * K * K + k) * layout.stride + p),
                             Vec<T>::loadu(centre + offset<K>(k, layout.pitch)), sum);
      }
      sum.store(y + c * layout.stride + p);
    }
  }
}

// grad_x (+)= Σ_t products[t] shifted back, for `taps` taps from `tap` on, over a tile's pixels.
template <typename T, int K, int taps>
void gather(const Planes& layout, int64_t begin, int64_t end, const T* products, int tap, const T* start, T* grad_x) {
  for (int64_t q = begin; q < end; q += Vec<T>::size()) {
    Vec<T> sum = start ? Vec<T>::loadu(start + q) : Vec<T>(0);
    UNROLLED_FOR(t, taps) {
      sum = sum + Vec<T>::loadu(products + t * layout.stride + q - offset<K>(tap + t, layout.pitch));
    }
    sum.store(grad_x + q);
  }
}

// One channel of grad_x from filters recomputed on a tile and its halo. `products` are `taps` planes.
template <typename T, int K>
void predicted_grad_x(const Planes& layout, const Tile& tile, int64_t feature_channels, const T* grad,
                      const T* features, const T* weight, const T* bias, bool residual, T* products, T* grad_x) {
  constexpr int taps = Blocking<K>::taps, vectors = Blocking<K>::vectors, lanes = Vec<T>::size();
  for (int tap = 0; tap < K * K; tap += taps) {
    for (int64_t p = 0; p < layout.end_of_halo(tile); p += vectors * lanes) {
      Vec<T> filters[taps][vectors];
      predict<T, K>(features + p, layout.stride, feature_channels, weight + tap, bias + tap, filters);
      UNROLLED_FOR(v, vectors) {
        const Vec<T> g = Vec<T>::loadu(grad + p + v * lanes);
        UNROLLED_FOR(t, taps) { (filters[t][v] * g).store(products + t * layout.stride + p + v * lanes); }
      }
    }
    gather<T, K, taps>(layout, layout.begin, layout.end(tile), products, tap,
                       tap > 0 ? grad_x : (residual ? grad : nullptr), grad_x);
  }
}

// grad_features over a tile's pixels; weight is packed by blocks of gradient_features features.
template <typename T, int K>
void predicted_grad_features(const Planes& layout, int64_t begin, int64_t end, int64_t channels,
                             int64_t feature_channels, const T* grad, const T* x, const T* weight, T* grad_features) {
  constexpr int block = gradient_features, vectors = gradient_vectors, lanes = Vec<T>::size();
  for (int64_t p = begin; p < end; p += vectors * lanes) {
    const T* w = weight;
    for (int64_t first = 0; first < feature_channels; first += block) {
      Vec<T> sum[block][vectors];
      UNROLLED_FOR(j, block) UNROLLED_FOR(v, vectors) { sum[j][v] = Vec<T>(0); }
      for (int64_t c = 0; c < channels; ++c) {
        const T* centre = x + c * layout.stride + p;
        Vec<T> inner[block][vectors];
        UNROLLED_FOR(j, block) UNROLLED_FOR(v, vectors) { inner[j][v] = Vec<T>(0); }
        for (int dy = -(K / 2); dy <= K / 2; ++dy) {
          for (int dx = -(K / 2); dx <= K / 2; ++dx, w += block) {
            Vec<T> shifted[vectors];
            UNROLLED_FOR(v, vectors) { shifted[v] = Vec<T>::loadu(centre + dy * layout.pitch + dx + v * lanes); }
            UNROLLED_FOR(j, block) UNROLLED_FOR(v, vectors) {
              inner[j][v] = at::vec::fmadd(Vec<T>(w[j]), shifted[v], inner[j][v]);
            }
          }
        }
        UNROLLED_FOR(v, vectors) {
          const Vec<T> g = Vec<T>::loadu(grad + c * layout.stride + p + v * lanes);
          UNROLLED_FOR(j, block) { sum[j][v] = at::vec::fmadd(g, inner[j][v], sum[j][v]); }
        }
      }
      UNROLLED_FOR(j, block) {
        if (first + j < feature_channels) {
          UNROLLED_FOR(v, vectors) { sum[j][v].store(grad_features + (first + j) * layout.stride + p + v * lanes); }
        }
      }
    }
  }
}

// Adds one channel's part of the tile to the sums of the features in [first, last): weight_sums[k·Cf + j],
// and bias_sums[k] for j = Cf, whose plane is 1 everywhere. `grad` is 0 outside the tile.
template <typename T, int K>
void predicted_grad_weight(const Planes& layout, int64_t begin, int64_t end, int64_t first, int64_t last,
                           int64_t feature_channels, const T* grad, const T* x, const T* features, T* weight_sums,
                           T* bias_sums) {
  constexpr int taps = Blocking<K>::taps, block = Blocking<K>::features, lanes = Vec<T>::size();
  for (int64_t j0 = first; j0 < last; j0 += block) {
    const T* feature[block];
    UNROLLED_FOR(j, block) { feature[j] = features + smaller(j0 + j, last - 1) * layout.stride; }
    for (int tap = 0; tap < K * K; tap += taps) {
      Vec<T> sum[taps][block];
      UNROLLED_FOR(t, taps) UNROLLED_FOR(j, block) { sum[t][j] = Vec<T>(0); }
      for (int64_t p = begin; p < end; p += lanes) {
        const Vec<T> g = Vec<T>::loadu(grad + p);
        Vec<T> product[block];
        UNROLLED_FOR(j, block) { product[j] = g * Vec<T>::loadu(feature[j] + p); }
        UNROLLED_FOR(t, taps) {
          const Vec<T> shifted = load_once(x + p + offset<K>(tap + t, layout.pitch));
          UNROLLED_FOR(j, block) { sum[t][j] = at::vec::fmadd(shifted, product[j], sum[t][j]); }
        }
      }
      UNROLLED_FOR(t, taps) {
        UNROLLED_FOR(j, block) {
          if (j0 + j < smaller(last, feature_channels)) {
            weight_sums[(tap + t) * feature_channels + j0 + j] += sum_of_lanes(sum[t][j]);
          } else if (j0 + j < last) {
            bias_sums[tap + t] += sum_of_lanes(sum[t][j]);
          }
        }
      }
    }
  }
}

// The predictor's weight and bias in the arithmetic's type, in the order in which loops read them.
template <typename S, int K>
struct PackedPredictor {
  using T = Arithmetic<S>;
  T* weight;               // [C, Cf, K²], for the filters
  T* weight_for_features;  // [Cf / gradient_features, C, K², gradient_features], for their gradient
  T* bias;                 // [samples, C·K²]
  int64_t bias_stride;     // from sample to sample

  PackedPredictor(Arena& arena, const DynamicFilterShape& shape, const FilterPredictor& predictor,
                  bool packs_for_features) {
    const int64_t rows = shape.channels * K * K;
    const int64_t samples = predictor.bias_per_sample ? shape.batch : 1;
    weight = arena.take<T>(rows * predictor.feature_channels);
    weight_for_features =
        packs_for_features ? arena.take<T>(rows * round_up(predictor.feature_channels, gradient_features)) : nullptr;
    bias = arena.take<T>(samples * rows);
    bias_stride = predictor.bias_per_sample ? rows : 0;
  }

  void fill(const DynamicFilterShape& shape, const FilterPredictor& predictor) {
    const int64_t features = predictor.feature_channels, rows = shape.channels * K * K;
    const S* from = static_cast<const S*>(predictor.weight);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < features; ++j)
        weight[(row / (K * K) * features + j) * K * K + row % (K * K)] = static_cast<T>(from[row * features + j]);
    if (weight_for_features) {
      for (int64_t j = 0; j < round_up(features, gradient_features); ++j)
        for (int64_t row = 0; row < rows; ++row)
          weight_for_features[(j / gradient_features * rows + row) * gradient_features + j % gradient_features] =
              j < features ? static_cast<T>(from[row * features + j]) : T(0);
    }
    const int64_t biases = predictor.bias_per_sample ? shape.batch * rows : rows;
    const S* bias_from = static_cast<const S*>(predictor.bias);
    for (int64_t i = 0; i < biases; ++i) bias[i] = bias_from ? static_cast<T>(bias_from[i]) : T(0);
  }
};

// A tile's planes should stay in the second-level cache: pixels of a tile with `planes` planes. Small
// images are cut smaller, for the sake of threads.
Tiling tiling_for(const DynamicFilterShape& shape, int64_t planes, int64_t bytes_per_element) {
  constexpr int64_t widest = 64, fewest_pixels = 512, most_pixels = 4096;
  const int64_t fit = smaller(most_pixels, cache / (planes * bytes_per_element));
  const int64_t share = shape.batch * shape.height * shape.width / enough_tasks;
  return Tiling(shape.height, shape.width, larger(fewest_pixels, smaller(fit, share)), widest);
}

template <typename S, int K>
struct PredictedForward {
  using T = Arithmetic<S>;

  const PredictedDynamicFilterForward& call;
  const int64_t channels = call.shape.channels;
  const int64_t features = call.predictor.feature_channels;
  const Tiling tiling = tiling_for(call.shape, 2 * channels + features, sizeof(T));
  const Planes layout{tiling, K / 2};
  const int64_t tasks = call.shape.batch * tiling.tiles();

  struct Scratch {
    T *x, *features, *y;
  };

  Scratch scratch(Arena& arena) const {
    return {arena.take<T>(channels * layout.stride), arena.take<T>(features * layout.stride),
            arena.take<T>(channels * layout.stride)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    PackedPredictor<S, K>(arena, call.shape, call.predictor, false);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    PackedPredictor<S, K> predictor(arena, call.shape, call.predictor, false);
    predictor.fill(call.shape, call.predictor);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& planes) {
      const Tile tile = tiling.tile(task / tiling.tiles(), task % tiling.tiles());
      load_tile_with_halo<S>(call.x, 0, channels, tile, tiling, layout, planes.x);
      load_tile<S>(call.predictor.features, 0, features, tile, layout, planes.features);
      predicted_forward_tile<T, K>(layout, layout.begin, layout.end(tile), channels, features, planes.x,
                                   planes.features, predictor.weight,
                                   predictor.bias + tile.sample * predictor.bias_stride, call.shape.residual, planes.y);
      store_tile<S>(planes.y, layout, tile, call.y, 0, channels);
    });
  }
};

template <typename S, int K>
struct PredictedBackward {
  using T = Arithmetic<S>;

  const PredictedDynamicFilterBackward& call;
  const int64_t batch = call.shape.batch;
  const int64_t channels = call.shape.channels;
  const int64_t features = call.predictor.feature_channels;
  const int64_t rows = channels * K * K;
  const bool sums_weights = call.grad_weight || call.grad_bias;
  const int64_t first_sum = call.grad_weight ? 0 : features;
  const int64_t last_sum = call.grad_bias ? features + 1 : features;
  const Tiling tiling = tiling_for(call.shape, 3 * channels + 2 * features + Blocking<K>::taps, sizeof(T));
  const Planes layout{tiling, K / 2};
  // A task is a group of consecutive tiles of the whole batch, with sums of its own where weights need
  // them: those of all groups take a fraction of what one map of filters would.
  const int64_t tiles = batch * tiling.tiles();
  const int64_t pixels = batch * call.shape.height * call.shape.width;
  const int64_t tasks =
      sums_weights ? smaller(tiles, larger(1, smaller(enough_tasks, pixels / (4 * features)))) : tiles;

  int64_t first_tile(int64_t group) const { return group * tiles / tasks; }

  // Sums of all groups: grad_weight's by group, grad_bias's by group and sample. Both numbers only grow
  // from tile to tile, so that their sum tells apart all pairs that occur.
  struct Sums {
    T* weight;  // [tasks, C·K², Cf]
    T* bias;    // [tasks + B, C·K²]
  };

  Sums sums(Arena& arena) const {
    return {arena.take<T>(call.grad_weight ? tasks * rows * features : 0),
            arena.take<T>(call.grad_bias ? (tasks + batch) * rows : 0)};
  }

  struct Scratch {
    T *grad, *x, *features, *grad_x, *grad_features, *products, *inner_grad;
  };

  Scratch scratch(Arena& arena) const {
    Scratch planes;
    planes.grad = arena.take<T>(channels * layout.stride);
    planes.x = arena.take<T>(channels * layout.stride);
    planes.features = arena.take<T>((features + 1) * layout.stride);
    planes.grad_x = arena.take<T>(channels * layout.stride);
    planes.grad_features = arena.take<T>(features * layout.stride);
    planes.products = arena.take<T>(Blocking<K>::taps * layout.stride);
    planes.inner_grad = arena.take<T>(layout.stride);
    return planes;
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    PackedPredictor<S, K>(arena, call.shape, call.predictor, true);
    sums(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    PackedPredictor<S, K> predictor(arena, call.shape, call.predictor, true);
    predictor.fill(call.shape, call.predictor);
    const Sums all_sums = sums(arena);
    for_each_task(*this, arena.rest(), threads, [&](int64_t group, const Scratch& planes) {
      Sums own_sums{all_sums.weight + group * rows * features, all_sums.bias};
      if (call.grad_weight) __builtin_memset(own_sums.weight, 0, rows * features * sizeof(T));
      for (int64_t index = first_tile(group); index < first_tile(group + 1); ++index) {
        const int64_t sample = index / tiling.tiles();
        if (call.grad_bias && (index == first_tile(group) || index % tiling.tiles() == 0)) {
          own_sums.bias = all_sums.bias + (group + sample) * rows;
          __builtin_memset(own_sums.bias, 0, rows * sizeof(T));
        }
        backward_tile(tiling.tile(sample, index % tiling.tiles()), predictor, planes, own_sums);
      }
    });
    if (sums_weights) add_up(all_sums, threads);
  }

  void backward_tile(const Tile& tile, const PackedPredictor<S, K>& predictor, const Scratch& planes,
                     const Sums& own_sums) const {
    const int64_t begin = layout.begin, end = layout.end(tile);
    load_tile_with_halo<S>(call.grad, 0, channels, tile, tiling, layout, planes.grad);
    if (call.grad_x.data || call.grad_weight)
      load_tile_with_halo<S>(call.predictor.features, 0, features, tile, tiling, layout, planes.features);
    if (call.grad_features.data || sums_weights)
      load_tile_with_halo<S>(call.x, 0, channels, tile, tiling, layout, planes.x);
    if (call.grad_x.data) {
      const T* bias = predictor.bias + tile.sample * predictor.bias_stride;
      for (int64_t c = 0; c < channels; ++c)
        predicted_grad_x<T, K>(layout, tile, features, planes.grad + c * layout.stride, planes.features,
                               predictor.weight + c * features * K * K, bias + c * K * K, call.shape.residual,
                               planes.products, planes.grad_x + c * layout.stride);
      store_tile<S>(planes.grad_x, layout, tile, call.grad_x, 0, channels);
    }
    if (call.grad_features.data) {
      predicted_grad_features<T, K>(layout, begin, end, channels, features, planes.grad, planes.x,
                                    predictor.weight_for_features, planes.grad_features);
      store_tile<S>(planes.grad_features, layout, tile, call.grad_features, 0, features);
    }
    if (sums_weights) {
      T* const ones = planes.features + features * layout.stride;
      for (int64_t p = 0; p < end + Planes::slack; ++p) ones[p] = T(1);
      fill_zero(planes.inner_grad, end + Planes::slack);
      for (int64_t c = 0; c < channels; ++c) {
        const T* grad = planes.grad + c * layout.stride;
        for (int64_t i = 0; i < tile.height; ++i)
          __builtin_memcpy(planes.inner_grad + begin + i * layout.pitch, grad + begin + i * layout.pitch,
                           tile.width * sizeof(T));
        predicted_grad_weight<T, K>(layout, begin, end, first_sum, last_sum, features, planes.inner_grad,
                                    planes.x + c * layout.stride, planes.features,
                                    own_sums.weight + c * K * K * features, own_sums.bias + c * K * K);
      }
    }
  }

  // The second stage: groups are added in their order.
  void add_up(const Sums& all_sums, int threads) const {
    parallel_tasks(rows, threads, [&](int64_t row, int) {
      if (call.grad_weight) {
        for (int64_t j = 0; j < features; ++j) {
          double sum = 0;
          for (int64_t group = 0; group < tasks; ++group) sum += all_sums.weight[(group * rows + row) * features + j];
          static_cast<S*>(call.grad_weight)[row * features + j] = static_cast<S>(sum);
        }
      }
      if (call.grad_bias) {
        double sum = 0;
        for (int64_t group = 0, sample = 0; sample < batch; ++sample) {
          // groups with tiles of this sample; the last of them may go on in the next one
          for (; group < tasks && first_tile(group) < (sample + 1) * tiling.tiles(); ++group)
            sum += all_sums.bias[(group + sample) * rows + row];
          if (group > 0 && first_tile(group) > (sample + 1) * tiling.tiles()) --group;
          if (call.predictor.bias_per_sample) {
            static_cast<S*>(call.grad_bias)[sample * rows + row] = static_cast<S>(sum);
            sum = 0;
          }
        }
        if (!call.predictor.bias_per_sample) static_cast<S*>(call.grad_bias)[row] = static_cast<S>(sum);
      }
    });
  }
};

// Given filters are read once: a task is a group of channels of a tile whose filters fit in cache. Where
// rows of pixels lie in memory that is one channel, where channels do, as many as there is room for.
template <typename S, int K>
struct GivenFilters {
  using T = Arithmetic<S>;

  const DynamicFilterShape& shape;
  const ConstMapView& filters;
  const bool rows = filters.stride_w == 1;
  const Tiling tiling{shape.height, shape.width, rows ? 4096 : 512, rows ? 256 : 32};
  const Planes layout{tiling, K / 2};
  const int64_t fit = larger(1, cache / ((K * K + 3) * layout.stride * static_cast<int64_t>(sizeof(T))));
  const int64_t group = rows ? 1 : divide_up(shape.channels, divide_up(shape.channels, fit));
  const int64_t groups = divide_up(shape.channels, group);
  const int64_t tasks = shape.batch * tiling.tiles() * groups;

  struct Scratch {
    T *x, *grad, *filters, *out;
  };

  Scratch scratch(Arena& arena) const {
    return {arena.take<T>(group * layout.stride), arena.take<T>(group * layout.stride),
            arena.take<T>(group * K * K * layout.stride), arena.take<T>(group * layout.stride)};
  }

  // function(tile, first channel, channels, planes) for every group of channels of every tile
  template <typename Function>
  void for_each_group(void* workspace, int threads, Function function) const {
    for_each_task(*this, static_cast<char*>(workspace), threads, [&](int64_t task, const Scratch& planes) {
      const int64_t channel = task % groups * group, index = task / groups;
      function(tiling.tile(index / tiling.tiles(), index % tiling.tiles()), channel,
               smaller(group, shape.channels - channel), planes);
    });
  }
};

template <typename S, int K>
struct Forward {
  using T = Arithmetic<S>;

  const DynamicFilterForward& call;
  const GivenFilters<S, K> work{call.shape, call.filters};

  int64_t workspace_bytes(int threads) const { return scratch_bytes(work, threads); }

  void launch(void* workspace, int threads) const {
    const Planes& layout = work.layout;
    work.for_each_group(workspace, threads, [&](const Tile& tile, int64_t c, int64_t channels, const auto& planes) {
      load_tile_with_halo<S>(call.x, c, channels, tile, work.tiling, layout, planes.x);
      load_tile<S>(call.filters, c * K * K, channels * K * K, tile, layout, planes.filters);
      forward_tile<T, K>(layout, layout.begin, layout.end(tile), channels, planes.x, planes.filters,
                         call.shape.residual, planes.out);
      store_tile<S>(planes.out, layout, tile, call.y, c, channels);
    });
  }
};

template <typename S, int K>
struct Backward {
  using T = Arithmetic<S>;

  const DynamicFilterBackward& call;
  const GivenFilters<S, K> work{call.shape, call.filters};

  int64_t workspace_bytes(int threads) const { return scratch_bytes(work, threads); }

  void launch(void* workspace, int threads) const {
    const Planes& layout = work.layout;
    work.for_each_group(workspace, threads, [&](const Tile& tile, int64_t first, int64_t channels, const auto& planes) {
      const int64_t begin = layout.begin, end = layout.end(tile);
      load_tile_with_halo<S>(call.grad, first, channels, tile, work.tiling, layout, planes.grad);
      if (call.grad_x.data) {
        load_tile_with_halo<S>(call.filters, first * K * K, channels * K * K, tile, work.tiling, layout,
                               planes.filters);
        for (int64_t c = 0; c < channels; ++c) {
          const T* grad = planes.grad + c * layout.stride;
          T* products = planes.filters + c * K * K * layout.stride;
          for (int k = 0; k < K * K; ++k)
            multiply(products + k * layout.stride, grad, 0, layout.end_of_halo(tile), products + k * layout.stride);
          gather<T, K, K * K>(layout, begin, end, products, 0, call.shape.residual ? grad : nullptr,
                              planes.out + c * layout.stride);
        }
        store_tile<S>(planes.out, layout, tile, call.grad_x, first, channels);
      }
      if (call.grad_filters.data) {
        load_tile_with_halo<S>(call.x, first, channels, tile, work.tiling, layout, planes.x);
        for (int64_t c = 0; c < channels; ++c)
          for (int k = 0; k < K * K; ++k)
            multiply(planes.x + c * layout.stride + offset<K>(k, layout.pitch), planes.grad + c * layout.stride, begin,
                     end, planes.filters + (c * K * K + k) * layout.stride);
        store_tile<S>(planes.filters, layout, tile, call.grad_filters, first * K * K, channels * K * K);
      }
    });
  }

  static void multiply(const T* a, const T* b, int64_t begin, int64_t end, T* product) {
    for (int64_t p = begin; p < end; p += Vec<T>::size())
      (Vec<T>::loadu(a + p) * Vec<T>::loadu(b + p)).store(product + p);
  }
};

// Calls function with a kernel made for the call's data type and kernel size.
template <template <typename S, int K> class Kernel, typename S, typename Call, typename Function>
auto with_size(const Call& call, Function function) {
  switch (call.shape.kernel_size) {
    case 1:
      return function(Kernel<S, 1>{call});
    case 3:
      return function(Kernel<S, 3>{call});
    case 5:
      return function(Kernel<S, 5>{call});
    default:
      return function(Kernel<S, 7>{call});
  }
}

template <template <typename S, int K> class Kernel, typename Call, typename Function>
auto with_kernel(const Call& call, Function function) {
  switch (call.shape.dtype) {
    case DataType::float64:
      return with_size<Kernel, double>(call, function);
    case DataType::bfloat16:
      return with_size<Kernel, c10::BFloat16>(call, function);
    case DataType::float16:
      return with_size<Kernel, c10::Half>(call, function);
    default:
      return with_size<Kernel, float>(call, function);
  }
}

template <template <typename S, int K> class Kernel, typename Call>
int64_t workspace_bytes(const Call& call, int threads) {
  return with_kernel<Kernel>(call, [&](const auto& kernel) { return kernel.workspace_bytes(threads); });
}

template <template <typename S, int K> class Kernel, typename Call>
void launch(const Call& call, void* workspace, int threads) {
  with_kernel<Kernel>(call, [&](const auto& kernel) { kernel.launch(workspace, threads); });
}

}  // namespace

extern const DynamicFilterCpuKernels dynamic_filter_kernels;
const DynamicFilterCpuKernels dynamic_filter_kernels = {
    {&workspace_bytes<Forward, DynamicFilterForward>, &launch<Forward, DynamicFilterForward>},
    {&workspace_bytes<Backward, DynamicFilterBackward>, &launch<Backward, DynamicFilterBackward>},
    {&workspace_bytes<PredictedForward, PredictedDynamicFilterForward>,
     &launch<PredictedForward, PredictedDynamicFilterForward>},
    {&workspace_bytes<PredictedBackward, PredictedDynamicFilterBackward>,
     &launch<PredictedBackward, PredictedDynamicFilterBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
