// Compiled once per instruction set. Both 3×3 convolutions and their gradients are Winograd's, with vectors along
// tiles (see winograd_planes_cpu.h). With g the incoming gradient and z what the second LeakyReLU gets, the backward
// computes h again, unless it is given, and
//   grad_z = g ⊙ LeakyReLU'(z)                    grad_weight2(tap) = Σ_pixels grad_z·h(p + tap)ᵀ
//   grad_h = LeakyReLU'(h) ⊙ weight2ᵀ·grad_z      grad_weight1(tap) = Σ_pixels grad_h·[x, joined](p + tap)ᵀ
//   grad_[x, joined] = weight1ᵀ·grad_h + identity_scale·identity_weightᵀ·g
// Whether z is positive shows in y, which is then more than the shortcut, computed again to the same bits; a z that y's
// rounding lost beside the shortcut counts as 0. Only where y is rounded to a narrower type than the shortcut, z is
// computed again too.
//
// Of tall maps a task takes a band of rows and goes down it: a few rows of everything lie in second-level cache, each
// stage as far ahead of the next as that reads beyond its own rows. Bands are not made smaller for more threads, so one
// image of 256 rows occupies four. Of short maps a task takes whole samples, or, where threads would be left without,
// strips of some samples in each stage, and panels of channels.

#include "common/winograd_planes_cpu.h"
#include "feature_mixing/feature_mixing_cpu.h"
#include "feature_mixing/tiles_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int taps = winograd_side * winograd_side;
constexpr int64_t band_rows = 32;                // of tiles, at least; maps with fewer than two bands are short
constexpr int64_t fewest_rows = 4;               // of tiles, that a band goes down at a time
constexpr int64_t fewest_vectors = 4;            // of a strip: every strip reads all filters
constexpr int64_t fewest_summed = 24;            // of one whose products are summed, at the end over lanes
constexpr int64_t identity_vectors = 8;          // of the same, where a vector is that of four pixels
constexpr int64_t panel_rows = 2 * filter_rows;  // whole blocks of products and of sums
constexpr int64_t most_bytes = 1 << 23;          // of samples in memory at a time, and of sums

// A band of tile rows of some samples, and the parts of the batch that these belong to.
struct Band {
  int64_t first_sample, samples, first_row, last_row;
  int64_t first_part, parts;
};

// What forward and backward share: how the batch is cut, the packed weights, the loading of the inputs.
template <typename S>
struct Residual {
  using T = Arithmetic<S>;
  static constexpr int64_t vector_bytes = Vec<T>::size() * sizeof(T);

  const ResidualConvShape& shape;
  const ConstMapView &x, &joined;
  const ResidualConvWeights& weights;
  const int64_t plane_channels;  // of all maps that lie in memory
  const int64_t rows_beyond;     // that lie in memory beside those that the last stage has done
  const bool computes_h, computes_z;
  const int64_t depth = shape.channels + shape.joined_channels, out = shape.out_channels;
  const int64_t out_pitch = channel_pitch<T>(out);
  const int64_t tile_rows = divide_up(shape.height, winograd_outputs);
  const int64_t row_bytes = (divide_up(shape.width, winograd_outputs) + 1) * phases * plane_channels * sizeof(T);
  const bool is_tall = tile_rows >= 2 * band_rows;
  const int64_t bands_of_sample = is_tall ? tile_rows / band_rows : 1;
  const int64_t bands = shape.batch * bands_of_sample;
  const int64_t step =
      is_tall ? smaller(band_rows, larger(fewest_rows, cache / row_bytes - rows_beyond - 3)) : tile_rows;
  const int64_t most_vectors = larger(fewest_vectors, cache / 2 / (winograd_points * (depth + out) * vector_bytes));
  const T slope = static_cast<T>(shape.negative_slope), scale = static_cast<T>(shape.identity_scale);

  TilePlaces places(int64_t samples, int64_t first_row) const {
    return {shape.height, shape.width, samples, first_row, step + (is_tall ? rows_beyond : 0)};
  }

  struct Packed {
    Filters<T> filters1, filters2, identity;
    T *bias1, *bias2, *identity_bias;
  };

  Packed pack(Arena& arena) const {
    return {Filters<T>::take(arena, winograd_points, computes_h ? out : 0, depth),
            Filters<T>::take(arena, winograd_points, computes_z ? out : 0, out),
            Filters<T>::take(arena, 1, out, depth),
            arena.take<T>(out_pitch),
            arena.take<T>(out_pitch),
            arena.take<T>(out_pitch)};
  }

