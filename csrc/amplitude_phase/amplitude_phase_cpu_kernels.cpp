// Compiled once per instruction set. Every task is a tile of bins of one sample, or several in a row
// where gradients of weights are summed. A tile's bins become planes in cache, one for each channel and
// quantity; vectors run along bins, and the products over channels hold a block of rows × bins in
// registers. Beyond the last bin planes go on with X = 0 and G = 0, which add nothing to any sum.
//
// Backward, with Q = Re(ūG) or A·Im(v̄G), the gradient of the map's result, and c as amplitude_phase.h has it:
//   grad_hidden  = weight2ᵀ·Q ⊙ LeakyReLU′(h)
//   grad_weight2 = Q·LeakyReLU(h)ᵀ,  grad_weight1 = grad_hidden·inputᵀ  (input: A or P)
//   grad_output_weight = Re(grad)·Re(Y)ᵀ + Im(grad)·Im(Y)ᵀ, and of X in the place of Y for its other half

#include "amplitude_phase/amplitude_phase_cpu.h"
#include "common/pixels_cpu.h"
#include "common/planes_cpu.h"
#include "common/transpose_cpu.h"
#include "common/workspace_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// Accumulators of a product over channels: rows × vectors of bins. Where more channels are summed than the
// first-level cache has room for with so many bins, there are fewer bins and more rows.
constexpr int product_vectors = many_registers ? 6 : 2;
constexpr int product_rows = 4;
constexpr int deep_product_vectors = many_registers ? 3 : 2;
constexpr int deep_product_rows = many_registers ? 8 : 4;
constexpr int64_t deep_product = 100;  // channels from which on a product is deep
// Those of a product over bins: rows × rows.
constexpr int sum_rows = many_registers ? 4 : 3;

template <typename T>
constexpr int64_t product_bins = product_vectors * Vec<T>::size();

// What |X| is computed with: parts are scaled by a power of two, `up` below `middle` and `down` above,
// so that their squares neither overflow nor underflow.
template <typename T>
struct Range;
template <>
struct Range<float> {
  static constexpr float smallest = 1e-30f, middle = 0x1p14f, up = 0x1p43f, down = 0x1p-71f;
};
template <>
struct Range<double> {
  static constexpr double smallest = 1e-290, middle = 0x1p30, up = 0x1p467, down = 0x1p-527;
};

template <typename T>
struct Polar {
  Vec<T> amplitude, cosine, sine;
};

template <typename T>
ALWAYS_INLINE Polar<T> polar(const Vec<T>& real, const Vec<T>& imaginary) {
  using R = Range<T>;
  const Vec<T> large = at::vec::maximum(real.abs(), imaginary.abs()) > Vec<T>(R::middle);
  const Vec<T> scale = Vec<T>::blendv(Vec<T>(R::up), Vec<T>(R::down), large);
  const Vec<T> back = Vec<T>::blendv(Vec<T>(1 / R::up), Vec<T>(1 / R::down), large);
  const Vec<T> a = real * scale, b = imaginary * scale;
  const Vec<T> root = at::vec::fmadd(a, a, b * b).sqrt();
  const Vec<T> inverse = Vec<T>(1) / root;
  const Vec<T> amplitude = root * back;
  const Vec<T> is_zero = amplitude < Vec<T>(R::smallest);
  return {Vec<T>::blendv(amplitude, Vec<T>(0), is_zero), Vec<T>::blendv(a * inverse, Vec<T>(1), is_zero),
          Vec<T>::blendv(b * inverse, Vec<T>(0), is_zero)};
}

template <typename T>
ALWAYS_INLINE void sine_and_cosine(const Vec<T>& angle, Vec<T>& sine, Vec<T>& cosine) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, double>) {
    const auto both = Sleef_sincosd8_u10(angle);
    sine = both.x, cosine = both.y;
  } else {
    const auto both = Sleef_sincosf16_u10(angle);
    sine = both.x, cosine = both.y;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, double>) {
    const auto both = Sleef_sincosd4_u10(angle);
    sine = both.x, cosine = both.y;
  } else {
    const auto both = Sleef_sincosf8_u10(angle);
    sine = both.x, cosine = both.y;
  }
#else
  sine = angle.sin(), cosine = angle.cos();
#endif
}

// Bins per tile: planes of one tile should stay in the second-level cache, and small images should give
// every thread something to do. A function of shapes alone.
template <typename T>
struct Tiles {
  static constexpr int64_t cache = 1 << 19, parts = 8, most_bins = 960;

  int64_t bins;       // of the sample
  int64_t tile_bins;  // a multiple of product_bins
  int64_t pitch;      // from plane to plane, an odd number of cache lines

