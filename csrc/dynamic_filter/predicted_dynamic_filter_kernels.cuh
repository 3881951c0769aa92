// Predicted dynamic filter on CUDA devices.
//
//   y[c, p] = Σ_k F[c, k](p) · x[c, p + o_k]  (+ x[c, p]),   F[c, k](p) = Σ_f W[c, k, f] · s[f](p) + b[c, k]
//
// with s the features and o_k the K×K offsets. Given g, the gradient of y, and D[c, k](p) = g[c](p) · x[c, p + o_k]:
//
//   ∂x[c, q] = Σ_k F[c, k](q − o_k) · g[c, q − o_k]  (+ g[c, q])        ∂s[f](p) = Σ_c,k W[c, k, f] · D[c, k](p)
//   ∂W[c, k, f] = Σ_p D[c, k](p) · s[f](p)                              ∂b[c, k] = Σ_p D[c, k](p)
//
// F and D exist in registers only. ∂x is the forward pass with g in the place of x, the taps mirrored and the features
// taken at the same shifted pixel as g; as the factors of a tap are pixels of a tile with a halo, nothing is computed
// twice. All sums are float32, in an order that depends on shapes alone; there are no atomics.
//
// Per pixel and at least, with C channels, C features and K = 3: forward 3C elements of memory traffic and 18·C² FLOP,
// backward 5C and 54·C². In float32 at C = 20 that is 240 B and 7.2 kFLOP, 400 B and 21.6 kFLOP: bound by memory with
// TF32 (495 TFLOP/s on 3.35 TB/s: 148 FLOP/B), by arithmetic with IEEE FMAs (67 TFLOP/s: 20 FLOP/B).
//
// How threads share the work. A tile is 32 columns wide; a warp has 8 columns and P rows of it, lane = 4·g + t has
// column g, all P rows, and in each group of 8 channels the channels 2t and 2t + 1. For the tensor cores rows m and
// m + P/2 of all columns are the 16 rows of one matrix, hence results and sums over taps stay in the registers where
// the products appear. As the rows of a thread are neighbours, a shift by a row is a renaming of registers, matrix m +
// 1 instead of m: shared memory is read once per column of offsets for K·P uses. The weight is arranged once per call
// so that each fragment of 8 bytes per lane is a coalesced load; all blocks read it from L1 or L2.
//
// Backward is one launch with three kinds of blocks: ∂x and ∂s of a tile, and ∂W with ∂b of a run of tiles. Those that
// read the same tiles have neighbouring numbers, so that one of them brings a tile from memory and the others find it
// in L2: the 5 maps of the minimum, not 9. A second launch adds the runs' sums in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/map_tile.cuh"
#include "dynamic_filter/products_cuda.cuh"

namespace mitnet_fast {

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a < b ? b : a; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Sizes that a kernel is compiled for.
//
// KERNEL         K
// GROUPS         groups of 8 channels (∂s: of features) of a block's result
// STEPS          steps of 32 bytes (Products::depth elements) that are summed over before the next are staged
// ROWS           P, even
// WARP_ROWS      warps above each other; four are beside each other
// UNITS          of a warp in ∂W: a unit is a group of 8 channels and a column of offsets
// BLOCKS         that registers and shared memory leave room for on a multiprocessor
template <typename Products_, int KERNEL, int GROUPS, int STEPS, int ROWS, int WARP_ROWS, int UNITS, int BLOCKS>
struct FilterSizes {
  using Products = Products_;
  using Element = typename Products::Element;
  static constexpr int kernel = KERNEL;
  static constexpr int taps = KERNEL * KERNEL;
  static constexpr int radius = KERNEL / 2;
  static constexpr int groups = GROUPS;
  static constexpr int steps = STEPS;
  static constexpr int rows = ROWS;
  static constexpr int pairs = ROWS / 2;  // matrices of 16 pixels
  static constexpr int units = UNITS;
  static constexpr int blocks = BLOCKS;
  static constexpr int warps = 4 * WARP_ROWS;
  static constexpr int threads = 32 * warps;
  static constexpr int columns_of_tile = 32;
  static constexpr int rows_of_tile = ROWS * WARP_ROWS;
  static constexpr int columns_with_halo = columns_of_tile + KERNEL - 1;
  static constexpr int rows_with_halo = rows_of_tile + KERNEL - 1;
  static constexpr int result_channels = 8 * GROUPS;
  static constexpr int summed_channels = Products::depth * STEPS;

  // ∂W: tiles of 4 rows; features in matrices of 16
  static constexpr int rows_of_strip = 4;
  static constexpr int strip_rows_with_halo = rows_of_strip + KERNEL - 1;
  static constexpr int matrices = divide_up(GROUPS, 2);
  static constexpr int strip_features = 16 * matrices;
  static constexpr int rounds = divide_up(GROUPS * KERNEL, warps* UNITS);  // blocks that share the units
  static_assert(ROWS % 2 == 0 && rows_of_tile % rows_of_strip == 0 && strip_rows_with_halo % 2 == 0);