  void fill(const Packed& packed, int threads) const {
    packed.filters1.fill(static_cast<const S*>(weights.weight1), depth * taps, taps, false, threads);
    packed.filters2.fill(static_cast<const S*>(weights.weight2), out * taps, taps, false, threads);
    packed.identity.fill_scaled(static_cast<const S*>(weights.identity_weight), depth, 1, scale, threads);
    fill_vector<S>(weights.bias1, out, packed.bias1);
    fill_vector<S>(weights.bias2, out, packed.bias2);
    fill_vector<S>(weights.identity_bias, out, packed.identity_bias);
    for (int64_t i = 0; i < out; ++i) packed.identity_bias[i] *= scale;
  }

  // Parts of so many bands, one after the other in each, of which a power of two lets threads have as many each.
  int64_t parts_of_bands(int64_t most) const {
    int64_t parts = 1;
    while (2 * parts <= smaller(most, bands)) parts *= 2;
    return parts;
  }

  // A kernel has `parts` and needs memory(arena, samples) for a band and scratch(arena) for a thread that works on it.
  template <typename Kernel>
  int64_t working_bytes(const Kernel& kernel, int threads) const {
    Arena memory(nullptr), scratch(nullptr);
    kernel.memory(memory, samples_at_once(kernel, threads));
    kernel.scratch(scratch);
    return smaller(threads, has_own_band(kernel, threads) ? kernel.parts : 1) * memory.bytes() +
           threads * scratch.bytes();
  }

  // Whether every thread works on a band of its own.
  template <typename Kernel>
  bool has_own_band(const Kernel& kernel, int threads) const {
    return is_tall || kernel.parts % threads == 0 || kernel.parts >= 4 * threads;
  }

  template <typename Kernel>
  int64_t samples_at_once(const Kernel& kernel, int threads) const {
    const int64_t fitting = larger(1, most_bytes / ((tile_rows + 3) * row_bytes));
    return has_own_band(kernel, threads) ? 1 : larger(1, smaller(fitting, shape.batch));
  }

  // Calls function(band, memory, where the scratch lies, threads that may work on it) for all bands.
  template <typename Kernel, typename Function>
  void for_each_band(const Kernel& kernel, char* workspace, int threads, Function function) const {
    const int64_t samples = samples_at_once(kernel, threads), parts = kernel.parts;
    if (has_own_band(kernel, threads)) {
      Arena all(nullptr);
      kernel.memory(all, samples);
      kernel.scratch(all);
      parallel_tasks(parts, threads, [&](int64_t part, int thread) {
        Arena arena(workspace + thread * all.bytes());
        const auto memory = kernel.memory(arena, samples);
        for (int64_t band = part * bands / parts; band < (part + 1) * bands / parts; ++band) {
          const int64_t index = band % bands_of_sample;
          function(Band{band / bands_of_sample, 1, index * tile_rows / bands_of_sample,
                        (index + 1) * tile_rows / bands_of_sample, part, 1},
                   memory, arena.rest(), 1);
        }
      });
    } else {
      Arena arena(workspace);
      const auto memory = kernel.memory(arena, samples);
      for (int64_t sample = 0; sample < shape.batch; sample += samples) {
        const int64_t last = smaller(shape.batch, sample + samples), first_part = part_of(sample, parts);
        function(Band{sample, last - sample, 0, tile_rows, first_part, part_of(last - 1, parts) + 1 - first_part},
                 memory, arena.rest(), threads);
      }
    }
  }

  // Of a short map.
  int64_t part_of(int64_t sample, int64_t parts) const { return ((sample + 1) * parts - 1) / shape.batch; }

  // Calls function(task, first row, last row, scratch) for every task and for panels of rows, more of these where
  // there are few tasks.
  template <typename Kernel, typename Function>
  void for_each_panel(const Kernel& kernel, char* scratches, int64_t count, int64_t rows, int threads,
                      Function function) const {
    Arena of_thread(nullptr);
    kernel.scratch(of_thread);
    const int64_t panels = divide_up(rows, panel_rows);
    const int64_t groups = smaller(panels, divide_up(threads, larger(1, count)));
    parallel_tasks(count * groups, threads, [&](int64_t task, int thread) {
      const int64_t group = task % groups;
      Arena arena(scratches + thread * of_thread.bytes());
      function(task / groups, group * panels / groups * panel_rows,
               smaller(rows, (group + 1) * panels / groups * panel_rows), kernel.scratch(arena));
    });
  }

