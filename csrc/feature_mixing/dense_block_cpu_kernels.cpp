// Compiled once per instruction set. One sample at a time lies in memory as pixels (see pixels_cpu.h) of
// C + layers·growth channels, surrounded by zeros: every convolution reads the channels before its own and
// writes its own, so that nothing is concatenated. The backward computes the features again; their gradients
// lie in memory the same way:
//   grad_fused = grad ⊙ (fused > 0),  grad_features = fuse_weightᵀ·grad_fused, (+ grad for x)
//   from the last layer to the first, with h its channels:  grad_h ⊙= (h > 0)
//     grad_weight(tap) = Σ_pixels grad_h·features(p + tap)ᵀ,  grad_features += weight(tap)ᵀ·grad_h(q − tap)
//
// All three kinds of convolutions are Winograd's (see winograd_tiles_cpu.h): tasks are strips of tiles, whose
// transforms stay in the second-level cache, for grad_weight bands of them. All other tasks are bands of rows.

#include "common/winograd_tiles_cpu.h"
#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int taps = winograd_side * winograd_side, dilation = 2;
constexpr int64_t border = dilation * (winograd_side / 2);
constexpr int64_t most_bands = 16, band_pixels = 512, strip_tiles = 48;

// Adds a vector to `count` elements at most.
template <typename T>
ALWAYS_INLINE void add_to(T* target, const Vec<T>& value, int64_t count) {
  if (count >= Vec<T>::size()) {
    (Vec<T>::loadu(target) + value).store(target);
  } else if (count > 0) {
    (Vec<T>::loadu(target, count) + value).store(target, count);
  }
}

// What forward and backward share: the place of everything, the packed weights, the features.
template <typename S>
struct Dense {
  using T = Arithmetic<S>;
  static constexpr int layers = dense_layers;
  static constexpr int64_t lanes = Vec<T>::size();

  const DenseBlockShape& shape;
  const DenseWeights& weights;
  const int64_t channels = shape.channels, growth = shape.growth, width = shape.width, height = shape.height;
  const int64_t all_channels = channels + layers * growth;
  const int64_t x_pitch = channel_pitch<T>(channels), growth_pitch = channel_pitch<T>(growth);
  const int64_t fuse_pitch = channel_pitch<T>(all_channels);
  const int64_t lead = x_pitch - channels;  // zeros before a pixel's channels, so that those of layers are aligned
  const int64_t pitch = channel_pitch<T>(lead + all_channels);
  const int64_t row_pitch = (width + 2 * border) * pitch;
  const int64_t pixels = height * width;
  // every band has sums of all weights, which outweigh the pixels of a small map
  const int64_t bands = smaller(height, larger(2, smaller(most_bands, pixels / band_pixels)));
  const WinogradTiles tiles{height, width, dilation};
  const int64_t tasks = divide_up(tiles.count(), strip_tiles);  // of strips

  int64_t depth(int layer) const { return channels + layer * growth; }
  int64_t weight_place(int layer) const {  // in the flat weights
    return growth * taps * (layer * channels + layer * (layer - 1) / 2 * growth);
  }
  int64_t first_row(int64_t band) const { return band * height / bands; }
  int64_t first_tile(int64_t strip) const { return strip * tiles.count() / tasks; }
  T* row(T* features, int64_t i) const { return features + (i + border) * row_pitch + border * pitch + lead; }

  struct Packed {
    T* filters[layers];  // [points, depth, growth]
    T *bias[layers], *fuse_transposed, *fuse_bias;
  };

  Packed pack(Arena& arena) const {
    Packed packed;
    for (int layer = 0; layer < layers; ++layer) {
      packed.filters[layer] = arena.take<T>(winograd_points * depth(layer) * growth_pitch);
      packed.bias[layer] = arena.take<T>(growth_pitch);
    }
    packed.fuse_transposed = arena.take<T>(all_channels * x_pitch);
    packed.fuse_bias = arena.take<T>(x_pitch);
    return packed;
  }

  // Zeros around the features, twice as many behind them: for what tiles and products touch beyond the last pixel.
  T* take_features(Arena& arena) const {
    return arena.take<T>((height + 3 * border) * row_pitch + 2 * row_step * pitch);
  }

  // A strip of tiles: the channels before a layer's own, and its own.
  struct Strip {
    Transformed<T> inputs, outputs;
  };

