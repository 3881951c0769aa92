// Kernels of window attention, for one way of multiplying and one padded head size.
//
// A block of four warps works on one head of one window at a time, on 64 queries and 64 keys: a window of up
// to 8×8 pixels is one such chunk, larger ones are several. A warp owns 16 rows of every product. The tiles
// Q, K, V and g [64, D] lie in shared memory, padded by zeros; scores stay in registers. All sums, and the
// softmax, are float32. Q carries d^-½·log₂e and the table log₂e, so that exp2 serves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "window_attention/window_attention_products.cuh"

namespace mitnet_fast {

constexpr int attention_threads = 128;
constexpr int chunk = 64;  // queries or keys

template <typename T>
struct AttentionMap {
  T* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// How the map is padded to whole windows, and what shares a place in it. The bands are the padded rows and
// columns whose pixels may have reflections: gradients of keys and values there are collected in buffers
// [B, C, rows of the bands, then columns of the bands of all rows].
struct Windows {
  int height, width;
  int window, tokens, chunks;  // w, w², chunks of 64 tokens
  int shift, bottom, right;    // rows and columns reflected
  int rows, columns;           // windows
  int band_rows, band_columns;

  __device__ __forceinline__ int table_rows() const { return (2 * window - 1) * (2 * window - 1); }
  __device__ __forceinline__ int padded_height() const { return rows * window; }
  __device__ __forceinline__ int padded_width() const { return columns * window; }
  __device__ __forceinline__ int64_t band_places() const {
    return static_cast<int64_t>(band_rows) * padded_width() + static_cast<int64_t>(padded_height()) * band_columns;
  }
  static __device__ __forceinline__ bool in_band(int i, int size, int before, int after) {
    return (before > 0 && i <= before) || (after > 0 && i >= size - 1 - after);
  }
  __device__ __forceinline__ bool row_in_band(int h) const { return in_band(h, height, shift, bottom); }
  __device__ __forceinline__ bool in_bands(int h, int w) const {
    return row_in_band(h) || in_band(w, width, shift, right);
  }
  // Place of the token (h, w), before reflection.
  __device__ __forceinline__ int64_t band_place(int h, int w) const {
    const int row = shift > 0 && h <= shift ? h + shift : h + shift - padded_height() + band_rows;
    const int column = shift > 0 && w <= shift ? w + shift : w + shift - padded_width() + band_columns;
    if (row_in_band(h)) return static_cast<int64_t>(row) * padded_width() + w + shift;
    return static_cast<int64_t>(band_rows) * padded_width() + static_cast<int64_t>(h + shift) * band_columns + column;
  }
};

// Coordinate of the pixel that a map continued by reflection shows at i.
__device__ __forceinline__ int reflected(int i, int size) {
  i = i < 0 ? -i : i;
  return i < size ? i : 2 * (size - 1) - i;
}

// One window of one sample.
struct Place {
  int64_t n;
  int h, w;  // its first token, before reflection