  // Bits of places whose results are pixels, for the four of a tile: the same in every sample.
  void fill_masks(const TilePlaces& places, T* masks) const {
    __builtin_memset(masks, 0, phases * places.of_sample * sizeof(T));
    for (int64_t row = places.first_row - 1; row < places.first_row + places.rows + 1; ++row) {
      for (int point = 0; point < phases; ++point) {
        const int64_t y = winograd_outputs * row + point / winograd_outputs;
        const int64_t count = divide_up(shape.width - point % winograd_outputs, winograd_outputs);
        if (y >= 0 && y < shape.height)
          __builtin_memset(masks + point * places.of_sample + places.place(0, row), 0xff, count * sizeof(T));
      }
    }
  }

  // Calls function(sample, first row, last row) for shares of the rows of all samples.
  template <typename Function>
  static void for_each_share(const TilePlaces& places, int64_t first, int64_t last, int threads, Function function) {
    const int64_t shares = smaller(last - first, threads);
    parallel_tasks(places.samples * shares, threads, [&](int64_t task, int) {
      const int64_t share = task % shares;
      function(task / shares, first + share * (last - first) / shares, first + (share + 1) * (last - first) / shares);
    });
  }

  void load_inputs(const TilePlaces& places, int64_t first_sample, int64_t first, int64_t last,
                   const TilePlanes<T>& planes, int threads) const {
    for_each_share(places, first, last, threads, [&](int64_t sample, int64_t begin, int64_t end) {
      load_rows<S>(x, first_sample, shape.channels, places, sample, begin, end, planes, 0);
      if (shape.joined_channels)
        load_rows<S>(joined, first_sample, shape.joined_channels, places, sample, begin, end, planes, shape.channels);
    });
  }

  // Makes a map's planes ready for what is loaded or computed at these places: rows [first, last) come from those
  // before, none at the top of a band.
  void prepare(const TilePlanes<T>& planes, const TilePlaces& places, bool is_top, int64_t first, int64_t last,
               int threads) const {
    const int64_t all = places.all_rows(), outside = smaller(all, tile_rows + 1 - places.first_row);
    if (!is_top) {
      planes.move(places, step, first, last);
      if (outside < all) planes.clear(places, larger(last, outside), all, threads);
    } else if (is_tall) {
      planes.clear(places, 0, all, threads);
    } else {
      planes.clear(places, 0, 2, threads);
      planes.clear(places, outside, all, threads);
      planes.clear_sides(places, threads);
    }
  }

  Vec<T> leaky(const Vec<T>& value) const { return at::vec::maximum(value, value * Vec<T>(slope)); }

  // Stores value(i, j) for the four pixels of the results of `count` tiles of a sample, zeros where the map has none.
  template <typename Value>
  ALWAYS_INLINE void store_results(const TilePlanes<T>& planes, const TilePlaces& places, const T* masks,
                                   int64_t sample, int64_t channel, int64_t place, int64_t count, Value value) const {
    const T* const mask = masks + place - sample * places.of_sample;
    UNROLLED_FOR(i, winograd_outputs) UNROLLED_FOR(j, winograd_outputs) {
      const Vec<T> inside = Vec<T>::loadu(mask + (winograd_outputs * i + j) * places.of_sample);
      (value(i, j) & inside).store(planes.pixel(places, channel, i + 1, j + 1) + place, static_cast<int>(count));
    }
  }

  // h of a strip for its channels in [first, last).
  void compute_hidden(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last, const Packed& packed,
                      const TilePlanes<T>& inputs, const TilePlanes<T>& hidden, const T* masks,
                      const StripValues<T>& values, const StripValues<T>& product) const {
    convolve_strip(inputs, places, strip, packed.filters1, first, last, values, product,
                   [&](int64_t row, int64_t, int64_t place, int64_t count, const auto& sums) {
                     const Vec<T> bias(packed.bias1[row]);
                     store_results(hidden, places, masks, strip.sample, row, place, count,
                                   [&](int i, int j) { return leaky(sums[i][j] + bias); });
                   });
  }
};

// A map's channels from one on.
template <typename S>
ConstMapView from_channel(ConstMapView map, int64_t channel) {
  map.data = static_cast<const S*>(map.data) + channel * map.stride_c;
  return map;
}

template <typename S>
MapView from_channel(MapView map, int64_t channel) {
  map.data = static_cast<S*>(map.data) + channel * map.stride_c;
  return map;
}

template <typename S>
struct ResidualForward {
  using T = Arithmetic<S>;
  using Packed = typename Residual<S>::Packed;

  const ResidualConvForward& call;
  const int64_t depth = call.shape.channels + call.shape.joined_channels, out = call.shape.out_channels;
  const Residual<S> residual{call.shape, call.x, call.joined, call.weights, depth + out, 0, true, true};
  const int64_t parts = residual.parts_of_bands(enough_tasks);