  // Pitches in elements for which a warp's accesses meet every bank equally often: `words` where 8 pixels are read by 4
  // words of each, or by matrix rows of 16 bytes; `word_pairs` where 4 pixels are, by 8 words of each.
  static constexpr int words(int channels) {
    const int words = divide_up(channels * int(sizeof(Element)), 16) * 4;
    return (words / 4 % 2 ? words : words + 4) * 4 / int(sizeof(Element));
  }
  static constexpr int word_pairs(int channels) {
    const int words = divide_up(channels * int(sizeof(Element)), 32) * 8;
    return (words / 8 % 2 ? words : words + 8) * 4 / int(sizeof(Element));
  }
  // tiles that are read as pairs of channels, as words of fragments, as slices, and by pixels
  static constexpr int pair_pitch = sizeof(Element) == 4 ? word_pairs(result_channels) : words(result_channels);
  static constexpr int fragment_pitch = Products::tensor_cores ? words(summed_channels) : word_pairs(summed_channels);
  static constexpr int slice_pitch = word_pairs(summed_channels);
  static constexpr int strip_pitch = sizeof(Element) == 4 ? word_pairs(strip_features) : words(strip_features);

  static constexpr int pixels = rows_of_tile * columns_of_tile;
  static constexpr int pixels_with_halo = rows_with_halo * columns_with_halo;
  static constexpr int strip_pixels = rows_of_strip * columns_of_tile;
  static constexpr int strip_pixels_with_halo = strip_rows_with_halo * columns_with_halo;

  // Elements of shared memory.
  static constexpr int forward_shared = pixels_with_halo * pair_pitch + pixels * fragment_pitch;
  static constexpr int grad_x_shared = pixels_with_halo * (pair_pitch + fragment_pitch);
  static constexpr int grad_features_shared = larger((pixels_with_halo + pixels) * slice_pitch, pixels* pair_pitch);
  static constexpr int grad_weight_shared =
      strip_pixels_with_halo * pair_pitch + strip_pixels * (pair_pitch + strip_pitch);
  static constexpr int backward_shared = larger(grad_x_shared, larger(grad_features_shared, grad_weight_shared));
};

// The weight in the order in which it is used, [chunk][result group][group][tap][step][lane] slices: lane 4·g + t of
// a step has result channel g of a group, and of the step's words t and t + 4 (`apart`) or 2t and 2t + 1. Zeros where
// there is no channel.
struct Arrangement {
  int results;  // channels that there are
  int summed;
  int64_t result_stride;  // in the weight as it is given, in elements
  int64_t tap_stride;
  int64_t summed_stride;
};

template <typename Sizes>
__host__ __device__ constexpr int64_t arranged_slices(int results, int summed) {
  return int64_t{divide_up(results, Sizes::result_channels)} * divide_up(summed, Sizes::summed_channels) *
         Sizes::groups * Sizes::taps * Sizes::steps * 32;
}

// Slices of one chunk and result group.
template <typename Sizes>
__host__ __device__ constexpr int64_t arranged_stride() {
  return int64_t{Sizes::groups} * Sizes::taps * Sizes::steps * 32;
}

template <typename Element>
struct PrepareArguments {
  const Element* weight;
  const Element* bias;     // may be null
  int64_t bias_samples;    // 1, or the batch
  Arrangement filters;     // of the weight that predicts filters
  Arrangement features;    // of its transpose, for ∂s
  int64_t filters_slices;  // 0: not needed
  int64_t features_slices;
  int64_t bias_values;
  Slice* filters_arranged;
  Slice* features_arranged;
  float* bias_arranged;  // [sample][result group][group][tap][8], zeros without a bias
};

template <typename Sizes, bool apart>
__device__ __forceinline__ void arrange_slice(const typename Sizes::Element* weight, const Arrangement& arrangement,
                                              Slice* arranged, int64_t index) {
  using Element = typename Sizes::Element;
  constexpr int in_word = 4 / sizeof(Element);
  const int lane = static_cast<int>(index % 32);
  int64_t rest = index / 32;
  const int step = static_cast<int>(rest % Sizes::steps);
  rest /= Sizes::steps;
  const int tap = static_cast<int>(rest % Sizes::taps);
  rest /= Sizes::taps;
  const int result_groups = divide_up(arrangement.results, Sizes::result_channels) * Sizes::groups;
  const int result = static_cast<int>(rest % result_groups) * 8 + lane / 4;
  const int chunk = static_cast<int>(rest / result_groups);
  union {
    Element elements[2][in_word];
    Slice slice;
  } both;
#pragma unroll
  for (int i = 0; i < 2 * in_word; ++i) {
    const int word = apart ? lane % 4 + i / in_word * 4 : lane % 4 * 2 + i / in_word;
    const int summed = chunk * Sizes::summed_channels + step * Sizes::Products::depth + word * in_word + i % in_word;
    Element& element = both.elements[i / in_word][i % in_word];
    element = zero<Element>();
    if (result < arrangement.results && summed < arrangement.summed) {
      element = weight[result * arrangement.result_stride + tap * arrangement.tap_stride +
                       summed * arrangement.summed_stride];
    }
    if constexpr (Sizes::Products::tf32) element = __uint_as_float(round_to_tf32(element));
  }
  arranged[index] = both.slice;
}

// Arranges the weight and the bias. One thread per slice or value.
template <typename Sizes>
__global__ void __launch_bounds__(256) prepare_kernel(const PrepareArguments<typename Sizes::Element> arguments) {
  int64_t index = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (index < arguments.filters_slices) {
    arrange_slice<Sizes, Sizes::Products::tensor_cores>(arguments.weight, arguments.filters, arguments.filters_arranged,
                                                        index);
    return;
  }
  index -= arguments.filters_slices;
  if (index < arguments.features_slices) {
    arrange_slice<Sizes, false>(arguments.weight, arguments.features, arguments.features_arranged, index);
    return;
  }
  index -= arguments.features_slices;
  if (index >= arguments.bias_values) return;
  const int channels = divide_up(arguments.filters.results, Sizes::result_channels) * Sizes::result_channels;
  const int lane = static_cast<int>(index % 8);
  const int tap = static_cast<int>(index / 8 % Sizes::taps);
  const int channel = static_cast<int>(index / (8 * Sizes::taps) % (channels / 8)) * 8 + lane;
  const int64_t sample = index / (int64_t{channels} * Sizes::taps);
  float value = 0;
  if (arguments.bias && channel < arguments.filters.results) {
    const int64_t from = (sample * arguments.filters.results + channel) * Sizes::taps + tap;
    value = static_cast<float>(arguments.bias[from]);
  }
  arguments.bias_arranged[index] = value;
}

// Which tile a block has: `index` counts tiles along rows, row by row, sample by sample.
struct TileNumbers {
  int columns;  // of tiles in an image
  int rows;
};

template <typename Sizes>
__device__ __forceinline__ Place place_of(int index, const TileNumbers& tiles, int height, int width, int64_t& sample) {
  const int in_sample = index % (tiles.columns * tiles.rows);
  sample = index / (tiles.columns * tiles.rows);
  return {in_sample / tiles.columns * Sizes::rows_of_tile, in_sample % tiles.columns * Sizes::columns_of_tile, height,
          width};
}

// y from x, or ∂x from g.
template <typename Element>
struct FilterArguments {
  Map<const Element> x;  // or g
  Map<const Element> features;
  Map<Element> y;       // or ∂x
  const Slice* weight;  // arranged
  const float* bias;    // arranged
  int64_t bias_stride;  // from sample to sample
  int channels;
  int feature_channels;
  int height;
  int width;
  TileNumbers tiles;
  bool residual;
};

// F += W·s for the thread's pixels and two channels of one group, K taps of one column of offsets, IEEE. `features` is
// the thread's column of the tile, `weight` that of the group and the column's first tap.
template <typename Sizes, bool transposed>
__device__ __forceinline__ void add_filters_ieee(float (&filters)[Sizes::kernel][Sizes::pairs][4],
                                                 const float* features, int row_pitch, const float* weight,
                                                 int tap_stride) {
  constexpr int K = Sizes::kernel, rows = transposed ? Sizes::rows + K - 1 : Sizes::rows;
#pragma unroll 1
  for (int step = 0; step < Sizes::steps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 w[K][2];
#pragma unroll
      for (int e = 0; e < K; ++e) {
        const auto* from = reinterpret_cast<const float4*>(weight + e * tap_stride + step * 64 + half * 4);
        w[e][0] = __ldg(from);
        w[e][1] = __ldg(from + 2);
      }
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const float4 s = *reinterpret_cast<const float4*>(features + row * row_pitch + step * 8 + half * 4);
#pragma unroll
        for (int e = 0; e < K; ++e) {
          const int j = transposed ? row - e : row;
          if (j < 0 || j >= Sizes::rows) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& sum = filters[e][j % Sizes::pairs][j / Sizes::pairs * 2 + i];
            sum = fmaf(s.x, w[e][i].x, sum);
            sum = fmaf(s.y, w[e][i].y, sum);
            sum = fmaf(s.z, w[e][i].z, sum);
            sum = fmaf(s.w, w[e][i].w, sum);
          }
        }
      }
    }
  }
}