  Tiles(const AmplitudePhaseShape& shape, int64_t planes) : bins(shape.bins()) {
    constexpr int64_t step = product_bins<T>, line = 64 / sizeof(T);
    const int64_t fit = smaller(most_bins, cache / (planes * static_cast<int64_t>(sizeof(T)))) / step * step;
    tile_bins = larger(step, smaller(larger(2 * step, fit), round_up(divide_up(bins, parts), step)));
    pitch = (divide_up(tile_bins, line) | 1) * line;
  }

  int64_t count() const { return divide_up(bins, tile_bins); }
};

// Consecutive complex numbers from memory to planes and back; `function` gets a vector of real and one of
// imaginary parts. Bins from `bins` to `padded` are zero.
template <typename T, typename Function>
ALWAYS_INLINE void for_each_bin(const T* spectrum, int64_t bins, int64_t padded, Function function) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t t = 0; t < padded; t += lanes) {
    const int64_t left = 2 * larger(0, bins - t);
    Vec<T> first, second;
    if (left >= 2 * lanes) {
      first = Vec<T>::loadu(spectrum + 2 * t), second = Vec<T>::loadu(spectrum + 2 * t + lanes);
    } else {
      first = left > 0 ? Vec<T>::loadu(spectrum + 2 * t, smaller(left, lanes)) : Vec<T>(0);
      second = left > lanes ? Vec<T>::loadu(spectrum + 2 * t + lanes, left - lanes) : Vec<T>(0);
    }
    const auto [real, imaginary] = at::vec::deinterleave2(first, second);
    function(t, real, imaginary);
  }
}

template <typename T, typename Function>
ALWAYS_INLINE void store_bins(T* spectrum, int64_t bins, Function function) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t t = 0; t < bins; t += lanes) {
    const auto [real, imaginary] = function(t);
    const auto [first, second] = at::vec::interleave2(real, imaginary);
    const int64_t left = 2 * (bins - t);
    first.store(spectrum + 2 * t, smaller(left, lanes));
    if (left > lanes) second.store(spectrum + 2 * t + lanes, smaller(left - lanes, lanes));
  }
}

// A matrix in blocks of rows, zero rows added: element (i, k) lies at (i / block · columns + k) · block + i % block.
template <typename T>
struct Packed {
  T* weight = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;

  Packed() = default;
  Packed(Arena& arena, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    weight = arena.take<T>(round_up(rows, block()) * columns);
  }

  bool is_deep() const { return columns >= deep_product; }
  int64_t block() const { return is_deep() ? deep_product_rows : product_rows; }

  // Element (i, k) is from[i·stride_i + k·stride_k].
  void fill(const void* from, int64_t stride_i, int64_t stride_k) const {
    const T* source = static_cast<const T*>(from);
    T* next = weight;
    for (int64_t first = 0; first < rows; first += block())
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t i = first; i < first + block(); ++i)
          *next++ = i < rows ? source[i * stride_i + k * stride_k] : T(0);
  }
};

template <typename T, int block, int vectors, typename Finish>
ALWAYS_INLINE void multiply_blocks(const Packed<T>& matrix, const T* planes, int64_t pitch, int64_t bins,
                                   Finish finish) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t t = 0; t < bins; t += vectors * lanes) {
    for (int64_t row = 0; row < matrix.rows; row += block) {
      const T* weight = matrix.weight + row * matrix.columns;
      const T* input = planes + t;
      Vec<T> sum[block][vectors];
      UNROLLED_FOR(r, block) UNROLLED_FOR(v, vectors) { sum[r][v] = Vec<T>(0); }
      for (int64_t k = 0; k < matrix.columns; ++k, weight += block, input += pitch) {
        Vec<T> value[vectors];
        UNROLLED_FOR(v, vectors) { value[v] = Vec<T>::loadu(input + v * lanes); }
        UNROLLED_FOR(r, block) {
          const Vec<T> w(weight[r]);
          UNROLLED_FOR(v, vectors) { sum[r][v] = at::vec::fmadd(w, value[v], sum[r][v]); }
        }
      }
      UNROLLED_FOR(r, block) {
        if (row + r < matrix.rows) {
          UNROLLED_FOR(v, vectors) { finish(row + r, t + v * lanes, sum[r][v]); }
        }
      }
    }
  }
}

// Calls finish(row, bin, sum) with a vector of Σ_k matrix[row, k] · planes[k, bin] for all rows and bins.
template <typename T, typename Finish>
void multiply(const Packed<T>& matrix, const T* planes, int64_t pitch, int64_t bins, Finish finish) {
  if (matrix.is_deep()) {
    multiply_blocks<T, deep_product_rows, deep_product_vectors>(matrix, planes, pitch, bins, finish);
  } else {
    multiply_blocks<T, product_rows, product_vectors>(matrix, planes, pitch, bins, finish);
  }
}