  __device__ __forceinline__ Place(const Windows& windows, int index) {
    const int rest = index % (windows.rows * windows.columns);
    n = index / (windows.rows * windows.columns);
    h = rest / windows.columns * windows.window - windows.shift;
    w = rest % windows.columns * windows.window - windows.shift;
  }
};

template <typename Products, int D>
struct AttentionTiles {
  using Element = typename Products::Element;
  static constexpr int pitch = D + 16 / static_cast<int>(sizeof(Element));
  static constexpr int score_pitch = chunk + 16 / static_cast<int>(sizeof(Element));
  static constexpr int stage_pitch = D + 4;
  static constexpr int tile = chunk * pitch;
  static constexpr int stage = chunk * stage_pitch;
  static constexpr int tile_bytes = tile * static_cast<int>(sizeof(Element));
  static constexpr int stage_bytes = stage * static_cast<int>(sizeof(float));
  static constexpr int score_bytes = chunk * score_pitch * static_cast<int>(sizeof(Element));
  static constexpr int exchange_bytes = score_bytes > stage_bytes ? score_bytes : stage_bytes;
  static constexpr int forward_bytes = 3 * tile_bytes + stage_bytes;
  static constexpr int backward_bytes = 4 * tile_bytes + exchange_bytes;
  static_assert(4 * tile_bytes >= 2 * stage_bytes && backward_bytes >= chunk * (chunk + 1) * 4);
};

struct Position {
  unsigned char h, w;
};

// Row and column of every token in its window, to shared memory.
__device__ __forceinline__ void locate_tokens(Position* positions, const Windows& windows) {
  for (int token = threadIdx.x; token < windows.chunks * chunk; token += attention_threads) {
    positions[token] = {static_cast<unsigned char>(token / windows.window),
                        static_cast<unsigned char>(token % windows.window)};
  }
}

// Calls visitor(token, c) for this thread's elements of a tile [64, D]; neighbouring threads get what lies together.
template <int D, typename Visitor>
__device__ __forceinline__ void for_each_element(bool along_channels, Visitor&& visitor) {
  if (along_channels) {
#pragma unroll 4
    for (int i = 0; i < chunk * D / attention_threads; ++i) {
      visitor(threadIdx.x / D + i * (attention_threads / D), threadIdx.x % D);
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < chunk * D / attention_threads; ++i) {
      visitor(threadIdx.x % chunk, threadIdx.x / chunk + i * (attention_threads / chunk));
    }
  }
}

// Tokens `first` … of a window as a tile [64, D], padded by zeros. With `queries`, padding by reflection is
// zero as well.
template <typename Products, int D, bool queries, typename T>
__device__ __forceinline__ void load_tokens(typename Products::Element* tile, const AttentionMap<T>& map,
                                            const Windows& windows, const Position* positions, const Place& place,
                                            int first, int64_t channel, int head, float factor) {
  const auto* plane = map.data + place.n * map.stride_n + channel * map.stride_c;
  for_each_element<D>(map.stride_c == 1, [&](int token, int c) {
    const Position position = positions[first + token];
    const int h = place.h + position.h, w = place.w + position.w;
    bool present = first + token < windows.tokens && c < head;
    if (queries) present = present && h >= 0 && h < windows.height && w >= 0 && w < windows.width;
    float value = 0;
    if (present) {
      value = static_cast<float>(plane[reflected(h, windows.height) * map.stride_h +
                                       reflected(w, windows.width) * map.stride_w + c * map.stride_c]);
    }
    tile[token * AttentionTiles<Products, D>::pitch + c] = Products::operand(value * factor);
  });
}

// A result of a product, rows of one warp, to a tile [64, D] of float32.
template <int D, int pitch>
__device__ __forceinline__ void stage(float* tile, const float (&result)[D / 8][4], float factor) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[(row + i / 2 * 8) * pitch + j * 8 + 2 * t + i % 2] = result[j][i] * factor;
  }
}

// The way back: pixels of the map, and for keys and values those in the bands to `band`.
template <int D, int pitch, typename T>
__device__ __forceinline__ void store_tokens(const float* tile, const AttentionMap<T>& map, float* band,
                                             const Windows& windows, const Position* positions, const Place& place,
                                             int first, int64_t channel, int64_t band_channel, int head) {
  T* plane = map.data + place.n * map.stride_n + channel * map.stride_c;
  for_each_element<D>(map.stride_c == 1, [&](int token, int c) {
    if (first + token >= windows.tokens || c >= head) return;
    const Position position = positions[first + token];
    const int h = place.h + position.h, w = place.w + position.w;
    const float value = tile[token * pitch + c];
    if (band != nullptr && windows.in_bands(h, w)) {
      band[(band_channel + c) * windows.band_places() + windows.band_place(h, w)] = value;
    } else if (h >= 0 && h < windows.height && w >= 0 && w < windows.width) {
      plane[h * map.stride_h + w * map.stride_w + c * map.stride_c] = static_cast<T>(value);
    }
  });
}

// log₂e·bias of this thread's scores, −∞ for keys that no window has; `table` is the head's, times log₂e.
__device__ __forceinline__ void load_bias(float (&bias)[8][4], const float* table, const Windows& windows,
                                          int first_query, int first_key) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, w = windows.window, side = 2 * w - 1;
  const int row = first_query + threadIdx.x / 32 * 16 + g;
  int of_query[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) of_query[i] = (row + 8 * i) / w * side + (row + 8 * i) % w + (w - 1) * (side + 1);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first_key + 8 * j + 2 * t + i, of_key = key / w * side + key % w;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool pair = key < windows.tokens && row + 8 * r < windows.tokens;
        bias[j][2 * r + i] = pair ? table[of_query[r] - of_key] : key < windows.tokens ? 0.0f : -INFINITY;
      }
    }
  }
}

