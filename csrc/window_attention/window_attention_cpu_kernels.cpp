// Compiled once per instruction set. Every task is one head on one tile of whole windows, or on several
// tiles in a row where the gradient of the bias table is summed. The tile is read into planes (see
// planes_cpu.h) and padded there by reflection; from there on all windows are alike. Each is packed into
// buffers [d, w²] in the first-level cache, and what it yields takes its place in the planes: y or grad_q
// that of the queries, grad_k and grad_v that of keys and values.
//
// Vectors run along queries, so that maximum, sum and δ of a softmax need no step across lanes:
//   scores[k][q] = Σ_j K[j][k] · Q[j][q]      y[j][q] = Σ_k V[j][k] · P[k][q]
// Backward, with g the incoming gradient and P recomputed:
//   dP[k][q] = Σ_j V[j][k] · g[j][q]     δ[q] = Σ_k P[k][q] · dP[k][q]     dS = P · (dP − δ)
//   grad_q[j][q] = d^-½ Σ_k K[j][k] · dS[k][q]     grad_table[Δ] = Σ dS
//   grad_v[j][k] = Σ_q g[j][q] · P[k][q]           grad_k[j][k] = d^-½ Σ_q Q[j][q] · dS[k][q]
// the last two with P and dS transposed. Exponentials are powers of two: log2(e) is in Q and in the bias.

#include <limits>

#include "common/kernel_of_type_cpu.h"
#include "common/planes_cpu.h"
#include "common/workspace_cpu.h"
#include "window_attention/window_attention_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int key_block = many_registers ? 8 : 4;  // keys whose scores with two vectors of queries are in registers
constexpr int chunk = 8;                           // pixels of a window's row that are copied at a time
constexpr double log2_e = 1.4426950408889634074;

// 2^x for x ≤ 0 to one unit in the last place, at the least 2^-110, so that no weight becomes denormal when it
// is divided by the sum. NaN stays NaN.
ALWAYS_INLINE Vec<float> power_of_two(const Vec<float>& exponent) {
  const Vec<float> x = at::vec::clamp_min(exponent, Vec<float>(-110.f));
  // Adding 1.5·2²³ + 127 rounds x to an integer n and leaves n + 127 in the lowest bits
  const Vec<float> rounder(12582912.f + 127.f);
  const Vec<float> rounded = x + rounder;
  const Vec<float> f = x - (rounded - rounder);  // exact, in [−½, ½]
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vec<float>))));
  Bits bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits <<= 23;
  Vec<float> power;
  __builtin_memcpy(&power, &bits, sizeof(bits));
  // Of all polynomials of this degree with p(0) = 1 that of the least relative error on [−½, ½], 2·10⁻⁹
  Vec<float> p(0.00015353361446123642f);
  p = at::vec::fmadd(p, f, Vec<float>(0.0013398874569958794f));
  p = at::vec::fmadd(p, f, Vec<float>(0.009618437360772654f));
  p = at::vec::fmadd(p, f, Vec<float>(0.05550332470633013f));
  p = at::vec::fmadd(p, f, Vec<float>(0.24022647913583312f));
  p = at::vec::fmadd(p, f, Vec<float>(0.6931472028553772f));
  p = at::vec::fmadd(p, f, Vec<float>(1.f));
  return p * power;
}

ALWAYS_INLINE Vec<double> power_of_two(const Vec<double>& exponent) { return exponent.exp2(); }

// A tile's part of one axis, in pixels of the padded map from the tile's first on.
struct Span {
  int64_t windows;
  int64_t length;
  int64_t begin;  // [begin, end) is in the map, the rest is padding
  int64_t end;
  int64_t first;  // row or column of the map that lies at `begin`

  int64_t source(int64_t position) const {
    return position < begin ? 2 * begin - position : position < end ? position : 2 * (end - 1) - position;
  }
};