// sums[i, j] += Σ over all pairs of a and b of Σ_bins a[i, bin] · b[j, bin]; rows of sums are `sums_pitch` apart.
template <typename T, int pairs>
void add_products(const T* const (&a)[pairs], int64_t rows, const T* const (&b)[pairs], int64_t columns, int64_t pitch,
                  int64_t bins, T* sums, int64_t sums_pitch) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t i = 0; i < rows; i += sum_rows) {
    for (int64_t j = 0; j < columns; j += sum_rows) {
      Vec<T> sum[sum_rows][sum_rows];
      UNROLLED_FOR(r, sum_rows) UNROLLED_FOR(s, sum_rows) { sum[r][s] = Vec<T>(0); }
      for (int pair = 0; pair < pairs; ++pair) {
        const T *left[sum_rows], *right[sum_rows];
        UNROLLED_FOR(r, sum_rows) {
          left[r] = a[pair] + smaller(i + r, rows - 1) * pitch;
          right[r] = b[pair] + smaller(j + r, columns - 1) * pitch;
        }
        for (int64_t t = 0; t < bins; t += lanes) {
          Vec<T> factor[sum_rows];
          UNROLLED_FOR(s, sum_rows) { factor[s] = Vec<T>::loadu(right[s] + t); }
          UNROLLED_FOR(r, sum_rows) {
            const Vec<T> value = load_once(left[r] + t);
            UNROLLED_FOR(s, sum_rows) { sum[r][s] = at::vec::fmadd(value, factor[s], sum[r][s]); }
          }
        }
      }
      constexpr int squares = (sum_rows * sum_rows + lanes - 1) / lanes;
      T total[squares * lanes];
      UNROLLED_FOR(q, squares) {
        Square<T> square;
        UNROLLED_FOR(k, lanes) {
          const int place = q * lanes + k;
          square.put(k, place < sum_rows * sum_rows ? sum[place / sum_rows % sum_rows][place % sum_rows] : Vec<T>(0));
        }
        square.sum_lanes();
        square.row(0).store(total + q * lanes);
      }
      for (int64_t r = 0; r < smaller(sum_rows, rows - i); ++r)
        for (int64_t s = 0; s < smaller(sum_rows, columns - j); ++s)
          sums[(i + r) * sums_pitch + j + s] += total[r * sum_rows + s];
    }
  }
}

// sums[i] += Σ_bins a[i, bin]
template <typename T>
void add_rows(const T* a, int64_t rows, int64_t pitch, int64_t bins, T* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> sum(0);
    for (int64_t t = 0; t < bins; t += Vec<T>::size()) sum = sum + Vec<T>::loadu(a + i * pitch + t);
    sums[i] += sum_of_lanes(sum);
  }
}

// The part of a tile that forward and backward share: X in polar form, the map's two layers.
template <typename T>
struct MapStep {
  const AmplitudePhaseShape& shape;
  const SpectralMap& map;
  const int64_t channels = shape.channels, hidden = shape.hidden_channels;
  const T* const bias1 = static_cast<const T*>(map.bias1);
  const T* const bias2 = static_cast<const T*>(map.bias2);
  Packed<T> weight1, weight2;

  MapStep(const AmplitudePhaseShape& shape, const SpectralMap& map) : shape(shape), map(map) {}

  void take(Arena& arena) {
    weight1 = Packed<T>(arena, hidden, channels);
    weight2 = Packed<T>(arena, channels, hidden);
  }

  void fill() const {
    weight1.fill(map.weight1, channels, 1);
    weight2.fill(map.weight2, hidden, 1);
  }

  // Planes of A, Re u, Im u and, where they are not null, of P, Re X and Im X of `bins` bins from `first` on.
  void load(const T* x, int64_t first, int64_t bins, int64_t padded, int64_t pitch, T* amplitude, T* cosine, T* sine,
            T* phase, T* x_real, T* x_imaginary) const {
    for (int64_t c = 0; c < channels; ++c) {
      for_each_bin(x + 2 * (c * shape.bins() + first), bins, padded,
                   [&](int64_t t, const Vec<T>& real, const Vec<T>& imaginary) {
                     const int64_t place = c * pitch + t;
                     const Polar<T> bin = polar(real, imaginary);
                     bin.amplitude.store(amplitude + place);
                     bin.cosine.store(cosine + place);
                     bin.sine.store(sine + place);
                     if (phase) bin.sine.atan2(bin.cosine).store(phase + place);
                     if (x_real) real.store(x_real + place);
                     if (x_imaginary) imaginary.store(x_imaginary + place);
                   });
    }
  }

  // h = LeakyReLU(weight1 · input + bias1); its derivative goes to `slopes` where that is not null.
  void first_layer(const T* input, int64_t padded, int64_t pitch, T* activations, T* slopes) const {
    const Vec<T> slope(static_cast<T>(shape.negative_slope));
    multiply(weight1, input, pitch, padded, [&](int64_t row, int64_t t, const Vec<T>& sum) {
      const Vec<T> value = sum + Vec<T>(bias1[row]);
      const Vec<T> derivative = Vec<T>::blendv(slope, Vec<T>(1), value > Vec<T>(0));
      (value * derivative).store(activations + row * pitch + t);
      if (slopes) derivative.store(slopes + row * pitch + t);
    });
  }