// Scores of this warp's 16 rows of `a` with 64 rows of `b`, added to `c`.
template <typename Products, int D>
__device__ __forceinline__ void multiply_rows(float (&d)[8][4], const typename Products::Element* a,
                                              const typename Products::Element* b, const float (&c)[8][4]) {
  constexpr int pitch = AttentionTiles<Products, D>::pitch;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] = c[j][i];
  }
#pragma unroll Products::steps_unrolled
  for (int k = 0; k < D; k += Products::depth) {
    uint32_t of_a[4];
    Products::load_a(of_a, a + threadIdx.x / 32 * 16 * pitch, pitch, k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t of_b[2][2];
      Products::load_b_transposed(of_b, b + j * 16 * pitch, pitch, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) Products::multiply_add(d[2 * j + i], of_a, of_b[i], d[2 * j + i]);
    }
  }
}

// d += p·b for this warp's 16 rows of p, in registers, and a tile b.
template <typename Products, int D>
__device__ __forceinline__ void multiply_result(float (&d)[D / 8][4], const float (&p)[8][4],
                                                const typename Products::Element* b) {
  constexpr int pitch = AttentionTiles<Products, D>::pitch;
#pragma unroll
  for (int step = 0; step < chunk / Products::depth; ++step) {
    uint32_t of_p[4];
    Products::from_result(of_p, p, step);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t of_b[2][2];
      Products::load_b(of_b, b + j * 16, pitch, step * Products::depth);
#pragma unroll
      for (int i = 0; i < 2; ++i) Products::multiply_add(d[2 * j + i], of_p, of_b[i], d[2 * j + i]);
    }
  }
}

// d += pᵀ·b for this warp's 16 columns of p, in shared memory, and a tile b.
template <typename Products, int D>
__device__ __forceinline__ void multiply_transposed(float (&d)[D / 8][4], const typename Products::Element* p,
                                                    const typename Products::Element* b) {
  using Tiles = AttentionTiles<Products, D>;
#pragma unroll Products::steps_unrolled
  for (int k = 0; k < chunk; k += Products::depth) {
    uint32_t of_p[4];
    Products::load_a_transposed(of_p, p + threadIdx.x / 32 * 16, Tiles::score_pitch, k);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t of_b[2][2];
      Products::load_b(of_b, b + j * 16, Tiles::pitch, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) Products::multiply_add(d[2 * j + i], of_p, of_b[i], d[2 * j + i]);
    }
  }
}