// One axis of the padded map, cut into tiles of `most` windows or one more. None has fewer than two, unless
// the map has: padding then lies in the same tile as what it reflects.
struct Axis {
  int64_t size;
  int64_t window_size;
  int64_t shift;
  int64_t windows;
  int64_t tiles;

  Axis(int64_t size, int64_t window_size, int64_t shift, int64_t most)
      : size(size), window_size(window_size), shift(shift), windows(divide_up(shift + size, window_size)) {
    tiles = larger(1, smaller(divide_up(windows, most), windows / 2));
  }

  int64_t longest() const { return divide_up(windows, tiles) * window_size; }

  Span span(int64_t tile) const {
    const int64_t from = tile * windows / tiles, to = (tile + 1) * windows / tiles;
    const int64_t origin = from * window_size - shift, length = (to - from) * window_size;
    const int64_t begin = larger(0, -origin);
    return {to - from, length, begin, smaller(length, size - origin), origin + begin};
  }
};

// How a window's tokens lie in packed buffers of one head.
template <typename T>
struct Tokens {
  static constexpr int64_t lanes = Vec<T>::size();
  static constexpr int64_t most_queries = 2 * lanes;  // at a time

  int64_t window_size;
  int64_t head_size;
  int64_t count;     // w²
  int64_t keys;      // a multiple of key_block
  int64_t pitch;     // from channel to channel, whole vectors
  int64_t channels;  // rows of a buffer, a multiple of the smallest block of channels

  Tokens(int64_t window_size, int64_t head_size)
      : window_size(window_size), head_size(head_size), count(window_size * window_size) {
    keys = round_up(count, key_block);
    pitch = round_up(keys, lanes);
    channels = round_up(head_size, 4);
  }

  int64_t elements() const { return channels * pitch + chunk; }  // the last row of the last channel may run over
};

// Σ_j a[j][k] · b[j][q] for key_block keys from `a` on and vectors of queries from `b` on.
template <typename T, int vectors>
ALWAYS_INLINE void products_over_channels(const T* a, const T* b, int64_t channels, int64_t pitch,
                                          Vec<T> (&sum)[key_block][vectors]) {
  UNROLLED_FOR(k, key_block) UNROLLED_FOR(v, vectors) { sum[k][v] = Vec<T>(0); }
  for (int64_t j = 0; j < channels; ++j, a += pitch, b += pitch) {
    Vec<T> query[vectors];
    UNROLLED_FOR(v, vectors) { query[v] = load_once(b + v * Vec<T>::size()); }
    UNROLLED_FOR(k, key_block) {
      const Vec<T> key(a[k]);
      UNROLLED_FOR(v, vectors) { sum[k][v] = at::vec::fmadd(key, query[v], sum[k][v]); }
    }
  }
}

// out[j][i] (+)= factor · Σ_t a[j][t] · b[t][i] for `block` channels and vectors of i.
template <typename T, int block, int vectors>
ALWAYS_INLINE void products_over_tokens(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t tokens,
                                        const Vec<T> (&factor)[vectors], bool adds, T* out, int64_t out_pitch) {
  constexpr int lanes = Vec<T>::size();
  Vec<T> sum[block][vectors];
  UNROLLED_FOR(j, block) UNROLLED_FOR(v, vectors) { sum[j][v] = Vec<T>(0); }
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<T> weight[vectors];
    UNROLLED_FOR(v, vectors) { weight[v] = load_once(b + t * b_pitch + v * lanes); }
    UNROLLED_FOR(j, block) {
      const Vec<T> value(a[j * a_pitch + t]);
      UNROLLED_FOR(v, vectors) { sum[j][v] = at::vec::fmadd(value, weight[v], sum[j][v]); }
    }
  }
  UNROLLED_FOR(j, block) UNROLLED_FOR(v, vectors) {
    T* const to = out + j * out_pitch + v * lanes;
    const Vec<T> start = adds ? Vec<T>::loadu(to) : Vec<T>(0);
    at::vec::fmadd(sum[j][v], factor[v], start).store(to);
  }
}