  // finish(row, bin, weight2 · h + bias2)
  template <typename Finish>
  ALWAYS_INLINE void second_layer(const T* activations, int64_t padded, int64_t pitch, Finish finish) const {
    multiply(weight2, activations, pitch, padded,
             [&](int64_t row, int64_t t, const Vec<T>& sum) { finish(row, t, sum + Vec<T>(bias2[row])); });
  }
};

template <typename T>
struct Forward {
  const AmplitudePhaseForward& call;
  const AmplitudePhaseShape& shape = call.shape;
  const int64_t channels = shape.channels, hidden = shape.hidden_channels, out = shape.out_channels;
  const bool projects = call.map.output_weight;
  const int64_t inputs = shape.output_inputs();
  // what the map works on has ended when the outputs come
  const int64_t map_planes = (shape.phase ? 2 : 1) * channels + hidden;
  const int64_t shared_planes = projects ? larger(map_planes, 2 * out) : map_planes;
  const Tiles<T> tiles{shape, 2 * inputs + shared_planes};
  const int64_t tasks = tiles.count();
  MapStep<T> step{shape, call.map};
  Packed<T> output_weight;

  // `real` and `imaginary` are those of X, with `skip`, and of Y, one after the other: what output_weight takes.
  struct Scratch {
    T *real, *imaginary, *y_real, *y_imaginary, *amplitude, *phase, *hidden, *out_real, *out_imaginary;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t pitch = tiles.pitch;
    Scratch planes;
    planes.real = arena.take<T>(inputs * pitch);
    planes.imaginary = arena.take<T>(inputs * pitch);
    planes.y_real = planes.real + (inputs - channels) * pitch;
    planes.y_imaginary = planes.imaginary + (inputs - channels) * pitch;
    T* const shared = arena.take<T>(shared_planes * pitch);
    planes.hidden = shared;
    planes.amplitude = shared + hidden * pitch;
    planes.phase = shape.phase ? planes.amplitude + channels * pitch : nullptr;
    planes.out_real = projects ? shared : planes.real;
    planes.out_imaginary = projects ? shared + out * pitch : planes.imaginary;
    return planes;
  }

  void take_weights(Arena& arena) {
    step.take(arena);
    if (projects) output_weight = Packed<T>(arena, out, inputs);
  }

  int64_t workspace_bytes(int threads) {
    Arena arena(nullptr);
    take_weights(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) {
    Arena arena(workspace);
    take_weights(arena);
    step.fill();
    if (projects) output_weight.fill(call.map.output_weight, inputs, 1);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& planes) {
      const int64_t first = task * tiles.tile_bins, bins = smaller(tiles.tile_bins, tiles.bins - first);
      run_tile(first, bins, planes);
    });
  }

  void run_tile(int64_t first, int64_t bins, const Scratch& planes) const {
    const int64_t pitch = tiles.pitch, padded = round_up(bins, product_bins<T>);
    step.load(static_cast<const T*>(call.x), first, bins, padded, pitch, planes.amplitude, planes.y_real,
              planes.y_imaginary, planes.phase, shape.skip ? planes.real : nullptr,
              shape.skip ? planes.imaginary : nullptr);
    step.first_layer(shape.phase ? planes.phase : planes.amplitude, padded, pitch, planes.hidden, nullptr);
    if (shape.phase) {
      step.second_layer(planes.hidden, padded, pitch, [&](int64_t row, int64_t t, const Vec<T>& phase) {
        phase.store(planes.phase + row * pitch + t);
      });
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t place = c * pitch; place < c * pitch + padded; place += Vec<T>::size()) {
          Vec<T> sine, cosine;
          sine_and_cosine(Vec<T>::loadu(planes.phase + place), sine, cosine);
          const Vec<T> amplitude = Vec<T>::loadu(planes.amplitude + place);
          (amplitude * cosine).store(planes.y_real + place);
          (amplitude * sine).store(planes.y_imaginary + place);
        }
      }
    } else {
      step.second_layer(planes.hidden, padded, pitch, [&](int64_t row, int64_t t, const Vec<T>& amplitude) {
        const int64_t place = row * pitch + t;
        (amplitude * Vec<T>::loadu(planes.y_real + place)).store(planes.y_real + place);
        (amplitude * Vec<T>::loadu(planes.y_imaginary + place)).store(planes.y_imaginary + place);
      });
    }
    if (projects) {
      project(planes.real, padded, planes.out_real);
      project(planes.imaginary, padded, planes.out_imaginary);
    }
    const Vec<T> scale(T(1) / static_cast<T>(shape.height * shape.width));
    for (int64_t o = 0; o < out; ++o) {
      T* const y = static_cast<T*>(call.y) + 2 * (o * tiles.bins + first);
      store_bins(y, bins, [&](int64_t t) {
        return std::pair(Vec<T>::loadu(planes.out_real + o * pitch + t) * scale,
                         Vec<T>::loadu(planes.out_imaginary + o * pitch + t) * scale);
      });
      if (call.map.output_bias && first == 0) *y += static_cast<const T*>(call.map.output_bias)[o];
    }
  }

  void project(const T* part, int64_t padded, T* projected) const {
    multiply(output_weight, part, tiles.pitch, padded,
             [&](int64_t row, int64_t t, const Vec<T>& sum) { sum.store(projected + row * tiles.pitch + t); });
  }
};