// One tile of y, or with `transposed` of ∂x, result_channels channels of it.
template <typename Sizes, bool transposed>
__device__ __forceinline__ void filter_tile(const FilterArguments<typename Sizes::Element>& arguments, int tile_index,
                                            int result_group, typename Sizes::Element* shared) {
  using Products = typename Sizes::Products;
  using Element = typename Sizes::Element;
  constexpr int K = Sizes::kernel, rows = Sizes::rows, pairs = Sizes::pairs;
  constexpr int x_pitch = Sizes::pair_pitch, s_pitch = Sizes::fragment_pitch;
  constexpr int s_columns = transposed ? Sizes::columns_with_halo : Sizes::columns_of_tile;
  constexpr int s_rows = transposed ? Sizes::rows_with_halo : Sizes::rows_of_tile;
  Element* const x_tile = shared;
  Element* const s_tile = shared + Sizes::pixels_with_halo * x_pitch;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = warp / 4 * rows, column = warp % 4 * 8 + g;
  int64_t sample;
  const Place place = place_of<Sizes>(tile_index, arguments.tiles, arguments.height, arguments.width, sample);
  const Place with_halo = {place.row - Sizes::radius, place.column - Sizes::radius, place.height, place.width};
  const int first_channel = result_group * Sizes::result_channels;
  const int result_groups = divide_up(arguments.channels, Sizes::result_channels);
  const int chunks = divide_up(arguments.feature_channels, Sizes::summed_channels);
  const float* const bias = arguments.bias + sample * arguments.bias_stride +
                            int64_t{result_group} * (Sizes::result_channels * Sizes::taps) + 2 * t;
  const Element* const x_column = x_tile + (first_row * Sizes::columns_with_halo + column) * x_pitch + 2 * t;
  const Element* const s_column =
      s_tile + (first_row * s_columns + column) * s_pitch + (Products::tensor_cores ? t * int(4 / sizeof(Element)) : 0);

  load_tile<Sizes::threads, Sizes::rows_with_halo, Sizes::columns_with_halo, Sizes::result_channels, x_pitch>(
      x_tile, arguments.x, arguments.x.plane(sample, first_channel), arguments.channels - first_channel, with_halo);

  float y[Sizes::groups][Sizes::pairs][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first_feature = chunk * Sizes::summed_channels;
    if (chunk > 0) __syncthreads();
    load_tile<Sizes::threads, s_rows, s_columns, Sizes::summed_channels, s_pitch, Products::tf32>(
        s_tile, arguments.features, arguments.features.plane(sample, first_feature),
        arguments.feature_channels - first_feature, transposed ? with_halo : place);
    __syncthreads();

    const Slice* const weight =
        arguments.weight + (int64_t{chunk} * result_groups + result_group) * arranged_stride<Sizes>();
#pragma unroll 1
    for (int offset = 0; offset < K; ++offset) {  // column of offsets
      // taps of one column are K apart; those of ∂x count from the last
      const int first_tap = transposed ? K * K - 1 - offset : offset;
      constexpr int tap_step = transposed ? -K : K;
      const Slice* const weight_of_column = weight + first_tap * (Sizes::steps * 32);
      const float* const bias_of_column = bias + first_tap * 8;
      const Element* const x_of_column = x_column + offset * x_pitch;
      const Element* const s_of_column = s_column + (transposed ? offset : 0) * s_pitch;

      if constexpr (Products::tensor_cores) {
        constexpr int tap_stride = Sizes::steps * 32, held = transposed ? pairs + K - 1 : pairs;
#pragma unroll 1
        for (int step = 0; step < Sizes::steps; ++step) {
          const bool first = step == 0 && chunk == 0;
          uint32_t s[held][4];  // of matrices of rows m and m + P/2
#pragma unroll
          for (int m = 0; m < held; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const auto* from =
                  reinterpret_cast<const uint32_t*>(s_of_column + (m + half * pairs) * (s_columns * s_pitch));
              s[m][half] = from[8 * step];
              s[m][half + 2] = from[8 * step + 4];
            }
          }
#pragma unroll
          for (int group = 0; group < Sizes::groups; ++group) {
            __syncwarp();  // else the compiler begins with the loads of all groups, for which there are no registers
            float2 x[rows + K - 1];
#pragma unroll
            for (int row = 0; row < rows + K - 1; ++row) {
              x[row] = load_pair(x_of_column + row * (Sizes::columns_with_halo * x_pitch) + 8 * group);
            }
#pragma unroll
            for (int e = 0; e < K; ++e) {
              const int tap = group * Sizes::taps + e * tap_step;  // from the column's first
              float2 b = make_float2(0, 0);
              if (first) b = __ldg(reinterpret_cast<const float2*>(bias_of_column + tap * 8));
              const float biases[4] = {b.x, b.y, b.x, b.y};
              const Slice w = __ldg(weight_of_column + tap * tap_stride + step * 32 + lane);
#pragma unroll
              for (int m = 0; m < pairs; ++m) {
                float filters[4];
                Products::multiply_add(filters, s[m + (transposed ? e : 0)], w, biases);
                const float2 upper = x[m + e], lower = x[m + pairs + e];
                y[group][m][0] = fmaf(filters[0], upper.x, y[group][m][0]);
                y[group][m][1] = fmaf(filters[1], upper.y, y[group][m][1]);
                y[group][m][2] = fmaf(filters[2], lower.x, y[group][m][2]);
                y[group][m][3] = fmaf(filters[3], lower.y, y[group][m][3]);
              }
            }
          }
        }
      } else {
#pragma unroll
        for (int group = 0; group < Sizes::groups; ++group) {
          constexpr int tap_stride = Sizes::steps * 64;  // floats
          float filters[K][Sizes::pairs][4];
#pragma unroll
          for (int e = 0; e < K; ++e) {
            const int tap = group * Sizes::taps + e * tap_step;
            float2 b = make_float2(0, 0);
            if (chunk == 0) b = __ldg(reinterpret_cast<const float2*>(bias_of_column + tap * 8));
#pragma unroll
            for (int m = 0; m < Sizes::pairs; ++m) {
              filters[e][m][0] = filters[e][m][2] = b.x;
              filters[e][m][1] = filters[e][m][3] = b.y;
            }
          }
          add_filters_ieee<Sizes, transposed>(
              filters, s_of_column, s_columns * s_pitch,
              reinterpret_cast<const float*>(weight_of_column) + group * Sizes::taps * tap_stride + 16 * t,
              tap_step * tap_stride);
#pragma unroll
          for (int row = 0; row < rows + K - 1; ++row) {
            const float2 x = load_pair(x_of_column + row * (Sizes::columns_with_halo * x_pitch) + 8 * group);
#pragma unroll
            for (int e = 0; e < K; ++e) {
              const int j = row - e;
              if (j < 0 || j >= rows) continue;
              const int m = j % pairs, half = j / pairs * 2;
              y[group][m][half] = fmaf(filters[e][m][half], x.x, y[group][m][half]);
              y[group][m][half + 1] = fmaf(filters[e][m][half + 1], x.y, y[group][m][half + 1]);
            }
          }
        }
      }
    }
  }

  if (arguments.residual) {
#pragma unroll
    for (int group = 0; group < Sizes::groups; ++group) {
#pragma unroll
      for (int j = 0; j < rows; ++j) {
        const int center = (j + Sizes::radius) * Sizes::columns_with_halo + Sizes::radius;
        const float2 x = load_pair(x_column + center * x_pitch + 8 * group);
        y[group][j % pairs][j / pairs * 2] += x.x;
        y[group][j % pairs][j / pairs * 2 + 1] += x.y;
      }
    }
  }
  __syncthreads();
  Element* const y_column = x_tile + (first_row * Sizes::columns_of_tile + column) * x_pitch + 2 * t;