  struct Memory {
    TilePlanes<T> inputs, hidden;
    T* masks;
  };

  Memory memory(Arena& arena, int64_t samples) const {
    const TilePlaces places = residual.places(samples, 0);
    return {TilePlanes<T>::take(arena, places, depth), TilePlanes<T>::take(arena, places, out),
            arena.take<T>(phases * places.of_sample)};
  }

  struct Scratch {
    StripValues<T> values, product, y;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t vectors = residual.most_vectors;
    return {StripValues<T>::take(arena, winograd_points, larger(depth, out), vectors),
            StripValues<T>::take(arena, winograd_points, out, vectors),
            StripValues<T>::take(arena, phases, out, vectors)};
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    residual.pack(arena);
    return arena.bytes() + residual.working_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Packed packed = residual.pack(arena);
    residual.fill(packed, threads);
    residual.for_each_band(*this, arena.rest(), threads,
                           [&](const Band& band, const Memory& memory, char* scratches, int threads_of_band) {
                             compute(band, packed, memory, scratches, threads_of_band);
                           });
  }

  void compute(const Band& band, const Packed& packed, const Memory& memory, char* scratches, int threads) const {
    int64_t loaded = band.first_row - 1, hidden = larger(0, band.first_row - 1), done = band.first_row;
    for (int64_t row = band.first_row; done < band.last_row; row += residual.step) {
      const TilePlaces places = residual.places(band.samples, row);
      const int64_t end = row + residual.step;
      const bool is_top = row == band.first_row;
      residual.prepare(memory.inputs, places, is_top, 1, 3, threads);
      residual.prepare(memory.hidden, places, is_top, 1, 3, threads);
      residual.fill_masks(places, memory.masks);
      const int64_t last_loaded = smaller(end, band.last_row) + 2;
      residual.load_inputs(places, band.first_sample, loaded, last_loaded, memory.inputs, threads);
      loaded = last_loaded;
      const auto for_each_strip = [&](int64_t& from, int64_t to, auto function) {
        const Strips<T> strips{places, from, to, residual.most_vectors};
        residual.for_each_panel(*this, scratches, strips.count, out, threads,
                                [&](int64_t index, int64_t first, int64_t last, const Scratch& at) {
                                  function(strips[index], first, last, at);
                                });
        from = to;
      };
      for_each_strip(hidden, smaller(residual.tile_rows, end + 1),
                     [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
                       residual.compute_hidden(places, strip, first, last, packed, memory.inputs, memory.hidden,
                                               memory.masks, at.values, at.product);
                     });
      if (call.hidden.data) {
        const int64_t first = winograd_outputs * done, last = winograd_outputs * smaller(band.last_row, end);
        residual.for_each_share(places, first, last, threads, [&](int64_t sample, int64_t begin, int64_t stop) {
          store_rows<S>(memory.hidden, places, sample, begin, stop, call.hidden, band.first_sample, out);
        });
      }
      for_each_strip(done, smaller(band.last_row, end),
                     [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
                       compute_results(places, band.first_sample, strip, first, last, packed, memory, at);
                     });
    }
  }

  void compute_results(const TilePlaces& places, int64_t first_sample, const Strip& strip, int64_t first, int64_t last,
                       const Packed& packed, const Memory& memory, const Scratch& at) const {
    multiply_pixels_of(packed.identity, first, last, memory.inputs, places, strip, at.y);
    convolve_strip(memory.hidden, places, strip, packed.filters2, first, last, at.values, at.product,
                   [&](int64_t row, int64_t n, int64_t, int64_t, const auto& sums) {
                     const Vec<T> bias(packed.bias2[row]), identity_bias(packed.identity_bias[row]);
                     UNROLLED_FOR(i, winograd_outputs) UNROLLED_FOR(j, winograd_outputs) {
                       T* const y = at.y.row(winograd_outputs * i + j, row - first) + n;
                       (residual.leaky(sums[i][j] + bias) + (Vec<T>::loadu(y) + identity_bias)).store(y);
                     }
                   });
    store_strip<S>(at.y, places, strip, from_channel<S>(call.y, first), first_sample, last - first);
  }
};

template <typename S>
struct ResidualBackward {
  using T = Arithmetic<S>;
  using Packed = typename Residual<S>::Packed;
  static constexpr bool y_is_exact = std::is_same_v<S, T>;

