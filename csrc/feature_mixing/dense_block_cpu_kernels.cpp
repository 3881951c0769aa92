// Compiled once per instruction set. One sample at a time lies in memory as pixels (see pixels_cpu.h) of
// C + layers·growth channels, surrounded by two pixels of zeros: every convolution reads the channels
// before its own and writes its own, so that nothing is concatenated. Tasks are bands of rows. The
// backward computes the features again; their gradients lie in memory the same way:
//   grad_fused = grad ⊙ (fused > 0),  grad_features = fuse_weightᵀ·grad_fused, (+ grad for x)
//   from the last layer to the first, with h its channels:  grad_h ⊙= (h > 0)
//     grad_weight(tap) = Σ_pixels grad_h·features(p + tap)ᵀ,  grad_features += weight(tap)ᵀ·grad_h(q − tap)

#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int side = 3, taps = side * side, dilation = 2;
constexpr int64_t border = dilation * (side / 2);
constexpr int64_t most_bands = 16, band_pixels = 512;

// Σ_taps Σ_k in[pixel + offsets[tap], k] · weight[(tap·depth + k)·weight_pitch + column] for consecutive pixels.
template <typename T, int vectors, typename Finish>
void convolve_columns(const T* in, const int64_t* offsets, int64_t pitch, int64_t pixels, const T* weight,
                      int64_t weight_pitch, int64_t depth, Finish finish) {
  constexpr int block = product_block<vectors>;
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t first = 0; first < pixels; first += block) {
    Vec<T> sum[block][vectors];
    UNROLLED_FOR(r, block) UNROLLED_FOR(v, vectors) { sum[r][v] = Vec<T>(0); }
    const T* right = weight;
    for (int tap = 0; tap < taps; ++tap) {
      const T* left = in + first * pitch + offsets[tap];
      for (int64_t k = 0; k < depth; ++k, ++left, right += weight_pitch) {
        Vec<T> value[vectors];
        UNROLLED_FOR(v, vectors) { value[v] = load_once(right + v * lanes); }
        UNROLLED_FOR(r, block) {
          const Vec<T> factor(left[r * pitch]);
          UNROLLED_FOR(v, vectors) { sum[r][v] = at::vec::fmadd(factor, value[v], sum[r][v]); }
        }
      }
    }
    UNROLLED_FOR(r, block) {
      if (first + r < pixels) UNROLLED_FOR(v, vectors) {
          finish(first + r, v * lanes, sum[r][v]);
        }
    }
  }
}