  Strip scratch(Arena& arena) const {
    const auto inputs = Transformed<T>::take(arena, strip_tiles, lead + depth(layers - 1));
    return {inputs, Transformed<T>::take(arena, strip_tiles, growth)};
  }

  void fill(const Packed& packed, int threads) const {
    const S* bias = static_cast<const S*>(weights.dense_bias);
    parallel_tasks(layers, threads, [&](int64_t task, int) {
      const int layer = static_cast<int>(task);
      const S* from = static_cast<const S*>(weights.dense_weight) + weight_place(layer);
      fill_filters(from, growth, depth(layer), packed.filters[layer]);
      fill_vector<S>(bias + layer * growth, growth, packed.bias[layer]);
    });
    fill_matrix<S>(weights.fuse_weight, channels, all_channels, true, packed.fuse_transposed);
    fill_vector<S>(weights.fuse_bias, channels, packed.fuse_bias);
  }

  // function(row) for all rows, bands of them in parallel
  template <typename Function>
  void for_each_row(int threads, Function function) const {
    parallel_tasks(bands, threads, [&](int64_t band, int) {
      for (int64_t i = first_row(band); i < first_row(band + 1); ++i) function(i);
    });
  }

  // Transforms `count` channels around the tiles in [first, last); the lead is channel 0.
  void transform_inputs(const T* pixels, int64_t channel, int64_t count, int64_t first, int64_t last,
                        const Transformed<T>& transformed) const {
    transform_tiles<winograd_tile>([](const auto& in, auto& out) { transform_values(in, out); }, pixels + channel,
                                   row_pitch, pitch, count, tiles, first, last, transformed);
  }

  void compute_features(const ConstMapView& x, int64_t sample, const Packed& packed, T* features, char* scratches,
                        int threads) const {
    for_each_row(threads, [&](int64_t i) {
      load_pixels<S>(x, channels, {sample, i, 0, 1, width}, row(features, i), row_pitch, pitch);
    });
    for (int layer = 0; layer < layers; ++layer) {
      const T* bias = packed.bias[layer];
      for_each_task(*this, scratches, threads, [&](int64_t strip, const Strip& own) {
        const int64_t first = first_tile(strip), last = first_tile(strip + 1);
        transform_inputs(features, 0, lead + depth(layer), first, last, own.inputs);
        multiply_tiles(own.inputs.from_channel(lead), last - first, packed.filters[layer], growth_pitch, depth(layer),
                       own.outputs);
        finish_tiles(own.outputs, growth, tiles, first, last, [&](int64_t i, int64_t p, int64_t j, const Vec<T>& sum) {
          const Vec<T> value = at::vec::maximum(sum + Vec<T>::loadu(bias + j), Vec<T>(0));
          value.store(row(features, i) + p * pitch + depth(layer) + j, static_cast<int>(smaller(lanes, growth - j)));
        });
      });
    }
  }

  // finish(pixel, channel, fuse_weight · features + fuse_bias) for a row
  template <typename Finish>
  ALWAYS_INLINE void fuse(const T* pixels, const Packed& packed, Finish finish) const {
    multiply_pixels<false>(
        pixels, pitch, width, packed.fuse_transposed, x_pitch, x_pitch, all_channels,
        [&](int64_t p, int64_t j, const Vec<T>& sum) { finish(p, j, sum + Vec<T>::loadu(packed.fuse_bias + j)); });
  }
};

template <typename S>
struct DenseForward {
  using T = Arithmetic<S>;

  const DenseBlockForward& call;
  const Dense<S> dense{call.shape, call.weights};

  T* take_row(Arena& arena) const { return take_pixels<T>(arena, dense.width, dense.x_pitch); }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    dense.pack(arena);
    dense.take_features(arena);
    for (int64_t band = 0; band < dense.bands; ++band) take_row(arena);
    return arena.bytes() + scratch_bytes(dense, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const auto packed = dense.pack(arena);
    const int64_t before = arena.bytes();
    T* const features = dense.take_features(arena);
    __builtin_memset(features, 0, arena.bytes() - before);
    dense.fill(packed, threads);
    T* results[most_bands];
    for (int64_t band = 0; band < dense.bands; ++band) results[band] = take_row(arena);
    for (int64_t sample = 0; sample < call.shape.batch; ++sample) {
      dense.compute_features(call.x, sample, packed, features, arena.rest(), threads);
      parallel_tasks(dense.bands, threads, [&](int64_t band, int) {
        T* const result = results[band];
        for (int64_t i = dense.first_row(band); i < dense.first_row(band + 1); ++i) {
          const T* pixels = dense.row(features, i);
          dense.fuse(pixels, packed, [&](int64_t p, int64_t j, const Vec<T>& fused) {
            const Vec<T> x = Vec<T>::loadu(pixels + p * dense.pitch + j);  // beyond the channels nobody reads it
            (x + at::vec::maximum(fused, Vec<T>(0))).store(result + p * dense.x_pitch + j);
          });
          store_pixels<S>(result, 0, dense.channels, {sample, i, 0, 1, dense.width}, call.y);
        }
      });
    }
  }
};