  const ResidualConvBackward& call;
  const int64_t depth = call.shape.channels + call.shape.joined_channels, out = call.shape.out_channels;
  const bool needs_grad_h = call.grad_x.data || call.grad_joined.data || call.grad_weight1 || call.grad_bias1;
  const bool needs_grad_z = needs_grad_h || call.grad_weight2 || call.grad_bias2;
  const bool has_h = call.hidden.data, computes_h = !has_h && needs_grad_z;
  const Residual<S> residual{call.shape,      call.x, call.joined, call.weights,
                             depth + 3 * out, 2,      computes_h,  !y_is_exact};
  // rows beyond a band whose h is needed: one for weight2, and two more for z around them
  const int64_t h_beyond = y_is_exact ? 1 : 3;
  // of strips whose products are summed
  const int64_t most_summed =
      larger(fewest_summed, cache / 2 / (winograd_tile * (depth + out) * residual.vector_bytes));
  // places in the sums of a part
  const PairSums of_weight1{out, depth}, of_weight2{out, out}, of_identity{out, depth};
  const int64_t weight2_sum = winograd_points * of_weight1.size;
  const int64_t identity_sum = weight2_sum + winograd_points * of_weight2.size;
  const int64_t bias1_sum = identity_sum + of_identity.size, bias2_sum = bias1_sum + out;
  const int64_t identity_bias_sum = bias2_sum + out, sums_size = round_up(identity_bias_sum + out, Vec<T>::size());
  // each with sums of its own
  const int64_t parts =
      residual.parts_of_bands(smaller(enough_tasks, most_bytes / (sums_size * static_cast<int64_t>(sizeof(T)))));

  struct Own {
    // for the convolutions back: to x, to the joined map and to h
    Filters<T> back_x, back_joined, back2, identity_x, identity_joined;
    T* sums;
  };

  Own take(Arena& arena) const {
    const int64_t joined = call.shape.joined_channels;
    return {Filters<T>::take(arena, winograd_points, call.shape.channels, out),
            Filters<T>::take(arena, winograd_points, joined, out),
            Filters<T>::take(arena, winograd_points, out, out),
            Filters<T>::take(arena, 1, call.shape.channels, out),
            Filters<T>::take(arena, 1, joined, out),
            arena.take<T>(parts * sums_size)};
  }

  struct Memory {
    TilePlanes<T> inputs, hidden, grad_z, grad;  // the gradient of h takes the place of h
    T* masks;
  };

  Memory memory(Arena& arena, int64_t samples) const {
    const TilePlaces places = residual.places(samples, 0);
    return {TilePlanes<T>::take(arena, places, depth), TilePlanes<T>::take(arena, places, out),
            TilePlanes<T>::take(arena, places, out), TilePlanes<T>::take(arena, places, out),
            arena.take<T>(phases * places.of_sample)};
  }

  // For strips that are convolved and, in the same memory, for those whose products are summed.
  struct Scratch {
    StripValues<T> values, product, shortcut;
    StripValues<T> summed_values, summed_grad;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t vectors = residual.most_vectors, most = larger(depth, out);
    Arena again = arena;
    const Scratch at{StripValues<T>::take(arena, winograd_points, most, vectors),
                     StripValues<T>::take(arena, winograd_points, most, vectors),
                     StripValues<T>::take(arena, phases, most, vectors),
                     StripValues<T>::take(again, winograd_tile, most, most_summed),
                     StripValues<T>::take(again, winograd_tile, out, most_summed)};
    if (again.bytes() > arena.bytes()) arena = again;
    return at;
  }

  int64_t workspace_bytes(int threads) const {
    Arena arena(nullptr);
    residual.pack(arena);
    take(arena);
    return arena.bytes() + residual.working_bytes(*this, threads);
  }

  void launch(void* workspace, int threads) const {
    Arena arena(workspace);
    const Packed packed = residual.pack(arena);
    const Own own = take(arena);
    residual.fill(packed, threads);
    const S* const weight1 = static_cast<const S*>(call.weights.weight1);
    const S* const identity = static_cast<const S*>(call.weights.identity_weight);
    const int64_t first_joined = call.shape.channels;
    own.back_x.fill(weight1, taps, depth * taps, true, threads);
    own.back_joined.fill(weight1 + first_joined * taps, taps, depth * taps, true, threads);
    own.back2.fill(static_cast<const S*>(call.weights.weight2), taps, out * taps, true, threads);
    own.identity_x.fill_scaled(identity, 1, depth, residual.scale, threads);
    own.identity_joined.fill_scaled(identity + first_joined, 1, depth, residual.scale, threads);
    __builtin_memset(own.sums, 0, parts * sums_size * sizeof(T));
    residual.for_each_band(*this, arena.rest(), threads,
                           [&](const Band& band, const Memory& memory, char* scratches, int threads_of_band) {
                             compute(band, packed, own, memory, scratches, threads_of_band);
                           });
    add_up_sums(own, threads);
  }