// Of the four lanes that share a row.
template <typename Combine>
__device__ __forceinline__ float over_row(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(0xffffffff, value, 1));
  return combine(value, __shfl_xor_sync(0xffffffff, value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
  return over_row(value, [](float a, float b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ void load_table(float* table, const T* bias_table, const Windows& windows, int heads,
                                           int head) {
  constexpr float log2e = 1.4426950408889634f;
  for (int row = threadIdx.x; row < windows.table_rows(); row += attention_threads) {
    table[row] = static_cast<float>(bias_table[static_cast<int64_t>(row) * heads + head]) * log2e;
  }
}

template <typename T>
struct AttentionForwardArguments {
  AttentionMap<const T> q, k, v;
  const T* bias_table;
  AttentionMap<T> y;
  Windows windows;
  int heads, head_size;
  int count;    // windows of all samples
  int run;      // neighbouring windows that a block works on, one after another
  float scale;  // d^-½
};

// y. Grid: runs of windows × chunks of queries × heads, heads fastest. The bias of a single chunk stays in
// registers for the whole run.
template <typename Products, int D>
__global__ void __launch_bounds__(attention_threads)
    window_attention_forward_kernel(const AttentionForwardArguments<typename Products::Element> arguments) {
  using Element = typename Products::Element;
  using Tiles = AttentionTiles<Products, D>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const q = reinterpret_cast<Element*>(memory);
  Element *const k = q + Tiles::tile, *const v = k + Tiles::tile;
  auto* const staged = reinterpret_cast<float*>(memory + 3 * Tiles::tile_bytes);
  float* const table = staged + Tiles::stage;
  const Windows& windows = arguments.windows;
  auto* const positions = reinterpret_cast<Position*>(table + windows.table_rows());
  const int head = blockIdx.x % arguments.heads;
  const int first_query = static_cast<int>(blockIdx.x / arguments.heads % windows.chunks) * chunk;
  const int run = blockIdx.x / arguments.heads / windows.chunks;
  const int64_t channel = static_cast<int64_t>(head) * arguments.head_size;
  const int first = run * arguments.run, last = min(arguments.count, first + arguments.run);
  constexpr float log2e = 1.4426950408889634f;

  load_table(table, arguments.bias_table, windows, arguments.heads, head);
  locate_tokens(positions, windows);
  __syncthreads();
  float bias[8][4];
  if (windows.chunks == 1) load_bias(bias, table, windows, 0, 0);
  for (int index = first; index < last; ++index) {
    const Place place(windows, index);
    load_tokens<Products, D, true>(q, arguments.q, windows, positions, place, first_query, channel, arguments.head_size,
                                   arguments.scale * log2e);
    float y[D / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int first_key = 0; first_key < windows.tokens; first_key += chunk) {
      load_tokens<Products, D, false>(k, arguments.k, windows, positions, place, first_key, channel,
                                      arguments.head_size, 1);
      load_tokens<Products, D, false>(v, arguments.v, windows, positions, place, first_key, channel,
                                      arguments.head_size, 1);
      if (windows.chunks > 1) load_bias(bias, table, windows, first_query, first_key);
      __syncthreads();
      float p[8][4];
      multiply_rows<Products, D>(p, q, k, bias);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = largest[r];
#pragma unroll
        for (int j = 0; j < 8; ++j) most = fmaxf(most, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
        most = over_row(most, [](float a, float b) { return fmaxf(a, b); });
        const float shrink = exp2_approximate(largest[r] - most);
        largest[r] = most;
        sum[r] *= shrink;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          y[j][2 * r] *= shrink;
          y[j][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            p[j][i] = exp2_approximate(p[j][i] - most);
            sum[r] += p[j][i];
          }
        }
      }
      multiply_result<Products, D>(y, p, v);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = 1 / row_sum(sum[r]);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        y[j][2 * r] *= factor;
        y[j][2 * r + 1] *= factor;
      }
    }
    stage<D, Tiles::stage_pitch>(staged, y, 1);
    __syncthreads();
    store_tokens<D, Tiles::stage_pitch>(staged, arguments.y, nullptr, windows, positions, place, first_query, channel,
                                        0, arguments.head_size);
  }
}

template <typename T>
struct AttentionBackwardArguments {
  AttentionMap<const T> grad, q, k, v;
  const T* bias_table;
  AttentionMap<T> grad_q, grad_k, grad_v;  // data null: not needed
  float *key_band, *value_band;            // null without padding
  float* table_sums;                       // [runs, heads, table rows], null if not needed
  Windows windows;
  int heads, head_size;
  int64_t channels;
  int count;
  int run;
  float scale;
};

// Scores' gradients [64, 64], at rows first_query … and columns first_key …, added up by their row of the
// table. A thread owns every 128th row.
__device__ __forceinline__ void add_to_table(float* table_sums, const float* grad_scores, const Windows& windows,
                                             int first_query, int first_key) {
  const int w = windows.window, side = 2 * w - 1;
  for (int row = threadIdx.x; row < side * side; row += attention_threads) {
    const int dy = row / side - (w - 1), dx = row % side - (w - 1);
    float sum = 0;
    const int last_y = min(min(w - 1, w - 1 - dy), (first_key + chunk - 1) / w);
    for (int y = max(max(0, -dy), first_key / w); y <= last_y; ++y) {
      for (int x = max(0, -dx); x < min(w, w - dx); ++x) {
        const int key = y * w + x - first_key, query = (y + dy) * w + x + dx - first_query;
        if (key >= 0 && key < chunk && query >= 0 && query < chunk) sum += grad_scores[query * (chunk + 1) + key];
      }
    }
    table_sums[row] += sum;
  }
}

// 16 rows of scores or their gradients to a tile in shared memory; write(to, a, b) writes two neighbours.
template <int pitch, typename Write, typename Element>
__device__ __forceinline__ void write_scores(Element* tile, const float (&scores)[8][4], Write write) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      write(tile + (row + 8 * r) * pitch + j * 8 + 2 * t, scores[j][2 * r], scores[j][2 * r + 1]);
    }
  }
}