template <typename S>
struct DenseBackward {
  using T = Arithmetic<S>;
  static constexpr int layers = dense_layers;
  static constexpr int64_t lanes = Vec<T>::size();

  const DenseBlockBackward& call;
  const Dense<S> dense{call.shape, call.weights};
  const int64_t channels = dense.channels, growth = dense.growth, pitch = dense.pitch, x_pitch = dense.x_pitch;
  const bool sums_weights =
      call.grad_dense_weight || call.grad_dense_bias || call.grad_fuse_weight || call.grad_fuse_bias;

  int64_t depth_pitch(int layer) const { return channel_pitch<T>(dense.lead + dense.depth(layer)); }

  // Places in a band's sums: the layers' weights [taps, growth, lead and depth], then all biases and the fusion.
  int64_t weight_sum(int layer) const {
    int64_t place = 0;
    for (int k = 0; k < layer; ++k) place += taps * growth * depth_pitch(k);
    return place;
  }

  struct Own {
    T* filters[layers];  // [points, growth, lead and depth]
    T *fuse, *features, *gradients, *sums, *permuted;
    T *grad[most_bands], *fused[most_bands];
  };

  int64_t bias_sum() const { return weight_sum(layers); }
  int64_t fuse_sum() const { return bias_sum() + layers * dense.growth_pitch; }
  int64_t fuse_bias_sum() const { return fuse_sum() + channels * pitch; }
  int64_t sums_size() const { return fuse_bias_sum() + x_pitch; }

  // What a band of tiles needs: a strip of it, and its sums for a layer.
  struct Products {
    typename Dense<S>::Strip tiles;
    T* sums;  // [points, growth, lead and depth]
  };

  struct BandTasks {
    const Dense<S>& dense;
    const int64_t tasks = dense.bands;

    Products scratch(Arena& arena) const {
      const auto tiles = dense.scratch(arena);
      return {tiles, arena.take<T>(winograd_points * dense.growth * tiles.inputs.pitch)};
    }
  };

  const BandTasks band_tasks{dense};

  int64_t tile_of_band(int64_t band) const { return band * dense.tiles.count() / dense.bands; }

  Own take(Arena& arena) const {
    Own own;
    for (int layer = 0; layer < layers; ++layer)
      own.filters[layer] = arena.take<T>(winograd_points * growth * depth_pitch(layer));
    own.fuse = arena.take<T>(channels * dense.fuse_pitch);
    own.features = dense.take_features(arena);
    own.gradients = dense.take_features(arena);
    own.sums = arena.take<T>(sums_weights ? dense.bands * sums_size() : 0);
    own.permuted = arena.take<T>(sums_weights ? bias_sum() : 0);
    for (int64_t band = 0; band < dense.bands; ++band) {
      own.grad[band] = take_pixels<T>(arena, dense.width, x_pitch);
      own.fused[band] = take_pixels<T>(arena, dense.width, x_pitch);
    }
    return own;
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    dense.pack(arena);
    take(arena);
    return arena.bytes() +
           larger(scratch_bytes(dense, threads), call.grad_dense_weight ? scratch_bytes(band_tasks, threads) : 0);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const auto packed = dense.pack(arena);
    const int64_t before = arena.bytes();
    const Own own = take(arena);
    __builtin_memset(static_cast<char*>(workspace) + before, 0, arena.bytes() - before);
    dense.fill(packed, threads);
    fill_matrix<S>(call.weights.fuse_weight, channels, dense.all_channels, false, own.fuse);
    parallel_tasks(layers, threads, [&](int64_t task, int) {
      const int layer = static_cast<int>(task);
      flip_filters(packed.filters[layer], growth, dense.depth(layer), own.filters[layer] + dense.lead,
                   depth_pitch(layer));
    });
    for (int64_t sample = 0; sample < call.shape.batch; ++sample) {
      dense.compute_features(call.x, sample, packed, own.features, arena.rest(), threads);
      parallel_tasks(dense.bands, threads, [&](int64_t band, int) { backward_of_fusion(sample, band, packed, own); });
      for (int layer = layers - 1; layer >= 0; --layer) {
        parallel_tasks(dense.bands, threads, [&](int64_t band, int) { backward_of_relu(layer, band, own); });
        if (call.grad_dense_weight) {
          for_each_task(band_tasks, arena.rest(), threads, [&](int64_t band, const Products& products) {
            backward_of_weight(layer, band, products, own);
          });
        }
        for_each_task(dense, arena.rest(), threads, [&](int64_t strip, const typename Dense<S>::Strip& tiles) {
          backward_of_layer(layer, strip, tiles, own);
        });
      }
      if (call.grad_x.data) {
        parallel_tasks(dense.bands, threads, [&](int64_t band, int) {
          for (int64_t i = dense.first_row(band); i < dense.first_row(band + 1); ++i) {
            const T* gradients = dense.row(own.gradients, i);
            for (int64_t p = 0; p < dense.width; ++p)
              for (int64_t c = 0; c < x_pitch; c += lanes)
                Vec<T>::loadu(gradients + p * pitch + c).store(own.grad[band] + p * x_pitch + c);
            store_pixels<S>(own.grad[band], 0, channels, {sample, i, 0, 1, dense.width}, call.grad_x);
          }
        });
      }
    }
    if (sums_weights) add_up_sums(own, threads);
  }