  void compute(const Band& band, const Packed& packed, const Own& own, const Memory& memory, char* scratches,
               int threads) const {
    // the rows that each stage has done: those after it read one more than they write
    int64_t hidden = larger(0, band.first_row - h_beyond), grad_z = larger(0, band.first_row - 2);
    int64_t grad_hidden = larger(0, band.first_row - 1), done = band.first_row;
    int64_t loaded = grad_z - 1, summed2 = done, summed1 = done;
    for (int64_t row = grad_z; done < band.last_row; row += residual.step) {
      const TilePlaces places = residual.places(band.samples, row);
      const auto end = [&](int64_t ahead, int64_t beyond) {
        return smaller(smaller(residual.tile_rows, band.last_row + beyond), row + residual.step + ahead);
      };
      const bool is_top = loaded < row;
      residual.prepare(memory.inputs, places, is_top, 2, 5, threads);
      residual.prepare(memory.hidden, places, is_top, 1, 5, threads);
      residual.prepare(memory.grad_z, places, is_top, 2, 5, threads);
      residual.prepare(memory.grad, places, is_top, 1, 5, threads);
      residual.fill_masks(places, memory.masks);
      const int64_t last_loaded = smaller(row + places.all_rows() - 1, band.last_row + h_beyond + 2);
      residual.load_inputs(places, band.first_sample, loaded, last_loaded, memory.inputs, threads);
      residual.for_each_share(places, loaded, last_loaded, threads, [&](int64_t sample, int64_t first, int64_t last) {
        load_rows<S>(call.grad, band.first_sample, out, places, sample, first, last, memory.grad, 0);
        if (y_is_exact) load_rows<S>(call.y, band.first_sample, out, places, sample, first, last, memory.grad_z, 0);
        if (has_h) load_rows<S>(call.hidden, band.first_sample, out, places, sample, first, last, memory.hidden, 0);
      });
      loaded = last_loaded;
      const auto for_each_strip = [&](int64_t from, int64_t to, int64_t rows, auto function) {
        const Strips<T> strips{places, from, to, residual.most_vectors};
        residual.for_each_panel(*this, scratches, strips.count, rows, threads,
                                [&](int64_t index, int64_t first, int64_t last, const Scratch& at) {
                                  function(strips[index], first, last, at);
                                });
      };
      const auto sum_each_strip = [&](int64_t from, int64_t to, int64_t most, auto function) {
        const Strips<T> strips{places, from, to, most};
        residual.for_each_panel(
            *this, scratches, band.parts, out, threads,
            [&](int64_t index, int64_t first, int64_t last, const Scratch& at) {
              const int64_t part = band.first_part + index;
              for (int64_t i = 0; i < strips.count; ++i) {
                const Strip strip = strips[i];
                if (band.parts == 1 || residual.part_of(band.first_sample + strip.sample, parts) == part)
                  function(strip, first, last, at, own.sums + part * sums_size);
              }
            });
      };
      if (computes_h) {
        for_each_strip(hidden, end(3, h_beyond), out,
                       [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
                         residual.compute_hidden(places, strip, first, last, packed, memory.inputs, memory.hidden,
                                                 memory.masks, at.values, at.product);
                       });
      }
      hidden = end(3, h_beyond);
      if (needs_grad_z) {
        for_each_strip(grad_z, end(2, 2), out, [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
          backward_of_results(places, strip, first, last, packed, memory, at);
        });
      }
      grad_z = end(2, 2);
      sum_each_strip(summed2, end(2, 0), identity_vectors,
                     [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at, T* sums_of_part) {
                       sum_identity(places, strip, first, last, memory, at, sums_of_part);
                     });
      sum_each_strip(summed2, end(2, 0), most_summed,
                     [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at, T* sums_of_part) {
                       sum_second(places, strip, first, last, memory, at, sums_of_part);
                     });
      summed2 = end(2, 0);
      if (needs_grad_h) {
        for_each_strip(grad_hidden, end(1, 1), out,
                       [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
                         backward_of_hidden(places, strip, first, last, own, memory, at);
                       });
      }
      grad_hidden = end(1, 1);
      sum_each_strip(summed1, end(1, 0), most_summed,
                     [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at, T* sums_of_part) {
                       sum_first(places, strip, first, last, memory, at, sums_of_part);
                     });
      summed1 = end(1, 0);
      const auto backward_of_map = [&](const MapView& grad, const Filters<T>& back, const Filters<T>& identity) {
        if (!grad.data) return;
        for_each_strip(
            done, end(0, 0), back.rows, [&](const Strip& strip, int64_t first, int64_t last, const Scratch& at) {
              backward_of_input(places, band.first_sample, strip, first, last, grad, back, identity, memory, at);
            });
      };
      backward_of_map(call.grad_x, own.back_x, own.identity_x);
      backward_of_map(call.grad_joined, own.back_joined, own.identity_joined);
      done = end(0, 0);
    }
  }