template <typename T, int vectors>
void products_over_tokens(int64_t channels, const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t tokens,
                          const Vec<T> (&factor)[vectors], bool adds, T* out, int64_t out_pitch) {
  int64_t j = 0;
  if constexpr (many_registers) {
    for (; j + 12 <= channels; j += 12)
      products_over_tokens<T, 12>(a + j * a_pitch, a_pitch, b, b_pitch, tokens, factor, adds, out + j * out_pitch,
                                  out_pitch);
    for (; j + 8 <= channels; j += 8)
      products_over_tokens<T, 8>(a + j * a_pitch, a_pitch, b, b_pitch, tokens, factor, adds, out + j * out_pitch,
                                 out_pitch);
  }
  for (; j < channels; j += 4)
    products_over_tokens<T, 4>(a + j * a_pitch, a_pitch, b, b_pitch, tokens, factor, adds, out + j * out_pitch,
                               out_pitch);
}

// scores[k][q] = 2^(K·Q + bias − max over k), for vectors of queries; returns the inverse of their sums over k.
template <typename T, int vectors>
ALWAYS_INLINE void exponentials(const Tokens<T>& tokens, const T* q, const T* k, const T* bias, T* scores,
                                Vec<T> (&inverse)[vectors]) {
  constexpr int lanes = Vec<T>::size(), width = vectors * lanes;
  Vec<T> highest[vectors], total[vectors];
  UNROLLED_FOR(v, vectors) { highest[v] = Vec<T>(-std::numeric_limits<T>::infinity()); }
  UNROLLED_FOR(v, vectors) { total[v] = Vec<T>(0); }
  for (int64_t first = 0; first < tokens.keys; first += key_block) {
    Vec<T> sum[key_block][vectors];
    products_over_channels<T>(k + first, q, tokens.head_size, tokens.pitch, sum);
    UNROLLED_FOR(i, key_block) UNROLLED_FOR(v, vectors) {
      const Vec<T> score = sum[i][v] + Vec<T>::loadu(bias + (first + i) * tokens.pitch + v * lanes);
      highest[v] = at::vec::clamp_min(score, highest[v]);
      score.store(scores + (first + i) * width + v * lanes);
    }
  }
  for (int64_t i = 0; i < tokens.keys; ++i) {
    UNROLLED_FOR(v, vectors) {
      T* const score = scores + i * width + v * lanes;
      const Vec<T> power = power_of_two(Vec<T>::loadu(score) - highest[v]);
      total[v] = total[v] + power;
      power.store(score);
    }
  }
  UNROLLED_FOR(v, vectors) { inverse[v] = Vec<T>(1) / total[v]; }
}

enum class Padding { zero, reflection };

// How maps are cut into tiles, and one head of a tile into windows.
template <typename S>
struct HeadTiles {
  using T = Arithmetic<S>;

  const WindowAttentionShape& shape;
  const int planes_per_channel;
  const Tokens<T> tokens{shape.window_size, shape.head_size()};
  const int64_t bytes_of_column =  // of windows, two high
      planes_per_channel * shape.head_size() * 2 * shape.window_size * shape.window_size * sizeof(T);
  const Axis rows{shape.height, shape.window_size, shape.shift, 2};
  const Axis columns{shape.width, shape.window_size, shape.shift,
                     larger(2, smaller(divide_up(128, shape.window_size), cache / 2 / bytes_of_column))};
  const int64_t pitch = columns.longest();
  const int64_t stride = (divide_up(rows.longest() * pitch + chunk, Planes::line) | 1) * Planes::line;
  const int64_t tiles = shape.batch * rows.tiles * columns.tiles;
  const int64_t bias_elements = tokens.keys * tokens.pitch;

  struct Place {
    int64_t sample;
    Span rows;
    Span columns;
  };

  Place place(int64_t tile) const {
    return {tile / (rows.tiles * columns.tiles), rows.span(tile / columns.tiles % rows.tiles),
            columns.span(tile % columns.tiles)};
  }