  void backward_of_fusion(int64_t sample, int64_t band, const typename Dense<S>::Packed& packed, const Own& own) const {
    T *const grad = own.grad[band], *const fused = own.fused[band];
    T* const sums = own.sums + band * sums_size();
    for (int64_t i = dense.first_row(band); i < dense.first_row(band + 1); ++i) {
      const T* features = dense.row(own.features, i);
      T* const gradients = dense.row(own.gradients, i);
      load_pixels<S>(call.grad, channels, {sample, i, 0, 1, dense.width}, grad, 0, x_pitch);
      dense.fuse(features, packed, [&](int64_t p, int64_t j, const Vec<T>& sum) {
        const Vec<T> g = Vec<T>::loadu(grad + p * x_pitch + j);
        Vec<T>::blendv(Vec<T>(0), g, sum > Vec<T>(0)).store(fused + p * x_pitch + j);
      });
      if (sums_weights) {
        add_pixel_products(fused, x_pitch, channels, features, pitch, dense.width, sums + fuse_sum());
        add_pixels(fused, x_pitch, dense.width, sums + fuse_bias_sum());
      }
      multiply_pixels<false>(fused, x_pitch, dense.width, own.fuse, dense.fuse_pitch, dense.fuse_pitch, channels,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               if (p < dense.width) sum.store(gradients + p * pitch + j);
                             });
      for (int64_t p = 0; p < dense.width; ++p)
        for (int64_t c = 0; c < channels; c += lanes)
          add_to(gradients + p * pitch + c, Vec<T>::loadu(grad + p * x_pitch + c), channels - c);
    }
  }

  void backward_of_relu(int layer, int64_t band, const Own& own) const {
    const int64_t depth = dense.depth(layer);
    T* const bias_sums = own.sums + band * sums_size() + bias_sum() + layer * dense.growth_pitch;
    for (int64_t i = dense.first_row(band); i < dense.first_row(band + 1); ++i) {
      const T* features = dense.row(own.features, i) + depth;
      T* const grad = dense.row(own.gradients, i) + depth;
      for (int64_t j = 0; j < growth; j += lanes) {
        const int64_t count = smaller(lanes, growth - j);
        Vec<T> total(0);
        for (int64_t p = 0; p < dense.width; ++p) {
          const Vec<T> g = Vec<T>::loadu(grad + p * pitch + j, count);
          const Vec<T> is_positive = Vec<T>::loadu(features + p * pitch + j, count) > Vec<T>(0);
          const Vec<T> passed = Vec<T>::blendv(Vec<T>(0), g, is_positive);
          passed.store(grad + p * pitch + j, static_cast<int>(count));
          total = total + passed;
        }
        if (sums_weights) add_to(bias_sums + j, total, lanes);
      }
    }
  }

  // Adds up a band of tiles strip by strip at all points, and keeps the gradient of the nine taps.
  void backward_of_weight(int layer, int64_t band, const Products& products, const Own& own) const {
    const int64_t columns = depth_pitch(layer), size = growth * columns;
    const int64_t begin = tile_of_band(band), end = tile_of_band(band + 1);
    for (int64_t first = begin; first < end; first += strip_tiles) {
      const int64_t last = smaller(first + strip_tiles, end);
      const auto& [inputs, outputs] = products.tiles;
      dense.transform_inputs(own.features, 0, dense.lead + dense.depth(layer), first, last, inputs);
      transform_tiles<winograd_outputs>([](const auto& in, auto& out) { transform_gradients(in, out); },
                                        dense.row(own.gradients, 0) + dense.depth(layer), dense.row_pitch, pitch,
                                        growth, dense.tiles, first, last, outputs);
      for (int point = 0; point < winograd_points; ++point) {
        T* const sums = products.sums + point * size;
        multiply_pixels<true>(outputs.values + point * outputs.stride, outputs.pitch, growth,
                              inputs.values + point * inputs.stride, inputs.pitch, columns, last - first,
                              [&](int64_t o, int64_t j, const Vec<T>& sum) {
                                T* const total = sums + o * columns + j;
                                if (o < growth) (first == begin ? sum : Vec<T>::loadu(total) + sum).store(total);
                              });
      }
    }
    T* const sums = own.sums + band * sums_size() + weight_sum(layer);
    for (int64_t j = 0; j < size; j += lanes) {
      transform_both<winograd_tile, winograd_side, Vec<T>>(
          [](const auto& in, auto& out) { transform_weight_sums(in, out); },
          [&](int a, int b) { return Vec<T>::loadu(products.sums + (a * winograd_tile + b) * size + j); },
          [&](int a, int b, const Vec<T>& sum) { add_to(sums + (a * winograd_side + b) * size + j, sum, lanes); });
    }
  }

  void backward_of_layer(int layer, int64_t strip, const typename Dense<S>::Strip& tiles, const Own& own) const {
    const int64_t first = dense.first_tile(strip), last = dense.first_tile(strip + 1);
    const int64_t count = dense.lead + dense.depth(layer);
    dense.transform_inputs(own.gradients, count, growth, first, last, tiles.outputs);
    multiply_tiles(tiles.outputs, last - first, own.filters[layer], depth_pitch(layer), growth, tiles.inputs);
    finish_tiles(tiles.inputs, count, dense.tiles, first, last,
                 [&](int64_t i, int64_t p, int64_t j, const Vec<T>& sum) {
                   add_to(dense.row(own.gradients, i) - dense.lead + p * pitch + j, sum, count - j);
                 });
  }

  void add_up_sums(const Own& own, int threads) const {
    const int64_t size = sums_size(), bands = dense.bands;
    S* const grad_bias = static_cast<S*>(call.grad_dense_bias);
    for (int layer = 0; layer < layers && grad_bias; ++layer) {
      add_up<S>(own.sums, size, 0, bands,
                {{grad_bias + layer * growth, bias_sum() + layer * dense.growth_pitch, 1, growth, dense.growth_pitch}},
                threads);
    }
    add_up<S>(own.sums, size, 0, bands,
              {{call.grad_fuse_weight, fuse_sum(), channels, dense.all_channels, pitch},
               {call.grad_fuse_bias, fuse_bias_sum(), 1, channels, x_pitch}},
              threads);
    if (!call.grad_dense_weight) return;
    S* const permuted = reinterpret_cast<S*>(own.permuted);
    for (int layer = 0; layer < layers; ++layer) {
      const int64_t depth = dense.depth(layer);
      add_up<S>(own.sums, size, 0, bands,
                {{permuted, weight_sum(layer) + dense.lead, taps * growth, depth, depth_pitch(layer)}}, threads);
      S* const out = static_cast<S*>(call.grad_dense_weight) + dense.weight_place(layer);
      parallel_tasks(growth, threads, [&](int64_t o, int) {
        for (int64_t j = 0; j < depth; ++j)
          for (int tap = 0; tap < taps; ++tap)
            out[(o * depth + j) * taps + tap] = permuted[(tap * growth + o) * depth + j];
      });
    }
  }
};

}  // namespace

extern const DenseBlockCpuKernels dense_block_kernels;
const DenseBlockCpuKernels dense_block_kernels = {
    {&workspace_bytes<DenseForward, DenseBlockForward>, &launch<DenseForward, DenseBlockForward>},
    {&workspace_bytes<DenseBackward, DenseBlockBackward>, &launch<DenseBackward, DenseBlockBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