// The gradients of the weights in one group's sums, one after the other.
template <typename T>
struct WeightSums {
  int64_t weight1, bias1, weight2, bias2, output_weight, output_bias, size;  // places

  explicit WeightSums(const AmplitudePhaseShape& shape) {
    const int64_t matrix = shape.hidden_channels * shape.channels;
    weight1 = 0;
    bias1 = weight1 + matrix;
    weight2 = bias1 + shape.hidden_channels;
    bias2 = weight2 + matrix;
    output_weight = bias2 + shape.channels;
    output_bias = output_weight + shape.out_channels * shape.output_inputs();
    size = output_bias + shape.out_channels;
  }
};

template <typename T>
struct Backward {
  const AmplitudePhaseBackward& call;
  T* const sums;
  const AmplitudePhaseShape& shape = call.shape;
  const int64_t channels = shape.channels, hidden = shape.hidden_channels, out = shape.out_channels;
  const bool projects = call.map.output_weight;
  const T* const output_weight = static_cast<const T*>(call.map.output_weight);
  const int64_t first_of_y = shape.output_inputs() - channels;  // column of output_weight
  const Tiles<T> tiles{shape, (shape.phase ? 8 : 7) * channels + 3 * hidden + (projects ? 2 * out : 0)};
  const int64_t tasks = groups(tiles);
  const WeightSums<T> places{shape};
  MapStep<T> step{shape, call.map};
  Packed<T> weight1_transposed, weight2_transposed;
  Packed<T> output_weight_transposed, skip_weight_transposed;  // of Y and of X
  // By bin from column 0 on, over a tile that begins in any column: c/HW and 1/c.
  T *grad_scale = nullptr, *grad_x_scale = nullptr;

  // A group is several tiles in a row. Their sums take a fraction of what the spectra do.
  static int64_t groups(const Tiles<T>& tiles) { return smaller(tiles.count(), 32); }

  int64_t first_tile(int64_t group) const { return group * tiles.count() / tasks; }

  struct Scratch {
    T *amplitude, *cosine, *sine, *phase, *hidden, *slopes, *grad_hidden, *real, *imaginary, *grad_map, *grad_other,
        *out_real, *out_imaginary;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t plane_of_channels = channels * tiles.pitch, plane_of_hidden = hidden * tiles.pitch;
    Scratch planes;
    planes.amplitude = arena.take<T>(plane_of_channels);
    planes.cosine = arena.take<T>(plane_of_channels);
    planes.sine = arena.take<T>(plane_of_channels);
    planes.phase = shape.phase ? arena.take<T>(plane_of_channels) : nullptr;
    planes.hidden = arena.take<T>(plane_of_hidden);
    planes.slopes = arena.take<T>(plane_of_hidden);
    planes.grad_hidden = arena.take<T>(plane_of_hidden);
    planes.real = arena.take<T>(plane_of_channels);
    planes.imaginary = arena.take<T>(plane_of_channels);
    planes.grad_map = arena.take<T>(plane_of_channels);
    planes.grad_other = arena.take<T>(plane_of_channels);
    planes.out_real = projects ? arena.take<T>(out * tiles.pitch) : planes.real;
    planes.out_imaginary = projects ? arena.take<T>(out * tiles.pitch) : planes.imaginary;
    return planes;
  }

  void take_weights(Arena& arena) {
    step.take(arena);
    weight1_transposed = Packed<T>(arena, channels, hidden);
    weight2_transposed = Packed<T>(arena, hidden, channels);
    if (projects) output_weight_transposed = Packed<T>(arena, channels, out);
    if (shape.skip) skip_weight_transposed = Packed<T>(arena, channels, out);
    grad_scale = arena.take<T>(shape.columns() + tiles.pitch);
    grad_x_scale = arena.take<T>(shape.columns() + tiles.pitch);
  }