#pragma unroll
  for (int group = 0; group < Sizes::groups; ++group) {
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      store_pair(y_column + j * Sizes::columns_of_tile * x_pitch + 8 * group, y[group][j % pairs][j / pairs * 2],
                 y[group][j % pairs][j / pairs * 2 + 1]);
    }
  }
  __syncthreads();
  store_tile<Sizes::threads, Sizes::rows_of_tile, Sizes::columns_of_tile, Sizes::result_channels, x_pitch>(
      x_tile, arguments.y, arguments.y.plane(sample, first_channel), arguments.channels - first_channel, place);
}

// Forward. Grid: tiles of all samples × result groups, these fastest, since they share the features.
template <typename Sizes>
__global__ void __launch_bounds__(Sizes::threads, Sizes::blocks)
    predicted_forward_kernel(const FilterArguments<typename Sizes::Element> arguments) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int result_groups = divide_up(arguments.channels, Sizes::result_channels);
  filter_tile<Sizes, false>(arguments, blockIdx.x / result_groups, blockIdx.x % result_groups,
                            reinterpret_cast<typename Sizes::Element*>(shared_memory));
}

template <typename Element>
struct BackwardArguments {
  FilterArguments<Element> grad_x;  // x: g, y: ∂x
  Map<const Element> x;
  Map<Element> grad_features;
  const Slice* features_weight;  // arranged for ∂s
  float* weight_sums;            // [run][C·K², Cf]; null: not needed
  float* bias_sums;              // [run + sample][C·K²]; null: not needed
  int tile_count;                // of all samples
  int run;                       // tiles of a run
  // blocks of each kind: per tile ∂x and ∂s, per run ∂W and ∂b
  int grad_x_blocks;
  int grad_features_blocks;
  int sums_blocks;
};