  Vec<T> passed(const Vec<T>& grad, const Vec<T>& value) const {
    return Vec<T>::blendv(grad * Vec<T>(residual.slope), grad, value > Vec<T>(0));
  }

  // grad_z of a strip for its channels in [first, last), in the place of y.
  void backward_of_results(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last,
                           const Packed& packed, const Memory& memory, const Scratch& at) const {
    // z(i, j) is z or what is positive as it is
    const auto store = [&](int64_t row, int64_t place, int64_t count, auto z) {
      residual.store_results(memory.grad_z, places, memory.masks, strip.sample, row, place, count, [&](int i, int j) {
        return passed(Vec<T>::loadu(memory.grad.pixel(places, row, i + 1, j + 1) + place), z(i, j));
      });
    };
    if constexpr (y_is_exact) {
      multiply_pixels_of(packed.identity, first, last, memory.inputs, places, strip, at.shortcut);
      for (int64_t row = first; row < last; ++row) {
        const Vec<T> bias(packed.identity_bias[row]);
        strip.for_each_run([&](int64_t begin, int64_t place, int64_t count) {
          for (int64_t n = 0; n < count; n += Vec<T>::size()) {
            store(row, place + n, smaller(Vec<T>::size(), count - n), [&](int i, int j) {
              const T* const y = memory.grad_z.pixel(places, row, i + 1, j + 1) + place + n;
              const T* const shortcut = at.shortcut.row(winograd_outputs * i + j, row - first) + begin + n;
              return Vec<T>::loadu(y) - (Vec<T>::loadu(shortcut) + bias);
            });
          }
        });
      }
    } else {
      convolve_strip(memory.hidden, places, strip, packed.filters2, first, last, at.values, at.product,
                     [&](int64_t row, int64_t, int64_t place, int64_t count, const auto& sums) {
                       const Vec<T> bias(packed.bias2[row]);
                       store(row, place, count, [&](int i, int j) { return sums[i][j] + bias; });
                     });
    }
  }

  // What a strip adds to the gradients of the shortcut, for channels in [first, last).
  void sum_identity(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last, const Memory& memory,
                    const Scratch& at, T* sums) const {
    if (call.grad_identity_bias)
      add_bias(memory.grad, places, strip, first, last, residual.scale, sums + identity_bias_sum);
    if (call.grad_identity_weight) {
      copy_strip(memory.grad, places, strip, first, round_up(last, sum_rows), at.summed_grad);
      copy_strip(memory.inputs, places, strip, 0, memory.inputs.all_channels, at.summed_values);
      add_pixel_products_of(at.summed_grad, at.summed_values, first, last, strip.count, residual.scale, of_identity,
                            sums + identity_sum);
    }
  }

  // The same for weight2 and bias2.
  void sum_second(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last, const Memory& memory,
                  const Scratch& at, T* sums) const {
    if (call.grad_bias2) add_bias(memory.grad_z, places, strip, first, last, T(1), sums + bias2_sum);
    if (call.grad_weight2) {
      add_filter_gradients(memory.grad_z, memory.hidden, places, strip, first, last, at.summed_grad, at.summed_values,
                           of_weight2, sums + weight2_sum);
    }
  }

  // The gradient of h before its LeakyReLU, in its place.
  void backward_of_hidden(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last, const Own& own,
                          const Memory& memory, const Scratch& at) const {
    convolve_strip(memory.grad_z, places, strip, own.back2, first, last, at.values, at.product,
                   [&](int64_t row, int64_t, int64_t place, int64_t count, const auto& sums) {
                     residual.store_results(memory.hidden, places, memory.masks, strip.sample, row, place, count,
                                            [&](int i, int j) {
                                              const T* const h = memory.hidden.pixel(places, row, i + 1, j + 1) + place;
                                              return passed(sums[i][j], Vec<T>::loadu(h));
                                            });
                   });
  }

  // The same for weight1 and bias1.
  void sum_first(const TilePlaces& places, const Strip& strip, int64_t first, int64_t last, const Memory& memory,
                 const Scratch& at, T* sums) const {
    if (call.grad_bias1) add_bias(memory.hidden, places, strip, first, last, T(1), sums + bias1_sum);
    if (call.grad_weight1) {
      add_filter_gradients(memory.hidden, memory.inputs, places, strip, first, last, at.summed_grad, at.summed_values,
                           of_weight1, sums);
    }
  }