  T* take_planes(Arena& arena) const { return arena.take<T>(shape.head_size() * stride); }

  // The bias of every head as [keys, pitch], times log2(e). Keys that do not exist have weight 0.
  void expand_bias(const void* table, T* bias, int threads) const {
    const int64_t w = shape.window_size, heads = shape.heads;
    const S* from = static_cast<const S*>(table);
    parallel_tasks(heads, threads, [&](int64_t head, int) {
      T* to = bias + head * bias_elements;
      for (int64_t k = 0; k < tokens.keys; ++k, to += tokens.pitch) {
        for (int64_t q = 0; q < tokens.pitch; ++q)
          to[q] = k < tokens.count ? T(0) : -std::numeric_limits<T>::infinity();
        if (k >= tokens.count) continue;
        for (int64_t q = 0; q < tokens.count; ++q)
          to[q] = static_cast<T>(from[table_row(w, q, k) * heads + head]) * static_cast<T>(log2_e);
      }
    });
  }

  static int64_t table_row(int64_t w, int64_t q, int64_t k) {
    return (q / w - k / w + w - 1) * (2 * w - 1) + q % w - k % w + w - 1;
  }

  void load(const ConstMapView& map, int64_t channel, const Place& place, Padding padding, T* planes) const {
    const Span &r = place.rows, &c = place.columns;
    copy_to_planes<S>(map, place.sample, channel, shape.head_size(), r.first, r.end - r.begin, c.first, c.end - c.begin,
                      planes + r.begin * pitch + c.begin, stride, pitch);
    for (int64_t j = 0; j < shape.head_size(); ++j, planes += stride) {
      for (int64_t i = r.begin; i < r.end; ++i) {
        T* const row = planes + i * pitch;
        for (int64_t x = 0; x < c.begin; ++x) row[x] = padding == Padding::zero ? T(0) : row[c.source(x)];
        for (int64_t x = c.end; x < c.length; ++x) row[x] = padding == Padding::zero ? T(0) : row[c.source(x)];
      }
      const auto pad_row = [&](int64_t i) {
        if (padding == Padding::zero) {
          __builtin_memset(planes + i * pitch, 0, c.length * sizeof(T));
        } else {
          __builtin_memcpy(planes + i * pitch, planes + r.source(i) * pitch, c.length * sizeof(T));
        }
      };
      for (int64_t i = 0; i < r.begin; ++i) pad_row(i);
      for (int64_t i = r.end; i < r.length; ++i) pad_row(i);
    }
  }

  // The adjoint of padding by reflection: adds the padding to what it reflects.
  void fold(const Place& place, T* planes) const {
    const Span &r = place.rows, &c = place.columns;
    for (int64_t j = 0; j < shape.head_size(); ++j, planes += stride) {
      const auto fold_row = [&](int64_t i) {
        T* const to = planes + r.source(i) * pitch;
        for (int64_t x = 0; x < c.length; ++x) to[x] += planes[i * pitch + x];
      };
      for (int64_t i = 0; i < r.begin; ++i) fold_row(i);
      for (int64_t i = r.end; i < r.length; ++i) fold_row(i);
      for (int64_t i = r.begin; i < r.end; ++i) {
        T* const row = planes + i * pitch;
        for (int64_t x = 0; x < c.begin; ++x) row[c.source(x)] += row[x];
        for (int64_t x = c.end; x < c.length; ++x) row[c.source(x)] += row[x];
      }
    }
  }

  void store(const T* planes, const Place& place, const MapView& map, int64_t channel) const {
    const Span &r = place.rows, &c = place.columns;
    copy_from_planes<S>(planes + r.begin * pitch + c.begin, stride, pitch, map, place.sample, channel,
                        shape.head_size(), r.first, r.end - r.begin, c.first, c.end - c.begin);
  }

