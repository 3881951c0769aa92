// Tiles of [batch, channels, height, width] maps of any strides, brought to shared memory and back.
//
// In shared memory a tile is [pixel][channel]: pixels row by row, `pitch` elements from one to the next,
// channels padded to a multiple of 4 with zeros. Pixels outside the image are zeros. Whatever the
// layout in global memory, neighbouring threads read neighbouring addresses there: along a row of
// pixels, or along the channels of a pixel, four at a time where they are aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "common/tensor_view.h"

namespace mitnet_fast {

enum class Access : int {
  rows,      // neighbouring threads take neighbouring pixels
  channels,  // neighbouring threads take neighbouring channels
  vectors,   // the same, four channels at a time
};

// A map as kernels get it. T is const for one that is read.
template <typename T>
struct Map {
  T* data;
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride_h;
  int64_t stride_w;
  Access access;

  // Its first pixel of one sample and channel.
  __device__ T* plane(int64_t n, int64_t c) const { return data + n * stride_n + c * stride_c; }
};

template <typename T, typename View>
Map<T> map_of(const View& view, int64_t channels) {
  Access access = Access::rows;
  if (view.stride_c == 1 && channels > 1) {
    const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (4 * sizeof(T)) == 0 && view.stride_n % 4 == 0 &&
                         view.stride_h % 4 == 0 && view.stride_w % 4 == 0;
    access = aligned ? Access::vectors : Access::channels;
  }
  return {static_cast<T*>(view.data), view.stride_n, view.stride_c, view.stride_h, view.stride_w, access};
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};

__device__ __forceinline__ Quad<float> load_quad(const float* from) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
template <typename Half>
__device__ __forceinline__ Quad<Half> load_quad(const Half* from) {
  union {
    uint2 words;
    Quad<Half> quad;
  } both = {__ldcg(reinterpret_cast<const uint2*>(from))};
  return both.quad;
}

template <typename T>
__device__ __forceinline__ T zero() {
  return static_cast<T>(0.0f);
}

// Where a tile lies in the image: the pixel of its first row and column, which may lie outside.
struct Place {
  int row;
  int column;
  int height;  // of the image
  int width;
};

// Loads `rows` × `columns` pixels of `channels` channels, of which the map has `present`; all sizes of
// the tile are known to the compiler. `plane` is the first channel of the sample. To be followed by a
// barrier.
template <int threads, int rows, int columns, int channels, int pitch, bool as_tf32 = false, typename T>
__device__ __forceinline__ void load_tile(T* tile, const Map<const T>& map, const T* plane, int present, Place place) {
  static_assert(channels % 4 == 0 && pitch % 4 == 0 && pitch >= channels);
  constexpr int pixels = rows * columns, quads = channels / 4;
  const auto load = [&](int pixel, int quad) {
    const int row = place.row + pixel / columns, column = place.column + pixel % columns, c = 4 * quad;
    Quad<T> values;
#pragma unroll
    for (int i = 0; i < 4; ++i) values.values[i] = zero<T>();
    if (row >= 0 && row < place.height && column >= 0 && column < place.width) {
      const T* from = plane + row * map.stride_h + column * map.stride_w + c * map.stride_c;
      if (map.access == Access::vectors && c + 4 <= present) {
        values = load_quad(from);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (c + i < present) values.values[i] = __ldcg(from + i * map.stride_c);
        }
      }
    }
    if constexpr (as_tf32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values.values[i] = __uint_as_float(round_to_tf32(values.values[i]));
    }
    *reinterpret_cast<Quad<T>*>(tile + pixel * pitch + c) = values;
  };
  const int first = computed_anew(threadIdx.x);
  if (map.access == Access::rows) {
#pragma unroll 2
    for (int i = first; i < pixels * quads; i += threads) load(i % pixels, i / pixels);
  } else {
#pragma unroll 2
    for (int i = first; i < pixels * quads; i += threads) load(i / quads, i % quads);
  }
}

// The way back, for what lies inside the image. To be preceded by a barrier.
template <int threads, int rows, int columns, int channels, int pitch, typename T>
__device__ __forceinline__ void store_tile(const T* tile, const Map<T>& map, T* plane, int present, Place place) {
  constexpr int pixels = rows * columns, quads = channels / 4;
  const auto store = [&](int pixel, int quad) {
    const int row = place.row + pixel / columns, column = place.column + pixel % columns, c = 4 * quad;
    if (row >= place.height || column >= place.width) return;
    const auto values = *reinterpret_cast<const Quad<T>*>(tile + pixel * pitch + c);
    T* to = plane + row * map.stride_h + column * map.stride_w + c * map.stride_c;
    if (map.access == Access::vectors && c + 4 <= present) {
      *reinterpret_cast<Quad<T>*>(to) = values;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i < present) to[i * map.stride_c] = values.values[i];
      }
    }
  };
  const int first = computed_anew(threadIdx.x);
  if (map.access == Access::rows) {
#pragma unroll 2
    for (int i = first; i < pixels * quads; i += threads) store(i % pixels, i / pixels);
  } else {
#pragma unroll 2
    for (int i = first; i < pixels * quads; i += threads) store(i / quads, i % quads);
  }
}

}  // namespace mitnet_fast