  void fill_weights() const {
    step.fill();
    weight1_transposed.fill(call.map.weight1, 1, channels);
    weight2_transposed.fill(call.map.weight2, 1, hidden);
    if (projects) output_weight_transposed.fill(output_weight + first_of_y, 1, shape.output_inputs());
    if (shape.skip) skip_weight_transposed.fill(output_weight, 1, shape.output_inputs());
    for (int64_t i = 0; i < shape.columns() + tiles.pitch; ++i) {
      const T counted = 2 * (i % shape.columns()) % shape.width == 0 ? T(1) : T(2);
      grad_scale[i] = counted / static_cast<T>(shape.height * shape.width);
      grad_x_scale[i] = T(1) / counted;
    }
  }

  int64_t workspace_bytes(int threads) {
    Arena arena(nullptr);
    take_weights(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) {
    Arena arena(workspace);
    take_weights(arena);
    fill_weights();
    for_each_task(*this, arena.rest(), threads, [&](int64_t group, const Scratch& planes) {
      for (int64_t tile = first_tile(group); tile < first_tile(group + 1); ++tile) {
        const int64_t first = tile * tiles.tile_bins, bins = smaller(tiles.tile_bins, tiles.bins - first);
        run_tile(first, bins, planes, sums + group * places.size);
      }
    });
  }

  void run_tile(int64_t first, int64_t bins, const Scratch& planes, T* own_sums) const {
    const int64_t pitch = tiles.pitch, padded = round_up(bins, product_bins<T>);
    const T* const input = shape.phase ? planes.phase : planes.amplitude;
    const bool keeps_x = shape.skip && call.grad_output_weight;
    step.load(static_cast<const T*>(call.x), first, bins, padded, pitch, planes.amplitude, planes.cosine, planes.sine,
              planes.phase, keeps_x ? planes.real : nullptr, keeps_x ? planes.imaginary : nullptr);
    load_grad(first, bins, padded, planes);
    if (call.grad_output_bias && first == 0) {
      const T* const grad = static_cast<const T*>(call.grad);
      for (int64_t o = 0; o < out; ++o) own_sums[places.output_bias + o] += grad[2 * o * tiles.bins];
    }
    if (keeps_x) add_output_products(padded, planes, own_sums + places.output_weight);
    if (projects) project(output_weight_transposed, padded, planes);
    step.first_layer(input, padded, pitch, planes.hidden, planes.slopes);
    // the map's result goes to grad_map, and is replaced there
    step.second_layer(planes.hidden, padded, pitch, [&](int64_t row, int64_t t, const Vec<T>& value) {
      value.store(planes.grad_map + row * pitch + t);
    });
    shape.phase ? from_phase(padded, planes) : from_amplitude(padded, planes);
    if (call.grad_output_weight) add_output_products(padded, planes, own_sums + places.output_weight + first_of_y);
    if (call.grad_weight2)
      add_products<T, 1>({planes.grad_map}, channels, {planes.hidden}, hidden, pitch, padded, own_sums + places.weight2,
                         hidden);
    if (call.grad_bias2) add_rows(planes.grad_map, channels, pitch, padded, own_sums + places.bias2);
    if (call.grad_weight1 || call.grad_bias1 || call.grad_x) {
      multiply(weight2_transposed, planes.grad_map, pitch, padded, [&](int64_t row, int64_t t, const Vec<T>& sum) {
        const int64_t place = row * pitch + t;
        (sum * Vec<T>::loadu(planes.slopes + place)).store(planes.grad_hidden + place);
      });
    }
    if (call.grad_weight1)
      add_products<T, 1>({planes.grad_hidden}, hidden, {input}, channels, pitch, padded, own_sums + places.weight1,
                         channels);
    if (call.grad_bias1) add_rows(planes.grad_hidden, hidden, pitch, padded, own_sums + places.bias1);
    if (shape.skip && call.grad_x) project(skip_weight_transposed, padded, planes);
    if (call.grad_x) store_grad_x(first, bins, padded, planes);
  }

  // c/HW · grad
  void load_grad(int64_t first, int64_t bins, int64_t padded, const Scratch& planes) const {
    const int64_t pitch = tiles.pitch;
    const T* const scale = grad_scale + first % shape.columns();
    for (int64_t o = 0; o < out; ++o) {
      for_each_bin(static_cast<const T*>(call.grad) + 2 * (o * tiles.bins + first), bins, padded,
                   [&](int64_t t, const Vec<T>& real, const Vec<T>& imaginary) {
                     const Vec<T> factor = Vec<T>::loadu(scale + t);
                     (real * factor).store(planes.out_real + o * pitch + t);
                     (imaginary * factor).store(planes.out_imaginary + o * pitch + t);
                   });
    }
  }

  // The product with c/HW · grad to real, imaginary: G, or ∂X of the product with X.
  void project(const Packed<T>& matrix, int64_t padded, const Scratch& planes) const {
    const int64_t pitch = tiles.pitch;
    const auto to = [=](T* projected) {
      return [=](int64_t row, int64_t t, const Vec<T>& sum) { sum.store(projected + row * pitch + t); };
    };
    multiply(matrix, planes.out_real, pitch, padded, to(planes.real));
    multiply(matrix, planes.out_imaginary, pitch, padded, to(planes.imaginary));
  }

  // The gradient of the half of output_weight that takes what lies in real, imaginary.
  void add_output_products(int64_t padded, const Scratch& planes, T* half) const {
    add_products<T, 2>({planes.out_real, planes.out_imaginary}, out, {planes.real, planes.imaginary}, channels,
                       tiles.pitch, padded, half, shape.output_inputs());
  }

  // From M(A) in grad_map and G in real, imaginary: Q in grad_map, M(A)·Im(ūG) in grad_other, Y in real, imaginary.
  void from_amplitude(int64_t padded, const Scratch& planes) const {
    for_each_vector(padded, [&](int64_t place) {
      const Vec<T> cosine = Vec<T>::loadu(planes.cosine + place), sine = Vec<T>::loadu(planes.sine + place);
      const Vec<T> real = Vec<T>::loadu(planes.real + place), imaginary = Vec<T>::loadu(planes.imaginary + place);
      const Vec<T> amplitude = Vec<T>::loadu(planes.grad_map + place);
      (cosine * real + sine * imaginary).store(planes.grad_map + place);
      (amplitude * (cosine * imaginary - sine * real)).store(planes.grad_other + place);
      (amplitude * cosine).store(planes.real + place);
      (amplitude * sine).store(planes.imaginary + place);
    });
  }

  // From M(P) in grad_map and G in real, imaginary: Q in grad_map, Re(v̄G) in grad_other, Y in real, imaginary.
  void from_phase(int64_t padded, const Scratch& planes) const {
    for_each_vector(padded, [&](int64_t place) {
      Vec<T> sine, cosine;
      sine_and_cosine(Vec<T>::loadu(planes.grad_map + place), sine, cosine);
      const Vec<T> real = Vec<T>::loadu(planes.real + place), imaginary = Vec<T>::loadu(planes.imaginary + place);
      const Vec<T> amplitude = Vec<T>::loadu(planes.amplitude + place);
      (amplitude * (cosine * imaginary - sine * real)).store(planes.grad_map + place);
      (cosine * real + sine * imaginary).store(planes.grad_other + place);
      (amplitude * cosine).store(planes.real + place);
      (amplitude * sine).store(planes.imaginary + place);
    });
  }

  template <typename Function>
  ALWAYS_INLINE void for_each_vector(int64_t padded, Function function) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < padded; t += Vec<T>::size()) function(c * tiles.pitch + t);
  }

  // u·(g_a + i·g_θ/A)/c, where one of g_a and g_θ is weight1ᵀ·grad_hidden, which goes to grad_map; with `skip` what
  // lies in real, imaginary is added, over c
  void store_grad_x(int64_t first, int64_t bins, int64_t padded, const Scratch& planes) const {
    const int64_t pitch = tiles.pitch;
    multiply(weight1_transposed, planes.grad_hidden, pitch, padded,
             [&](int64_t row, int64_t t, const Vec<T>& sum) { sum.store(planes.grad_map + row * pitch + t); });
    const T* const grad_amplitude = shape.phase ? planes.grad_other : planes.grad_map;
    const T* const grad_angle = shape.phase ? planes.grad_map : planes.grad_other;
    const T* const scale = grad_x_scale + first % shape.columns();
    for (int64_t c = 0; c < channels; ++c) {
      store_bins(static_cast<T*>(call.grad_x) + 2 * (c * tiles.bins + first), bins, [&](int64_t t) {
        const int64_t place = c * pitch + t;
        const Vec<T> amplitude = Vec<T>::loadu(planes.amplitude + place), factor = Vec<T>::loadu(scale + t);
        const Vec<T> is_zero = amplitude == Vec<T>(0);
        const Vec<T> radial = Vec<T>::loadu(grad_amplitude + place) * factor;
        const Vec<T> angular = Vec<T>::loadu(grad_angle + place) * factor / amplitude;
        const Vec<T> cosine = Vec<T>::loadu(planes.cosine + place), sine = Vec<T>::loadu(planes.sine + place);
        Vec<T> real = Vec<T>::blendv(cosine * radial - sine * angular, Vec<T>(0), is_zero);
        Vec<T> imaginary = Vec<T>::blendv(sine * radial + cosine * angular, Vec<T>(0), is_zero);
        if (shape.skip) {
          real = at::vec::fmadd(Vec<T>::loadu(planes.real + place), factor, real);
          imaginary = at::vec::fmadd(Vec<T>::loadu(planes.imaginary + place), factor, imaginary);
        }
        return std::pair(real, imaginary);
      });
    }
  }

  void add_up_groups(int threads) const {
    const int64_t inputs = shape.output_inputs();
    add_up<T>(sums, places.size, 0, tasks,
              {{call.grad_weight1, places.weight1, hidden, channels, channels},
               {call.grad_bias1, places.bias1, 1, hidden, hidden},
               {call.grad_weight2, places.weight2, channels, hidden, hidden},
               {call.grad_bias2, places.bias2, 1, channels, channels},
               {call.grad_output_weight, places.output_weight, out, inputs, inputs},
               {call.grad_output_bias, places.output_bias, 1, out, out}},
              threads);
  }
};