__device__ __forceinline__ void write_floats(float* to, float a, float b) {
  to[0] = a;
  to[1] = b;
}

// ∂V += Pᵀ·g and ∂K += dSᵀ·Q of one pair of chunks, which the warps exchange through shared memory.
template <typename Products, int D>
__device__ __forceinline__ void add_to_keys(float (&grad_k)[D / 8][4], float (&grad_v)[D / 8][4],
                                            const float (&p)[8][4], const float (&grad_scores)[8][4],
                                            typename Products::Element* exchange, const typename Products::Element* q,
                                            const typename Products::Element* grad, bool needs_k, bool needs_v) {
  constexpr int pitch = AttentionTiles<Products, D>::score_pitch;
  const auto write = [](auto* to, float a, float b) { Products::write_pair(to, a, b); };
  if (needs_v) {
    write_scores<pitch>(exchange, p, write);
    __syncthreads();
    multiply_transposed<Products, D>(grad_v, exchange, grad);
    __syncthreads();
  }
  if (needs_k) {
    write_scores<pitch>(exchange, grad_scores, write);
    __syncthreads();
    multiply_transposed<Products, D>(grad_k, exchange, q);
  }
}

// ∂Q, ∂K, ∂V and the block's sums of ∂bias_table, for windows of one chunk. Grid: runs of windows × heads,
// heads fastest. The bias, and the sums of its gradient over the run, stay in registers.
template <typename Products, int D>
__global__ void __launch_bounds__(attention_threads, 2)
    window_attention_backward_kernel(const AttentionBackwardArguments<typename Products::Element> arguments) {
  using Element = typename Products::Element;
  using Tiles = AttentionTiles<Products, D>;
  constexpr float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
  constexpr int stage_pitch = Tiles::stage_pitch;
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const q = reinterpret_cast<Element*>(memory);
  Element *const k = q + Tiles::tile, *const v = k + Tiles::tile, *const grad = v + Tiles::tile;
  auto* const exchange = reinterpret_cast<Element*>(memory + 4 * Tiles::tile_bytes);
  auto* const staged_q = reinterpret_cast<float*>(memory);
  float* const staged_k = staged_q + Tiles::stage;
  auto* const staged_v = reinterpret_cast<float*>(exchange);
  auto* const table = reinterpret_cast<float*>(memory + Tiles::backward_bytes);
  const Windows& windows = arguments.windows;
  const int head = blockIdx.x % arguments.heads, size = arguments.head_size;
  const int table_rows = windows.table_rows();
  auto* const positions = reinterpret_cast<Position*>(table + table_rows);
  const int run = blockIdx.x / arguments.heads;
  const int64_t channel = static_cast<int64_t>(head) * size;
  const int first = run * arguments.run, last = min(arguments.count, first + arguments.run);
  const bool needs_qk = arguments.grad_q.data != nullptr, needs_v = arguments.grad_v.data != nullptr;

  load_table(table, arguments.bias_table, windows, arguments.heads, head);
  locate_tokens(positions, windows);
  __syncthreads();
  float bias[8][4], bias_sums[8][4] = {};
  load_bias(bias, table, windows, 0, 0);
  for (int index = first; index < last; ++index) {
    const Place place(windows, index);
    load_tokens<Products, D, true>(q, arguments.q, windows, positions, place, 0, channel, size,
                                   arguments.scale * log2e);
    load_tokens<Products, D, false>(k, arguments.k, windows, positions, place, 0, channel, size, 1);
    load_tokens<Products, D, false>(v, arguments.v, windows, positions, place, 0, channel, size, 1);
    load_tokens<Products, D, true>(grad, arguments.grad, windows, positions, place, 0, channel, size, 1);
    __syncthreads();
    float p[8][4], grad_scores[8][4];
    multiply_rows<Products, D>(p, q, k, bias);
    const float zero[8][4] = {};
    multiply_rows<Products, D>(grad_scores, grad, v, zero);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = -INFINITY, sum = 0, delta = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
      most = over_row(most, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          p[j][i] = exp2_approximate(p[j][i] - most);
          sum += p[j][i];
        }
      }
      const float factor = 1 / row_sum(sum);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          p[j][i] *= factor;
          delta += p[j][i] * grad_scores[j][i];
        }
      }
      delta = row_sum(delta);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          grad_scores[j][i] = p[j][i] * (grad_scores[j][i] - delta);
          bias_sums[j][i] += grad_scores[j][i];
        }
      }
    }
    float grad_q[D / 8][4] = {}, grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {};
    add_to_keys<Products, D>(grad_k, grad_v, p, grad_scores, exchange, q, grad, needs_qk, needs_v);
    if (needs_qk) multiply_result<Products, D>(grad_q, grad_scores, k);
    __syncthreads();
    stage<D, stage_pitch>(staged_q, grad_q, arguments.scale);
    stage<D, stage_pitch>(staged_k, grad_k, ln2);  // Q carries d^-½·log₂e
    stage<D, stage_pitch>(staged_v, grad_v, 1);
    __syncthreads();
    const int64_t band_channel = place.n * arguments.channels + channel;
    if (needs_qk) {
      store_tokens<D, stage_pitch>(staged_q, arguments.grad_q, nullptr, windows, positions, place, 0, channel, 0, size);
      store_tokens<D, stage_pitch>(staged_k, arguments.grad_k, arguments.key_band, windows, positions, place, 0,
                                   channel, band_channel, size);
    }
    if (needs_v) {
      store_tokens<D, stage_pitch>(staged_v, arguments.grad_v, arguments.value_band, windows, positions, place, 0,
                                   channel, band_channel, size);
    }
    __syncthreads();
  }
  if (arguments.table_sums == nullptr) return;
  float* const sums = table;  // the table itself is in registers
  for (int row = threadIdx.x; row < table_rows; row += attention_threads) sums[row] = 0;
  auto* const grad_bias = reinterpret_cast<float*>(memory);
  write_scores<chunk + 1>(grad_bias, bias_sums, write_floats);
  __syncthreads();
  add_to_table(sums, grad_bias, windows, 0, 0);
  float* const out = arguments.table_sums + (static_cast<int64_t>(run) * arguments.heads + head) * table_rows;
  for (int row = threadIdx.x; row < table_rows; row += attention_threads) out[row] = sums[row];
}