  // function(offset of the window in a plane, first live query, end of live queries) for every window of a tile
  template <typename Function>
  void for_each_window(const Place& place, Function function) const {
    const int64_t w = shape.window_size;
    for (int64_t i = 0; i < place.rows.windows; ++i) {
      const int64_t live = larger(0, place.rows.begin - i * w), end = smaller(w, place.rows.end - i * w);
      for (int64_t j = 0; j < place.columns.windows; ++j) function(i * w * pitch + j * w, live * w, end * w);
    }
  }

  // Calls function(first query, vectors as a constant) for blocks of queries, leaving out those without a live one.
  template <typename Function>
  void for_each_block(int64_t live, int64_t end, Function function) const {
    constexpr int64_t lanes = Tokens<T>::lanes;
    for (int64_t q = live / lanes * lanes; q < end;) {
      if (end - q > lanes) {
        function(q, std::integral_constant<int, 2>());
        q += 2 * lanes;
      } else {
        function(q, std::integral_constant<int, 1>());
        q += lanes;
      }
    }
  }

  // One window of all channels: packed[j][i·w + x] = factor · plane[j][i][x], zeros beyond the last token.
  void pack(const T* planes, T factor, T* packed) const {
    const int64_t w = shape.window_size;
    for (int64_t j = 0; j < shape.head_size(); ++j) {
      T* const to = packed + j * tokens.pitch;
      for (int64_t i = 0; i < w; ++i)
        for (int64_t x = 0; x < w; x += chunk) scale_chunk(planes + j * stride + i * pitch + x, factor, to + i * w + x);
      for (int64_t i = tokens.count; i < tokens.pitch; ++i) to[i] = T(0);
    }
  }

  void unpack(const T* packed, T factor, T* planes) const {
    const int64_t w = shape.window_size;
    for (int64_t j = 0; j < shape.head_size(); ++j)
      for (int64_t i = 0; i < w; ++i) {
        const T* const from = packed + j * tokens.pitch + i * w;
        T* const to = planes + j * stride + i * pitch;
        int64_t x = 0;
        for (; x + chunk <= w; x += chunk) scale_chunk(from + x, factor, to + x);
        for (; x < w; ++x) to[x] = factor * from[x];
      }
  }

  static ALWAYS_INLINE void scale_chunk(const T* from, T factor, T* to) {
    typedef T Chunk __attribute__((vector_size(chunk * sizeof(T))));
    Chunk values;
    __builtin_memcpy(&values, from, sizeof(values));
    values *= factor;
    __builtin_memcpy(to, &values, sizeof(values));
  }

  void clear_unused_channels(T* packed) const {
    fill_zero(packed + shape.head_size() * tokens.pitch, (tokens.channels - shape.head_size()) * tokens.pitch);
  }

  T scale() const { return static_cast<T>(1 / __builtin_sqrt(static_cast<double>(shape.head_size()))); }
  T scale_of_exponents() const {
    return static_cast<T>(log2_e / __builtin_sqrt(static_cast<double>(shape.head_size())));
  }
};

template <typename S>
struct Forward {
  using T = Arithmetic<S>;

  const WindowAttentionForward& call;
  const WindowAttentionShape& shape = call.shape;
  const HeadTiles<S> work{shape, 3};
  const int64_t tasks = work.tiles * shape.heads;

  struct Scratch {
    T *q, *k, *v;                       // planes of a tile
    T *window_q, *window_k, *window_v;  // one window
    T* scores;
    T* y;
  };

  Scratch scratch(Arena& arena) const {
    const Tokens<T>& tokens = work.tokens;
    return {work.take_planes(arena),
            work.take_planes(arena),
            work.take_planes(arena),
            arena.take<T>(tokens.elements()),
            arena.take<T>(tokens.elements()),
            arena.take<T>(tokens.elements()),
            arena.take<T>(tokens.keys * Tokens<T>::most_queries),
            arena.take<T>(tokens.elements())};
  }