int64_t forward_workspace_bytes(const AmplitudePhaseForward& call, int threads) {
  return call.shape.dtype == DataType::float64 ? Forward<double>{call}.workspace_bytes(threads)
                                               : Forward<float>{call}.workspace_bytes(threads);
}

void launch_forward(const AmplitudePhaseForward& call, void* workspace, int threads) {
  call.shape.dtype == DataType::float64 ? Forward<double>{call}.launch(workspace, threads)
                                        : Forward<float>{call}.launch(workspace, threads);
}

template <typename T>
Backward<T> backward_of(const AmplitudePhaseSampleBackward& sample) {
  return {sample.call, static_cast<T*>(sample.sums)};
}

int64_t backward_workspace_bytes(const AmplitudePhaseSampleBackward& sample, int threads) {
  return sample.call.shape.dtype == DataType::float64 ? backward_of<double>(sample).workspace_bytes(threads)
                                                      : backward_of<float>(sample).workspace_bytes(threads);
}

void launch_backward(const AmplitudePhaseSampleBackward& sample, void* workspace, int threads) {
  sample.call.shape.dtype == DataType::float64 ? backward_of<double>(sample).launch(workspace, threads)
                                               : backward_of<float>(sample).launch(workspace, threads);
}

int64_t sums_bytes(const AmplitudePhaseSampleBackward& sample) {
  const auto bytes = [](const auto& kernel) { return kernel.tasks * kernel.places.size * sizeof(*kernel.sums); };
  return sample.call.shape.dtype == DataType::float64 ? bytes(backward_of<double>(sample))
                                                      : bytes(backward_of<float>(sample));
}