template <typename T, typename Finish>
void convolve(const T* in, const int64_t* offsets, int64_t pitch, int64_t pixels, const T* weight, int64_t weight_pitch,
              int64_t depth, Finish finish) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t column = 0; column < weight_pitch;) {
    const auto shifted = [&](int64_t p, int64_t c, const Vec<T>& sum) { finish(p, column + c, sum); };
    const int64_t left = (weight_pitch - column) / lanes;
    const T* const panel = weight + column;
    if (left == 2) {
      convolve_columns<T, 2>(in, offsets, pitch, pixels, panel, weight_pitch, depth, shifted);
      column += 2 * lanes;
    } else if (left == 1) {
      convolve_columns<T, 1>(in, offsets, pitch, pixels, panel, weight_pitch, depth, shifted);
      column += lanes;
    } else {
      convolve_columns<T, 3>(in, offsets, pitch, pixels, panel, weight_pitch, depth, shifted);
      column += 3 * lanes;
    }
  }
}

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
  const int64_t pitch = channel_pitch<T>(all_channels), growth_pitch = channel_pitch<T>(growth);
  const int64_t x_pitch = channel_pitch<T>(channels);
  const int64_t row_pitch = (width + 2 * border) * pitch;
  const int64_t pixels = height * width;
  // every band has sums of all weights, which outweigh the pixels of a small map
  const int64_t bands = smaller(height, larger(2, smaller(most_bands, pixels / band_pixels)));

  int64_t depth(int layer) const { return channels + layer * growth; }
  int64_t weight_place(int layer) const {  // in the flat weights
    return growth * taps * (layer * channels + layer * (layer - 1) / 2 * growth);
  }
  int64_t first_row(int64_t band) const { return band * height / bands; }
  T* row(T* features, int64_t i) const { return features + (i + border) * row_pitch + border * pitch; }

  struct Packed {
    T *forward[layers], *backward[layers];  // [taps, depth, growth] and [taps, growth, depth]
    T *bias[layers], *fuse_transposed, *fuse, *fuse_bias;
    int64_t offsets[taps], flipped[taps];
  };

  Packed pack(Arena& arena) const {
    Packed packed;
    for (int layer = 0; layer < layers; ++layer) {
      packed.forward[layer] = arena.take<T>(taps * depth(layer) * growth_pitch);
      packed.backward[layer] = arena.take<T>(taps * growth * channel_pitch<T>(depth(layer)));
      packed.bias[layer] = arena.take<T>(growth_pitch);
    }
    packed.fuse_transposed = arena.take<T>(all_channels * x_pitch);
    packed.fuse = arena.take<T>(channels * pitch);
    packed.fuse_bias = arena.take<T>(x_pitch);
    for (int tap = 0; tap < taps; ++tap) {
      packed.offsets[tap] = dilation * ((tap / side - 1) * row_pitch + (tap % side - 1) * pitch);
      packed.flipped[tap] = -packed.offsets[tap];
    }
    return packed;
  }

  // Padding around the features, for what products touch beyond the last pixel.
  T* take_features(Arena& arena) const {
    return arena.take<T>((height + 2 * border) * row_pitch + 2 * row_step * pitch);
  }

  void fill(const Packed& packed, int threads) const {
    const S* bias = static_cast<const S*>(weights.dense_bias);
    parallel_tasks(layers, threads, [&](int64_t task, int) {
      const int layer = static_cast<int>(task);
      const int64_t columns = depth(layer), columns_pitch = channel_pitch<T>(columns);
      const S* from = static_cast<const S*>(weights.dense_weight) + weight_place(layer);
      T* const backward = packed.backward[layer];
      __builtin_memset(backward, 0, taps * growth * columns_pitch * sizeof(T));
      for (int64_t o = 0; o < growth; ++o)
        transpose(from + o * columns * taps, taps, backward + o * columns_pitch, growth * columns_pitch, columns,
                  static_cast<int64_t>(taps));
      __builtin_memset(packed.forward[layer], 0, taps * columns * growth_pitch * sizeof(T));
      for (int tap = 0; tap < taps; ++tap)
        transpose(backward + tap * growth * columns_pitch, columns_pitch,
                  packed.forward[layer] + tap * columns * growth_pitch, growth_pitch, growth, columns);
      fill_vector<S>(bias + layer * growth, growth, packed.bias[layer]);
    });
    fill_matrix<S>(weights.fuse_weight, channels, all_channels, true, packed.fuse_transposed);
    fill_matrix<S>(weights.fuse_weight, channels, all_channels, false, packed.fuse);
    fill_vector<S>(weights.fuse_bias, channels, packed.fuse_bias);
  }

  // function(row) for all rows, bands of them in parallel
  template <typename Function>
  void for_each_row(int threads, Function function) const {
    parallel_tasks(bands, threads, [&](int64_t band, int) {
      for (int64_t i = first_row(band); i < first_row(band + 1); ++i) function(i);
    });
  }

  void compute_features(const ConstMapView& x, int64_t sample, const Packed& packed, T* features, int threads) const {
    for_each_row(threads, [&](int64_t i) {
      load_pixels<S>(x, channels, {sample, i, 0, 1, width}, row(features, i), row_pitch, pitch);
    });
    for (int layer = 0; layer < layers; ++layer) {
      const T* bias = packed.bias[layer];
      for_each_row(threads, [&](int64_t i) {
        T* const pixels = row(features, i);
        T* const own = pixels + depth(layer);
        convolve(pixels, packed.offsets, pitch, width, packed.forward[layer], growth_pitch, depth(layer),
                 [&](int64_t p, int64_t j, const Vec<T>& sum) {
                   const Vec<T> value = at::vec::maximum(sum + Vec<T>::loadu(bias + j), Vec<T>(0));
                   value.store(own + p * pitch + j, static_cast<int>(smaller(lanes, growth - j)));
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

  int64_t workspace_bytes(int) const {
    Arena arena(nullptr);
    dense.pack(arena);
    dense.take_features(arena);
    for (int64_t band = 0; band < dense.bands; ++band) take_row(arena);
    return arena.bytes();
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
      dense.compute_features(call.x, sample, packed, features, threads);
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

  // Places in a band's sums: the layers' weights [taps, growth, depth], then all biases and the fusion.
  int64_t weight_sum(int layer) const {
    int64_t place = 0;
    for (int k = 0; k < layer; ++k) place += taps * growth * channel_pitch<T>(dense.depth(k));
    return place;
  }

  struct Own {
    T *features, *gradients, *sums, *permuted;
    T *grad[most_bands], *fused[most_bands];
  };

  int64_t bias_sum() const { return weight_sum(layers); }
  int64_t fuse_sum() const { return bias_sum() + layers * dense.growth_pitch; }
  int64_t fuse_bias_sum() const { return fuse_sum() + channels * pitch; }
  int64_t sums_size() const { return fuse_bias_sum() + x_pitch; }

  Own take(Arena& arena) const {
    Own own;
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

  int64_t workspace_bytes(int) const {
    Arena arena(nullptr);
    dense.pack(arena);
    take(arena);
    return arena.bytes();
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const auto packed = dense.pack(arena);
    const int64_t before = arena.bytes();
    const Own own = take(arena);
    __builtin_memset(static_cast<char*>(workspace) + before, 0, arena.bytes() - before);
    dense.fill(packed, threads);
    for (int64_t sample = 0; sample < call.shape.batch; ++sample) {
      dense.compute_features(call.x, sample, packed, own.features, threads);
      parallel_tasks(dense.bands, threads, [&](int64_t band, int) { backward_of_fusion(sample, band, packed, own); });
      for (int layer = layers - 1; layer >= 0; --layer) {
        parallel_tasks(dense.bands, threads, [&](int64_t band, int) { sum_layer(layer, band, packed, own); });
        dense.for_each_row(threads, [&](int64_t i) { backward_of_layer(layer, i, packed, own); });
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
      multiply_pixels<false>(fused, x_pitch, dense.width, packed.fuse, pitch, pitch, channels,
                             [&](int64_t p, int64_t j, const Vec<T>& sum) {
                               if (p < dense.width) sum.store(gradients + p * pitch + j);
                             });
      for (int64_t p = 0; p < dense.width; ++p)
        for (int64_t c = 0; c < channels; c += lanes)
          add_to(gradients + p * pitch + c, Vec<T>::loadu(grad + p * x_pitch + c), channels - c);
    }
  }

  // A layer's gradient through its ReLU, and what it adds to those of its weights.
  void sum_layer(int layer, int64_t band, const typename Dense<S>::Packed& packed, const Own& own) const {
    const int64_t depth = dense.depth(layer), depth_pitch = channel_pitch<T>(depth);
    T* const sums = own.sums + band * sums_size();
    for (int64_t i = dense.first_row(band); i < dense.first_row(band + 1); ++i) {
      const T* features = dense.row(own.features, i);
      T* const grad = dense.row(own.gradients, i) + depth;
      for (int64_t p = 0; p < dense.width; ++p) {
        for (int64_t j = 0; j < growth; j += lanes) {
          const int64_t count = smaller(lanes, growth - j);
          const Vec<T> g = Vec<T>::loadu(grad + p * pitch + j, count);
          const Vec<T> is_positive = Vec<T>::loadu(features + p * pitch + depth + j, count) > Vec<T>(0);
          Vec<T>::blendv(Vec<T>(0), g, is_positive).store(grad + p * pitch + j, static_cast<int>(count));
        }
      }
      if (!sums_weights) continue;
      for (int tap = 0; tap < taps; ++tap) {
        T* const tap_sums = sums + weight_sum(layer) + tap * growth * depth_pitch;
        multiply_pixels<true>(grad, pitch, growth, features + packed.offsets[tap], pitch, depth_pitch, dense.width,
                              [&](int64_t o, int64_t j, const Vec<T>& sum) {
                                if (o < growth) add_to(tap_sums + o * depth_pitch + j, sum, lanes);
                              });
      }
      T* const bias_sums = sums + bias_sum() + layer * dense.growth_pitch;
      for (int64_t p = 0; p < dense.width; ++p)
        for (int64_t j = 0; j < growth; j += lanes)
          add_to(bias_sums + j, Vec<T>::loadu(grad + p * pitch + j, smaller(lanes, growth - j)), lanes);
    }
  }

  void backward_of_layer(int layer, int64_t i, const typename Dense<S>::Packed& packed, const Own& own) const {
    const int64_t depth = dense.depth(layer);
    T* const gradients = dense.row(own.gradients, i);
    convolve(gradients + depth, packed.flipped, pitch, dense.width, packed.backward[layer], channel_pitch<T>(depth),
             growth, [&](int64_t p, int64_t j, const Vec<T>& sum) {
               add_to(gradients + p * pitch + j, sum, smaller(lanes, depth - j));
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
                {{permuted, weight_sum(layer), taps * growth, depth, channel_pitch<T>(depth)}}, threads);
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