  T* bias(Arena& arena) const { return arena.take<T>(tasks ? shape.heads * work.bias_elements : 0); }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    bias(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    if (!tasks) return;
    Arena arena(workspace);
    T* const biases = bias(arena);
    work.expand_bias(call.bias_table, biases, threads);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const int64_t head = task % shape.heads, channel = head * shape.head_size();
      const auto place = work.place(task / shape.heads);
      work.load(call.qk, channel, place, Padding::zero, at.q);
      work.load(call.qk, shape.channels + channel, place, Padding::reflection, at.k);
      work.load(call.v, channel, place, Padding::reflection, at.v);
      work.clear_unused_channels(at.window_v);
      work.for_each_window(place, [&](int64_t window, int64_t live, int64_t end) {
        work.pack(at.q + window, work.scale_of_exponents(), at.window_q);
        work.pack(at.k + window, T(1), at.window_k);
        work.pack(at.v + window, T(1), at.window_v);
        work.for_each_block(live, end, [&](int64_t query, auto vectors) {
          attend<vectors>(query, biases + head * work.bias_elements, at);
        });
        work.unpack(at.y, T(1), at.q + window);
      });
      work.store(at.q, place, call.y, channel);
    });
  }

  template <int vectors>
  void attend(int64_t query, const T* bias, const Scratch& at) const {
    const Tokens<T>& tokens = work.tokens;
    Vec<T> inverse[vectors];
    exponentials(tokens, at.window_q + query, at.window_k, bias + query, at.scores, inverse);
    products_over_tokens(tokens.channels, at.window_v, tokens.pitch, at.scores, vectors * Vec<T>::size(), tokens.keys,
                         inverse, false, at.y + query, tokens.pitch);
  }
};

template <typename S>
struct Backward {
  using T = Arithmetic<S>;

  const WindowAttentionBackward& call;
  const WindowAttentionShape& shape = call.shape;
  const HeadTiles<S> work{shape, 4};
  const bool grads_of_scores = call.grad_qk.data || call.grad_bias_table;
  // A task is a group of consecutive tiles of one head, with sums of its own where the table needs them.
  const int64_t groups = call.grad_bias_table ? smaller(work.tiles, enough_tasks) : work.tiles;
  const int64_t tasks = groups * shape.heads;

  int64_t first_tile(int64_t group) const { return group * work.tiles / groups; }

  struct Scratch {
    T *q, *k, *v, *grad;                              // planes of a tile
    T *window_q, *window_k, *window_v, *window_grad;  // one window
    T *window_grad_q, *window_grad_k, *window_grad_v;
    T *weights, *grad_scores;                // [keys, queries of a block]
    T *turned_weights, *turned_grad_scores;  // [queries of a block, pitch]
    T* bias_sums;                            // of a group, as the bias
  };

  Scratch scratch(Arena& arena) const {
    const Tokens<T>& tokens = work.tokens;
    Scratch at;
    for (T** planes : {&at.q, &at.k, &at.v, &at.grad}) *planes = work.take_planes(arena);
    for (T** packed : {&at.window_q, &at.window_k, &at.window_v, &at.window_grad, &at.window_grad_q, &at.window_grad_k,
                       &at.window_grad_v})
      *packed = arena.take<T>(tokens.elements());
    for (T** block : {&at.weights, &at.grad_scores, &at.turned_weights, &at.turned_grad_scores})
      *block = arena.take<T>(tokens.pitch * Tokens<T>::most_queries);
    at.bias_sums = arena.take<T>(call.grad_bias_table ? work.bias_elements : 0);
    return at;
  }

  T* bias(Arena& arena) const { return arena.take<T>(tasks ? shape.heads * work.bias_elements : 0); }