// The same for windows of several chunks. Each query's softmax and rowsum(P ∘ dP) come first and stay in
// shared memory; then ∂Q goes over the chunks of queries, ∂K and ∂V over those of keys.
template <typename Products, int D>
__global__ void __launch_bounds__(attention_threads)
    large_window_attention_backward_kernel(const AttentionBackwardArguments<typename Products::Element> arguments) {
  using Element = typename Products::Element;
  using Tiles = AttentionTiles<Products, D>;
  constexpr float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
  constexpr int stage_pitch = Tiles::stage_pitch;
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const q = reinterpret_cast<Element*>(memory);
  Element *const k = q + Tiles::tile, *const v = k + Tiles::tile, *const grad = v + Tiles::tile;
  auto* const exchange = reinterpret_cast<Element*>(memory + 4 * Tiles::tile_bytes);
  auto* const staged = reinterpret_cast<float*>(memory);
  auto* const table = reinterpret_cast<float*>(memory + Tiles::backward_bytes);
  const Windows& windows = arguments.windows;
  const int head = blockIdx.x % arguments.heads, size = arguments.head_size;
  const int table_rows = windows.table_rows();
  float* const sums = table + table_rows;
  float* const largest = sums + table_rows;                 // of every query's scores
  float* const factors = largest + windows.chunks * chunk;  // 1 / the sum of their exponentials
  float* const deltas = factors + windows.chunks * chunk;   // rowsum(P ∘ dP)
  auto* const positions = reinterpret_cast<Position*>(deltas + windows.chunks * chunk);
  const int run = blockIdx.x / arguments.heads;
  const int64_t channel = static_cast<int64_t>(head) * size;
  const int first = run * arguments.run, last = min(arguments.count, first + arguments.run);
  const bool needs_qk = arguments.grad_q.data != nullptr, needs_v = arguments.grad_v.data != nullptr;
  const bool needs_table = arguments.table_sums != nullptr;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;  // and row + 8

  load_table(table, arguments.bias_table, windows, arguments.heads, head);
  locate_tokens(positions, windows);
  for (int i = threadIdx.x; i < table_rows; i += attention_threads) sums[i] = 0;
  __syncthreads();
  for (int index = first; index < last; ++index) {
    const Place place(windows, index);
    const int64_t band_channel = place.n * arguments.channels + channel;
    const auto load_queries = [&](int first) {
      load_tokens<Products, D, true>(q, arguments.q, windows, positions, place, first, channel, size,
                                     arguments.scale * log2e);
      load_tokens<Products, D, true>(grad, arguments.grad, windows, positions, place, first, channel, size, 1);
    };
    const auto load_keys = [&](int first) {
      load_tokens<Products, D, false>(k, arguments.k, windows, positions, place, first, channel, size, 1);
      load_tokens<Products, D, false>(v, arguments.v, windows, positions, place, first, channel, size, 1);
    };
    const auto multiply = [&](float (&scores)[8][4], float (&grad_p)[8][4], int first_query, int first_key) {
      float bias[8][4];
      load_bias(bias, table, windows, first_query, first_key);
      multiply_rows<Products, D>(scores, q, k, bias);
      const float zero[8][4] = {};
      multiply_rows<Products, D>(grad_p, grad, v, zero);
    };
    const auto differentiate = [&](float (&p)[8][4], float (&grad_scores)[8][4], int first_query, int first_key) {
      multiply(p, grad_scores, first_query, first_key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = first_query + row + i / 2 * 8;
        const float most = largest[query], factor = factors[query], delta = deltas[query];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          p[j][i] = exp2_approximate(p[j][i] - most) * factor;
          grad_scores[j][i] = p[j][i] * (grad_scores[j][i] - delta);
        }
      }
    };

    for (int first_query = 0; first_query < windows.tokens; first_query += chunk) {
      load_queries(first_query);
      float most[2] = {-INFINITY, -INFINITY}, sum[2] = {}, delta[2] = {};
      for (int first_key = 0; first_key < windows.tokens; first_key += chunk) {
        load_keys(first_key);
        __syncthreads();
        float p[8][4], grad_p[8][4];
        multiply(p, grad_p, first_query, first_key);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float more = most[r];
#pragma unroll
          for (int j = 0; j < 8; ++j) more = fmaxf(more, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
          more = over_row(more, [](float a, float b) { return fmaxf(a, b); });
          const float shrink = exp2_approximate(most[r] - more);
          most[r] = more;
          sum[r] *= shrink;
          delta[r] *= shrink;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
              const float exponential = exp2_approximate(p[j][i] - more);
              sum[r] += exponential;
              delta[r] += exponential * grad_p[j][i];
            }
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = 1 / row_sum(sum[r]), rows_delta = row_sum(delta[r]) * factor;
        if (threadIdx.x % 4 == 0) {
          largest[first_query + row + 8 * r] = most[r];
          factors[first_query + row + 8 * r] = factor;
          deltas[first_query + row + 8 * r] = rows_delta;
        }
      }
      __syncthreads();
      if (!needs_qk && !needs_table) continue;
      float grad_q[D / 8][4] = {};
      for (int first_key = 0; first_key < windows.tokens; first_key += chunk) {
        load_keys(first_key);
        __syncthreads();
        float p[8][4], grad_scores[8][4];
        differentiate(p, grad_scores, first_query, first_key);
        if (needs_qk) multiply_result<Products, D>(grad_q, grad_scores, k);
        if (needs_table) {
          auto* const grad_bias = reinterpret_cast<float*>(exchange);
          write_scores<chunk + 1>(grad_bias, grad_scores, write_floats);
          __syncthreads();
          add_to_table(sums, grad_bias, windows, first_query, first_key);
        }
        __syncthreads();
      }
      if (needs_qk) {
        stage<D, stage_pitch>(staged, grad_q, arguments.scale);
        __syncthreads();
        store_tokens<D, stage_pitch>(staged, arguments.grad_q, nullptr, windows, positions, place, first_query, channel,
                                     0, size);
        __syncthreads();
      }
    }
    if (!needs_qk && !needs_v) continue;
    for (int first_key = 0; first_key < windows.tokens; first_key += chunk) {
      load_keys(first_key);
      float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {};
      for (int first_query = 0; first_query < windows.tokens; first_query += chunk) {
        load_queries(first_query);
        __syncthreads();
        float p[8][4], grad_scores[8][4];
        differentiate(p, grad_scores, first_query, first_key);
        add_to_keys<Products, D>(grad_k, grad_v, p, grad_scores, exchange, q, grad, needs_qk, needs_v);
        __syncthreads();
      }
      if (needs_qk) {
        stage<D, stage_pitch>(staged, grad_k, ln2);
        __syncthreads();
        store_tokens<D, stage_pitch>(staged, arguments.grad_k, arguments.key_band, windows, positions, place, first_key,
                                     channel, band_channel, size);
        __syncthreads();
      }
      if (needs_v) {
        stage<D, stage_pitch>(staged, grad_v, 1);
        __syncthreads();
        store_tokens<D, stage_pitch>(staged, arguments.grad_v, arguments.value_band, windows, positions, place,
                                     first_key, channel, band_channel, size);
        __syncthreads();
      }
    }
  }
  if (!needs_table) return;
  __syncthreads();
  float* const out = arguments.table_sums + (static_cast<int64_t>(run) * arguments.heads + head) * table_rows;
  for (int i = threadIdx.x; i < table_rows; i += attention_threads) out[i] = sums[i];
}