void add_up_groups(const AmplitudePhaseSampleBackward& sample, int threads) {
  sample.call.shape.dtype == DataType::float64 ? backward_of<double>(sample).add_up_groups(threads)
                                               : backward_of<float>(sample).add_up_groups(threads);
}

// Calls copy(rows' first, rows) for bands of an image.
template <typename Copy>
void for_each_band(const AmplitudePhaseShape& shape, int threads, Copy copy) {
  const int64_t rows = divide_up(shape.height, enough_tasks);
  parallel_tasks(divide_up(shape.height, rows), threads,
                 [&](int64_t band, int) { copy(band * rows, smaller(rows, shape.height - band * rows)); });
}

template <typename T>
void to_planes(const AmplitudePhaseShape& shape, const ConstMapView& image, int64_t channels, void* spectrum,
               int threads) {
  for_each_band(shape, threads, [&](int64_t row, int64_t rows) {
    copy_to_planes<T>(image, 0, 0, channels, row, rows, 0, shape.width, static_cast<T*>(spectrum) + row * shape.width,
                      2 * shape.bins(), shape.width);
  });
}

template <typename T>
void from_planes(const AmplitudePhaseShape& shape, const void* spectrum, int64_t channels, const MapView& image,
                 int threads) {
  for_each_band(shape, threads, [&](int64_t row, int64_t rows) {
    copy_from_planes<T>(static_cast<const T*>(spectrum) + row * shape.width, 2 * shape.bins(), shape.width, image, 0, 0,
                        channels, row, rows, 0, shape.width);
  });
}

void launch_to_planes(const AmplitudePhaseShape& shape, const ConstMapView& image, int64_t channels, void* spectrum,
                      int threads) {
  shape.dtype == DataType::float64 ? to_planes<double>(shape, image, channels, spectrum, threads)
                                   : to_planes<float>(shape, image, channels, spectrum, threads);
}

void launch_from_planes(const AmplitudePhaseShape& shape, const void* spectrum, int64_t channels, const MapView& image,
                        int threads) {
  shape.dtype == DataType::float64 ? from_planes<double>(shape, spectrum, channels, image, threads)
                                   : from_planes<float>(shape, spectrum, channels, image, threads);
}

}  // namespace

extern const AmplitudePhaseCpuKernels amplitude_phase_kernels;
const AmplitudePhaseCpuKernels amplitude_phase_kernels = {
    {&forward_workspace_bytes, &launch_forward},
    {&backward_workspace_bytes, &launch_backward},
    &sums_bytes,
    &add_up_groups,
    &launch_to_planes,
    &launch_from_planes,
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