  // Sums of all tasks for the rows of the table.
  double* table_sums(Arena& arena) const {
    return arena.take<double>(call.grad_bias_table ? tasks * shape.table_rows() : 0);
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    bias(arena);
    table_sums(arena);
    return arena.bytes() + scratch_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    T* const biases = bias(arena);
    double* const sums = table_sums(arena);
    if (tasks) work.expand_bias(call.bias_table, biases, threads);
    for_each_task(*this, arena.rest(), threads, [&](int64_t task, const Scratch& at) {
      const int64_t head = task % shape.heads, group = task / shape.heads;
      for (T* packed : {at.window_q, at.window_k, at.window_v, at.window_grad}) work.clear_unused_channels(packed);
      if (call.grad_bias_table) fill_zero(at.bias_sums, work.bias_elements);
      for (int64_t tile = first_tile(group); tile < first_tile(group + 1); ++tile)
        backward_tile(work.place(tile), head, biases + head * work.bias_elements, at);
      if (call.grad_bias_table) sum_by_offset(at.bias_sums, sums + task * shape.table_rows());
    });
    if (call.grad_bias_table) add_up(sums);
  }

  void backward_tile(const typename HeadTiles<S>::Place& place, int64_t head, const T* bias, const Scratch& at) const {
    const int64_t channel = head * shape.head_size();
    const T ln_2 = static_cast<T>(1 / log2_e);  // Q carries log2(e)
    work.load(call.qk, channel, place, Padding::zero, at.q);
    work.load(call.qk, shape.channels + channel, place, Padding::reflection, at.k);
    work.load(call.v, channel, place, Padding::reflection, at.v);
    work.load(call.grad, channel, place, Padding::zero, at.grad);
    work.for_each_window(place, [&](int64_t window, int64_t live, int64_t end) {
      work.pack(at.q + window, work.scale_of_exponents(), at.window_q);
      work.pack(at.k + window, T(1), at.window_k);
      work.pack(at.v + window, T(1), at.window_v);
      work.pack(at.grad + window, T(1), at.window_grad);
      bool adds = false;
      work.for_each_block(live, end, [&](int64_t query, auto vectors) {
        backward_block<vectors>(query, bias, adds, at);
        adds = true;
      });
      if (call.grad_qk.data) {
        work.unpack(at.window_grad_q, work.scale(), at.q + window);
        work.unpack(at.window_grad_k, ln_2, at.k + window);
      }
      if (call.grad_v.data) work.unpack(at.window_grad_v, T(1), at.v + window);
    });
    if (call.grad_qk.data) {
      work.fold(place, at.k);
      work.store(at.q, place, call.grad_qk, channel);
      work.store(at.k, place, call.grad_qk, shape.channels + channel);
    }
    if (call.grad_v.data) {
      work.fold(place, at.v);
      work.store(at.v, place, call.grad_v, channel);
    }
  }