// One tile of ∂s, result_channels features of it.
template <typename Sizes>
__device__ __forceinline__ void grad_features_tile(const BackwardArguments<typename Sizes::Element>& arguments,
                                                   int tile_index, int result_group, typename Sizes::Element* shared) {
  using Products = typename Sizes::Products;
  using Element = typename Sizes::Element;
  constexpr int K = Sizes::kernel, rows = Sizes::rows, pairs = Sizes::pairs, pitch = Sizes::slice_pitch;
  Element* const x_tile = shared;
  Element* const g_tile = shared + Sizes::pixels_with_halo * pitch;
  const auto& of_grad_x = arguments.grad_x;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = warp / 4 * rows, column = warp % 4 * 8 + g;
  int64_t sample;
  const Place place = place_of<Sizes>(tile_index, of_grad_x.tiles, of_grad_x.height, of_grad_x.width, sample);
  const Place with_halo = {place.row - Sizes::radius, place.column - Sizes::radius, place.height, place.width};
  const int first_feature = result_group * Sizes::result_channels;
  const int result_groups = divide_up(of_grad_x.feature_channels, Sizes::result_channels);
  const int chunks = divide_up(of_grad_x.channels, Sizes::summed_channels);
  const Element* const x_column = x_tile + (first_row * Sizes::columns_with_halo + column) * pitch;
  const Element* const g_column = g_tile + (first_row * Sizes::columns_of_tile + column) * pitch;

  float sums[Sizes::groups][Sizes::pairs][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first_channel = chunk * Sizes::summed_channels, present = of_grad_x.channels - first_channel;
    if (chunk > 0) __syncthreads();
    load_tile<Sizes::threads, Sizes::rows_with_halo, Sizes::columns_with_halo, Sizes::summed_channels, pitch>(
        x_tile, arguments.x, arguments.x.plane(sample, first_channel), present, with_halo);
    load_tile<Sizes::threads, Sizes::rows_of_tile, Sizes::columns_of_tile, Sizes::summed_channels, pitch>(
        g_tile, of_grad_x.x, of_grad_x.x.plane(sample, first_channel), present, place);
    __syncthreads();

    const Slice* const weight =
        arguments.features_weight + (int64_t{chunk} * result_groups + result_group) * arranged_stride<Sizes>();
    constexpr int tap_stride = Sizes::steps * 32;
#pragma unroll 1
    for (int step = 0; step < Sizes::steps; ++step) {
      if constexpr (Products::tensor_cores) {
        const auto at = [&](const Element* pixel) {
          return load_slice(reinterpret_cast<const unsigned char*>(pixel) + 32 * step + 8 * t);
        };
        Slice gradient[rows];
#pragma unroll
        for (int j = 0; j < rows; ++j) gradient[j] = at(g_column + j * Sizes::columns_of_tile * pitch);
#pragma unroll 1
        for (int offset = 0; offset < K; ++offset) {
          const Slice* const weight_of_step = weight + offset * tap_stride + step * 32 + lane;
          Slice x[rows + K - 1];
#pragma unroll
          for (int row = 0; row < rows + K - 1; ++row) {
            x[row] = at(x_column + (row * Sizes::columns_with_halo + offset) * pitch);
          }
#pragma unroll
          for (int e = 0; e < K; ++e) {
            Slice products[rows];
#pragma unroll
            for (int j = 0; j < rows; ++j) products[j] = Products::multiply(gradient[j], x[j + e]);
#pragma unroll
            for (int group = 0; group < Sizes::groups; ++group) {
              const Slice w = __ldg(weight_of_step + (group * Sizes::taps + e * K) * tap_stride);
#pragma unroll
              for (int m = 0; m < Sizes::pairs; ++m) {
                const Slice upper = products[m], lower = products[m + pairs];
                const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
                Products::multiply_add(sums[group][m], a, w, sums[group][m]);
              }
            }
          }
        }
      } else {
#pragma unroll 1
        for (int c = 8 * step; c < 8 * step + 8; c += 2) {
          float2 gradient[rows];
#pragma unroll
          for (int j = 0; j < rows; ++j) gradient[j] = load_pair(g_column + j * Sizes::columns_of_tile * pitch + c);
#pragma unroll 1
          for (int offset = 0; offset < K; ++offset) {
            const Slice* const weight_of_step = weight + offset * tap_stride + step * 32;
            float2 x[rows + K - 1];
#pragma unroll
            for (int row = 0; row < rows + K - 1; ++row) {
              x[row] = load_pair(x_column + (row * Sizes::columns_with_halo + offset) * pitch + c);
            }
#pragma unroll
            for (int e = 0; e < K; ++e) {
              float2 products[rows];
#pragma unroll
              for (int j = 0; j < rows; ++j) {
                products[j] = make_float2(gradient[j].x * x[j + e].x, gradient[j].y * x[j + e].y);
              }
#pragma unroll
              for (int group = 0; group < Sizes::groups; ++group) {
                // features 2t and 2t + 1, channels c and c + 1
                const auto* from = reinterpret_cast<const float2*>(
                    reinterpret_cast<const float*>(weight_of_step + (group * Sizes::taps + e * K) * tap_stride) +
                    16 * t + c % 8);
                const float2 w[2] = {__ldg(from), __ldg(from + 4)};
#pragma unroll
                for (int j = 0; j < rows; ++j) {
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    float& sum = sums[group][j % pairs][j / pairs * 2 + i];
                    sum = fmaf(products[j].x, w[i].x, sum);
                    sum = fmaf(products[j].y, w[i].y, sum);
                  }
                }
              }
            }
          }
        }
      }
    }
  }

  __syncthreads();
  constexpr int staged_pitch = Sizes::pair_pitch;
  Element* const staged = shared + (first_row * Sizes::columns_of_tile + column) * staged_pitch + 2 * t;