  // The gradient of x or of the joined map for its channels in [first, last).
  void backward_of_input(const TilePlaces& places, int64_t first_sample, const Strip& strip, int64_t first,
                         int64_t last, const MapView& map, const Filters<T>& back, const Filters<T>& identity,
                         const Memory& memory, const Scratch& at) const {
    multiply_pixels_of(identity, first, last, memory.grad, places, strip, at.shortcut);
    convolve_strip(memory.hidden, places, strip, back, first, last, at.values, at.product,
                   [&](int64_t row, int64_t n, int64_t, int64_t, const auto& sums) {
                     UNROLLED_FOR(i, winograd_outputs) UNROLLED_FOR(j, winograd_outputs) {
                       T* const grad = at.shortcut.row(winograd_outputs * i + j, row - first) + n;
                       (sums[i][j] + Vec<T>::loadu(grad)).store(grad);
                     }
                   });
    store_strip<S>(at.shortcut, places, strip, from_channel<S>(map, first), first_sample, last - first);
  }

  static void add_bias(const TilePlanes<T>& grad, const TilePlaces& places, const Strip& strip, int64_t first,
                       int64_t last, T factor, T* sums) {
    constexpr int64_t lanes = Vec<T>::size();
    for (int64_t row = first; row < last; ++row) {
      Vec<T> sum(0);
      strip.for_each_run([&](int64_t, int64_t place, int64_t count) {
        UNROLLED_FOR(i, winograd_outputs) UNROLLED_FOR(j, winograd_outputs) {
          const T* const values = grad.pixel(places, row, i + 1, j + 1) + place;
          for (int64_t n = 0; n < count; n += lanes) sum = sum + Vec<T>::loadu(values + n, smaller(lanes, count - n));
        }
      });
      sums[row] += factor * sum_of_lanes(sum);
    }
  }

  void add_up_sums(const Own& own, int threads) const {
    add_up<S>(own.sums, sums_size, 0, parts,
              {{call.grad_bias1, bias1_sum, 1, out, out},
               {call.grad_bias2, bias2_sum, 1, out, out},
               {call.grad_identity_bias, identity_bias_sum, 1, out, out}},
              threads);
    add_up_weight(call.grad_weight1, own.sums, of_weight1, threads);
    add_up_weight(call.grad_weight2, own.sums + weight2_sum, of_weight2, threads);
    S* const grad_identity = static_cast<S*>(call.grad_identity_weight);
    for (int64_t row = 0; row < out && grad_identity; ++row) {
      for (int64_t column = 0; column < depth; ++column) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part)
          total += own.sums[part * sums_size + identity_sum + of_identity.place(row, column)];
        grad_identity[row * depth + column] = static_cast<S>(total);
      }
    }
  }

  // [rows, columns, 3, 3] from the sums at the 16 points.
  void add_up_weight(void* grad_weight, T* sums, const PairSums& layout, int threads) const {
    S* const grad = static_cast<S*>(grad_weight);
    if (!grad) return;
    parallel_tasks(layout.row_blocks, threads, [&](int64_t block, int) {
      for (int64_t i = block * layout.of_row_block; i < (block + 1) * layout.of_row_block; i += Vec<T>::size()) {
        transform_both<winograd_tile, winograd_side, Vec<T>>(
            [](const auto& in, auto& out) { transform_weight_sums(in, out); },
            [&](int a, int b) {
              Vec<T> total(0);
              for (int64_t part = 0; part < parts; ++part)
                total = total + Vec<T>::loadu(sums + part * sums_size + (a * winograd_tile + b) * layout.size + i);
              return total;
            },
            [&](int a, int b, const Vec<T>& sum) { sum.store(sums + (a * winograd_side + b) * layout.size + i); });
      }
      for (int64_t row = block * sum_rows; row < smaller(layout.rows, (block + 1) * sum_rows); ++row)
        for (int64_t column = 0; column < layout.columns; ++column)
          for (int tap = 0; tap < taps; ++tap)
            grad[(row * layout.columns + column) * taps + tap] =
                static_cast<S>(sums[tap * layout.size + layout.place(row, column)]);
    });
  }
};

}  // namespace

extern const ResidualConvCpuKernels residual_conv_kernels;
const ResidualConvCpuKernels residual_conv_kernels = {
    {workspace_bytes<ResidualForward, ResidualConvForward>, launch<ResidualForward, ResidualConvForward>},
    {workspace_bytes<ResidualBackward, ResidualConvBackward>, launch<ResidualBackward, ResidualConvBackward>},
};

}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