  template <int vectors>
  void backward_block(int64_t query, const T* bias, bool adds, const Scratch& at) const {
    constexpr int lanes = Vec<T>::size(), width = vectors * lanes;
    const Tokens<T>& tokens = work.tokens;
    const T* const grad = at.window_grad + query;
    Vec<T> inverse[vectors];
    exponentials(tokens, at.window_q + query, at.window_k, bias + query, at.weights, inverse);
    if (grads_of_scores) {
      Vec<T> delta[vectors];
      UNROLLED_FOR(v, vectors) { delta[v] = Vec<T>(0); }
      for (int64_t first = 0; first < tokens.keys; first += key_block) {
        Vec<T> sum[key_block][vectors];
        products_over_channels<T>(at.window_v + first, grad, shape.head_size(), tokens.pitch, sum);
        UNROLLED_FOR(i, key_block) UNROLLED_FOR(v, vectors) {
          const int64_t place = (first + i) * width + v * lanes;
          delta[v] = at::vec::fmadd(Vec<T>::loadu(at.weights + place), sum[i][v], delta[v]);
          sum[i][v].store(at.grad_scores + place);
        }
      }
      UNROLLED_FOR(v, vectors) { delta[v] = delta[v] * inverse[v]; }
      for (int64_t i = 0; i < tokens.keys; ++i) {
        UNROLLED_FOR(v, vectors) {
          const int64_t place = i * width + v * lanes;
          const Vec<T> weight = Vec<T>::loadu(at.weights + place) * inverse[v];
          const Vec<T> grad_score = weight * (Vec<T>::loadu(at.grad_scores + place) - delta[v]);
          weight.store(at.weights + place);
          grad_score.store(at.grad_scores + place);
          if (call.grad_bias_table) {
            T* const sum = at.bias_sums + i * tokens.pitch + query + v * lanes;
            (Vec<T>::loadu(sum) + grad_score).store(sum);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < tokens.keys; ++i) {
        UNROLLED_FOR(v, vectors) {
          T* const weight = at.weights + i * width + v * lanes;
          (Vec<T>::loadu(weight) * inverse[v]).store(weight);
        }
      }
    }
    // Transposed before anything is computed from them: vectors on their way to memory are slow to read back
    if (call.grad_v.data) transpose(at.weights, width, at.turned_weights, tokens.pitch, tokens.keys, width);
    if (call.grad_qk.data) {
      transpose(at.grad_scores, width, at.turned_grad_scores, tokens.pitch, tokens.keys, width);
      Vec<T> one[vectors];
      UNROLLED_FOR(v, vectors) { one[v] = Vec<T>(1); }
      products_over_tokens(tokens.channels, at.window_k, tokens.pitch, at.grad_scores, width, tokens.keys, one, false,
                           at.window_grad_q + query, tokens.pitch);
    }
    if (call.grad_v.data) add_over_queries<width>(grad, at.turned_weights, adds, at.window_grad_v);
    if (call.grad_qk.data) add_over_queries<width>(at.window_q + query, at.turned_grad_scores, adds, at.window_grad_k);
  }

  // out[j][k] (+)= Σ_q a[j][q] · b[q][k] over a block of `width` queries.
  template <int width>
  void add_over_queries(const T* a, const T* b, bool adds, T* out) const {
    constexpr int lanes = Vec<T>::size();
    const Tokens<T>& tokens = work.tokens;
    int64_t k = 0;
    const auto block = [&](auto vectors) {
      Vec<T> one[vectors];
      UNROLLED_FOR(v, vectors) { one[v] = Vec<T>(1); }
      products_over_tokens(tokens.channels, a, tokens.pitch, b + k, tokens.pitch, width, one, adds, out + k,
                           tokens.pitch);
      k += vectors * lanes;
    };
    while (k + 2 * lanes <= tokens.pitch) block(std::integral_constant<int, 2>());
    while (k < tokens.pitch) block(std::integral_constant<int, 1>());
  }

  void sum_by_offset(const T* bias_sums, double* sums) const {
    const Tokens<T>& tokens = work.tokens;
    for (int64_t row = 0; row < shape.table_rows(); ++row) sums[row] = 0;
    for (int64_t k = 0; k < tokens.count; ++k)
      for (int64_t q = 0; q < tokens.count; ++q)
        sums[HeadTiles<S>::table_row(shape.window_size, q, k)] += bias_sums[k * tokens.pitch + q];
  }

  // The second stage: groups are added in their order.
  void add_up(const double* sums) const {
    for (int64_t row = 0; row < shape.table_rows(); ++row) {
      for (int64_t head = 0; head < shape.heads; ++head) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group)
          sum += sums[(group * shape.heads + head) * shape.table_rows() + row];
        static_cast<S*>(call.grad_bias_table)[row * shape.heads + head] = static_cast<S>(sum);
      }
    }
  }
};

}  // namespace

extern const WindowAttentionCpuKernels window_attention_kernels;
const WindowAttentionCpuKernels window_attention_kernels = {
    {&workspace_bytes<Forward, WindowAttentionForward>, &launch<Forward, WindowAttentionForward>},
    {&workspace_bytes<Backward, WindowAttentionBackward>, &launch<Backward, WindowAttentionBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