#pragma unroll
  for (int group = 0; group < Sizes::groups; ++group) {
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      store_pair(staged + j * Sizes::columns_of_tile * staged_pitch + 8 * group, sums[group][j % pairs][j / pairs * 2],
                 sums[group][j % pairs][j / pairs * 2 + 1]);
    }
  }
  __syncthreads();
  store_tile<Sizes::threads, Sizes::rows_of_tile, Sizes::columns_of_tile, Sizes::result_channels, staged_pitch>(
      shared, arguments.grad_features, arguments.grad_features.plane(sample, first_feature),
      of_grad_x.feature_channels - first_feature, place);
}

// Products of ∂W, summed over pixels: a step is `columns` pixels of a row. A thread has, of a group of 8 channels, the
// two registers that `Slice` has room for, and of a matrix of 16 features four.
template <typename Products>
struct PixelStep;

// Registers of a slice: channel g, pixels t and t + 4.
template <>
struct PixelStep<Tf32Products> {
  static constexpr int columns = 8;
  static constexpr bool sums_over_lanes = true;  // of ∂b: the four lanes of a group share a channel

  template <int pitch>
  static __device__ __forceinline__ void load_features(uint32_t (&a)[4], const float* tile, int lane) {
    const float* from = tile + lane % 4 * pitch + lane / 4;
    a[0] = __float_as_uint(from[0]);
    a[1] = __float_as_uint(from[8]);
    a[2] = __float_as_uint(from[4 * pitch]);
    a[3] = __float_as_uint(from[4 * pitch + 8]);
  }

  // Two rows, `row_stride` elements apart.
  template <int pitch, int row_stride>
  static __device__ __forceinline__ void load_rows(Slice& upper, Slice& lower, const float* tile, int lane) {
    const float* from = tile + lane % 4 * pitch + lane / 4;
    upper = make_uint2(__float_as_uint(from[0]), __float_as_uint(from[4 * pitch]));
    lower = make_uint2(__float_as_uint(from[row_stride]), __float_as_uint(from[row_stride + 4 * pitch]));
  }

  template <int matrices>
  static __device__ __forceinline__ void multiply_add(float (&sums)[matrices][4], float (&bias)[2],
                                                      const uint32_t (&a)[matrices][4], Slice g, Slice x) {
    bias[0] = fmaf(__uint_as_float(g.x), __uint_as_float(x.x), bias[0]);
    bias[0] = fmaf(__uint_as_float(g.y), __uint_as_float(x.y), bias[0]);
    const Slice product = Tf32Products::multiply(g, x);
    const uint32_t b[2] = {product.x, product.y};
#pragma unroll
    for (int m = 0; m < matrices; ++m) mma_m16n8k8_tf32(sums[m], a[m], b, sums[m]);
  }
};

// Registers of a slice: channel g, pixels 2t, 2t + 1 and 2t + 8, 2t + 9.
template <typename Half>
struct PixelStep<HalfProducts<Half>> {
  static constexpr int columns = 16;
  static constexpr bool sums_over_lanes = true;