constexpr int gather_threads = 256;

// ∂K or ∂V of the pixels in the bands: the sum over a pixel's own token and its reflections, row by row.
// Grid: tiles of places × channels of all samples, tiles fastest. A thread owns a place, if it is a pixel's own.
template <typename T>
__global__ void __launch_bounds__(gather_threads)
    gather_bands_kernel(const float* band, const AttentionMap<T> grad, const Windows windows, int64_t channels) {
  const int64_t places = windows.band_places(), tiles = (places + gather_threads - 1) / gather_threads;
  const int64_t plane = blockIdx.x / tiles;
  const int64_t place = blockIdx.x % tiles * gather_threads + threadIdx.x;
  if (place >= places) return;
  const int width = windows.padded_width(), height = windows.padded_height();
  const int64_t in_rows = static_cast<int64_t>(windows.band_rows) * width;
  const int before = windows.shift > 0 ? 2 * windows.shift + 1 : 0;
  int h, w;
  if (place < in_rows) {
    h = static_cast<int>(place / width);
    h += (h < before ? 0 : height - windows.band_rows) - windows.shift;
    w = static_cast<int>(place % width) - windows.shift;
  } else {
    h = static_cast<int>((place - in_rows) / windows.band_columns) - windows.shift;
    w = static_cast<int>((place - in_rows) % windows.band_columns);
    w += (w < before ? 0 : width - windows.band_columns) - windows.shift;
    if (windows.row_in_band(h)) return;
  }
  if (h < 0 || h >= windows.height || w < 0 || w >= windows.width) return;
  band += plane * places;
  float sum = 0;
  for (int y = 0; y < 3; ++y) {  // above the map, in it, below it
    const int of_h = y == 0 ? -h : y == 1 ? h : 2 * (windows.height - 1) - h;
    if (of_h < -windows.shift || of_h >= windows.height + windows.bottom || (y != 1 && of_h == h)) continue;
    for (int x = 0; x < 3; ++x) {
      const int of_w = x == 0 ? -w : x == 1 ? w : 2 * (windows.width - 1) - w;
      if (of_w < -windows.shift || of_w >= windows.width + windows.right || (x != 1 && of_w == w)) continue;
      sum += band[windows.band_place(of_h, of_w)];
    }
  }
  grad.data[plane / channels * grad.stride_n + plane % channels * grad.stride_c + h * grad.stride_h +
            w * grad.stride_w] = static_cast<T>(sum);
}

constexpr int table_lanes = 8;

// ∂bias_table [table rows, heads] from the runs' sums [runs, heads, table rows]. Grid: groups of 32 sums. Of
// its 8 warps each adds up every eighth run, then the first adds up what they have, in order.
template <typename T>
__global__ void __launch_bounds__(32 * table_lanes)
    sum_table_kernel(const float* table_sums, T* grad_bias_table, int64_t runs, int table_rows, int heads) {
  __shared__ float sums[table_lanes][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t count = static_cast<int64_t>(heads) * table_rows, i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (i < count) {
    for (int64_t run = warp; run < runs; run += table_lanes) sum += table_sums[run * count + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= count) return;
  for (int other = 1; other < table_lanes; ++other) sum += sums[other][lane];
  grad_bias_table[i % table_rows * heads + i / table_rows] = static_cast<T>(sum);
}

}  // namespace mitnet_fast