  template <int pitch>
  static __device__ __forceinline__ void load_features(uint32_t (&a)[4], const Half* tile, int lane) {
    load_matrices_transposed(a, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
  }

  template <int pitch, int row_stride>
  static __device__ __forceinline__ void load_rows(Slice& upper, Slice& lower, const Half* tile, int lane) {
    uint32_t both[4];
    load_matrices_transposed(both, tile + lane / 16 * row_stride + lane % 16 * pitch);
    upper = make_uint2(both[0], both[1]);
    lower = make_uint2(both[2], both[3]);
  }

  template <int matrices>
  static __device__ __forceinline__ void multiply_add(float (&sums)[matrices][4], float (&bias)[2],
                                                      const uint32_t (&a)[matrices][4], Slice g, Slice x) {
    const Slice product = HalfProducts<Half>::multiply(g, x);
    const float2 first = load_pair(reinterpret_cast<const Half*>(&product.x));
    const float2 second = load_pair(reinterpret_cast<const Half*>(&product.y));
    bias[0] += (first.x + first.y) + (second.x + second.y);
    const uint32_t b[2] = {product.x, product.y};
#pragma unroll
    for (int m = 0; m < matrices; ++m) mma_m16n8k16<Half>(sums[m], a[m], b, sums[m]);
  }
};

// Registers of a slice: channels 2t and 2t + 1 of one pixel; of a matrix: features g and g + 8.
template <>
struct PixelStep<IeeeProducts> {
  static constexpr int columns = 1;
  static constexpr bool sums_over_lanes = false;

  template <int pitch>
  static __device__ __forceinline__ void load_features(uint32_t (&a)[4], const float* tile, int lane) {
    a[0] = __float_as_uint(tile[lane / 4]);
    a[1] = __float_as_uint(tile[lane / 4 + 8]);
  }

  template <int pitch, int row_stride>
  static __device__ __forceinline__ void load_rows(Slice& upper, Slice& lower, const float* tile, int lane) {
    upper = load_slice(tile + 2 * (lane % 4));
    lower = load_slice(tile + row_stride + 2 * (lane % 4));
  }

  template <int matrices>
  static __device__ __forceinline__ void multiply_add(float (&sums)[matrices][4], float (&bias)[2],
                                                      const uint32_t (&a)[matrices][4], Slice g, Slice x) {
    const float first = __uint_as_float(g.x) * __uint_as_float(x.x);
    const float second = __uint_as_float(g.y) * __uint_as_float(x.y);
    bias[0] += first;
    bias[1] += second;
#pragma unroll
    for (int m = 0; m < matrices; ++m) {
      const float upper = __uint_as_float(a[m][0]), lower = __uint_as_float(a[m][1]);
      sums[m][0] = fmaf(upper, first, sums[m][0]);
      sums[m][1] = fmaf(upper, second, sums[m][1]);
      sums[m][2] = fmaf(lower, first, sums[m][2]);
      sums[m][3] = fmaf(lower, second, sums[m][3]);
    }
  }
};

// ∂W and ∂b summed over the tiles of one run. `block` counts, fastest first: rounds of units, groups of features,
// groups of channels. A sample's part of a run has a row of bias_sums of its own, number run + sample.
template <typename Sizes>
__device__ __forceinline__ void weight_sums_of_run(const BackwardArguments<typename Sizes::Element>& arguments, int run,
                                                   int block, typename Sizes::Element* shared) {
  using Products = typename Sizes::Products;
  using Element = typename Sizes::Element;
  using Step = PixelStep<Products>;
  constexpr int K = Sizes::kernel, units = Sizes::units, x_pitch = Sizes::pair_pitch, s_pitch = Sizes::strip_pitch;
  constexpr int strip_rows = Sizes::rows_of_strip, columns = Sizes::columns_of_tile;
  constexpr int halo_columns = Sizes::columns_with_halo;
  Element* const x_tile = shared;
  Element* const g_tile = x_tile + Sizes::strip_pixels_with_halo * x_pitch;
  Element* const s_tile = g_tile + Sizes::strip_pixels * x_pitch;
  const auto& of_grad_x = arguments.grad_x;
  const int channels = of_grad_x.channels, features = of_grad_x.feature_channels;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int feature_groups = divide_up(features, Sizes::strip_features);
  const int first_feature = block / Sizes::rounds % feature_groups * Sizes::strip_features;
  const int first_channel = block / Sizes::rounds / feature_groups * Sizes::result_channels;
  const int first_unit = (block % Sizes::rounds * Sizes::warps + warp) * units;
  const bool busy = first_unit < Sizes::groups * K;
  int group[units], offset[units];  // of the units; those that do not exist repeat the last and are not written
#pragma unroll
  for (int i = 0; i < units; ++i) {
    const int unit = smaller(first_unit + i, Sizes::groups * K - 1);
    group[i] = unit / K;
    offset[i] = units == K ? i : unit % K;
  }

  float sums[units][K][Sizes::matrices][4] = {};
  float bias[units][K][2] = {};
  const int first_tile = run * arguments.run;
  const int last_tile = smaller(first_tile + arguments.run, arguments.tile_count);
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; ++tile) {
    int64_t sample;
    Place place = place_of<Sizes>(tile, of_grad_x.tiles, of_grad_x.height, of_grad_x.width, sample);
#pragma unroll 1
    for (int strip = 0; strip < Sizes::rows_of_tile / strip_rows; ++strip, place.row += strip_rows) {
      if (place.row >= place.height) break;
      __syncthreads();
      load_tile<Sizes::threads, Sizes::strip_rows_with_halo, halo_columns, Sizes::result_channels, x_pitch>(
          x_tile, arguments.x, arguments.x.plane(sample, first_channel), channels - first_channel,
          {place.row - Sizes::radius, place.column - Sizes::radius, place.height, place.width});
      load_tile<Sizes::threads, strip_rows, columns, Sizes::result_channels, x_pitch>(
          g_tile, of_grad_x.x, of_grad_x.x.plane(sample, first_channel), channels - first_channel, place);
      load_tile<Sizes::threads, strip_rows, columns, Sizes::strip_features, s_pitch, Products::tf32>(
          s_tile, of_grad_x.features, of_grad_x.features.plane(sample, first_feature), features - first_feature, place);
      __syncthreads();
      if (!busy) continue;

#pragma unroll 1
      for (int column = 0; column < columns; column += Step::columns) {
        Slice x[units][Sizes::strip_rows_with_halo], gradient[units][strip_rows];
        const auto load_x = [&](int i, int row) {
          const Element* from = x_tile + (row * halo_columns + column + offset[i]) * x_pitch + 8 * group[i];
          Step::template load_rows<x_pitch, halo_columns * x_pitch>(x[i][row], x[i][row + 1], from, lane);
        };
#pragma unroll
        for (int i = 0; i < units; ++i) {
#pragma unroll
          for (int row = 0; row + 1 < K; row += 2) load_x(i, row);
        }
#pragma unroll
        for (int row = 0; row < strip_rows; ++row) {
          uint32_t a[Sizes::matrices][4];
#pragma unroll
          for (int m = 0; m < Sizes::matrices; ++m) {
            Step::template load_features<s_pitch>(a[m], s_tile + (row * columns + column) * s_pitch + 16 * m, lane);
          }
#pragma unroll
          for (int i = 0; i < units; ++i) {
            if (row % 2 == 0) {
              load_x(i, row + K - 1);
              if (units != K || i == 0) {  // else all units have the same channels
                const Element* from = g_tile + (row * columns + column) * x_pitch + 8 * group[i];
                Step::template load_rows<x_pitch, columns * x_pitch>(gradient[i][row], gradient[i][row + 1], from,
                                                                     lane);
              }
            }
#pragma unroll
            for (int e = 0; e < K; ++e) {
              Step::multiply_add(sums[i][e], bias[i][e], a, gradient[units == K ? 0 : i][row], x[i][row + e]);
            }
          }
        }
      }
    }

    const int tiles_of_sample = of_grad_x.tiles.columns * of_grad_x.tiles.rows;
    const bool ends_sample = (tile + 1) % tiles_of_sample == 0, ends_run = tile + 1 == last_tile;
    if (arguments.bias_sums && first_feature == 0 && busy && (ends_sample || ends_run)) {
      float* const row = arguments.bias_sums + (run + sample) * (int64_t{channels} * Sizes::taps);
      // where run and sample end together, no tile has the row between this one and the next
      const bool skips_row = ends_sample && ends_run && tile + 1 < arguments.tile_count;
#pragma unroll
      for (int i = 0; i < units; ++i) {
#pragma unroll
        for (int e = 0; e < K; ++e) {
          if constexpr (Step::sums_over_lanes) {
            bias[i][e][0] += __shfl_xor_sync(0xffffffff, bias[i][e][0], 1);
            bias[i][e][0] += __shfl_xor_sync(0xffffffff, bias[i][e][0], 2);
          }
          const bool writes = (Step::sums_over_lanes ? t == 0 : g == 0) && first_unit + i < Sizes::groups * K;
#pragma unroll
          for (int j = 0; j < (Step::sums_over_lanes ? 1 : 2); ++j) {
            const int channel = first_channel + 8 * group[i] + (Step::sums_over_lanes ? g : 2 * t + j);
            if (writes && channel < channels) {
              float* const to = row + channel * Sizes::taps + e * K + offset[i];
              *to = bias[i][e][j];
              if (skips_row) to[int64_t{channels} * Sizes::taps] = 0;
            }
            bias[i][e][j] = 0;
          }
        }
      }
    }
  }

  if (!arguments.weight_sums || !busy) return;
  float* const to = arguments.weight_sums + run * (int64_t{channels} * Sizes::taps * features);
#pragma unroll
  for (int i = 0; i < units; ++i) {
    if (first_unit + i >= Sizes::groups * K) continue;
#pragma unroll
    for (int e = 0; e < K; ++e) {
#pragma unroll
      for (int m = 0; m < Sizes::matrices; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int feature = first_feature + 16 * m + g + j / 2 * 8;
          const int channel = first_channel + 8 * group[i] + 2 * t + j % 2;
          if (feature < features && channel < channels) {
            to[(int64_t{channel} * Sizes::taps + e * K + offset[i]) * features + feature] = sums[i][e][m][j];
          }
        }
      }
    }
  }
}

// Backward. Grid: for every run of tiles its sums_blocks, then for every tile its blocks of ∂x and of ∂s.
template <typename Sizes>
__global__ void __launch_bounds__(Sizes::threads, Sizes::blocks)
    predicted_backward_kernel(const BackwardArguments<typename Sizes::Element> arguments) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* const shared = reinterpret_cast<typename Sizes::Element*>(shared_memory);
  const int of_tile = arguments.grad_x_blocks + arguments.grad_features_blocks;
  const int of_run = arguments.sums_blocks + arguments.run * of_tile;
  const int run = blockIdx.x / of_run;
  int block = blockIdx.x % of_run;
  if (block < arguments.sums_blocks) {
    weight_sums_of_run<Sizes>(arguments, run, block, shared);
    return;
  }
  block -= arguments.sums_blocks;
  const int tile = run * arguments.run + block / of_tile;
  if (tile >= arguments.tile_count) return;
  block %= of_tile;
  if (block < arguments.grad_x_blocks) {
    filter_tile<Sizes, true>(arguments.grad_x, tile, block, shared);
  } else {
    grad_features_tile<Sizes>(arguments, tile, block - arguments.grad_x_blocks, shared);
  }
}

}  // namespace mitnet_fast
