// Calls of window attention, the same on every device.
//
//   scores = d^-½·Q·Kᵀ + bias_table[position of the query − position of the key]
//   y      = softmax(scores)·V, inside windows of w×w pixels, heads apart
//
// The map is padded by reflection to whole windows, `shift` rows and columns of it at the top left, and
// the result is cropped to the map: padded pixels count as keys and values, never as queries. Maps have
// any strides, channels are head·d + j; all tensors of a call have one data type, arithmetic is float32
// (float64 for float64).
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace mitnet_fast {

struct WindowAttentionShape {
  DataType dtype;
  int64_t batch;
  int64_t channels;  // of V: heads · d
  int64_t height;
  int64_t width;
  int64_t heads;
  int64_t window_size;  // w
  int64_t shift;        // 0 ≤ shift < w

  int64_t head_size() const { return channels / heads; }  // d
  int64_t table_rows() const { return (2 * window_size - 1) * (2 * window_size - 1); }
  int64_t window_rows() const { return (shift + height + window_size - 1) / window_size; }
  int64_t window_columns() const { return (shift + width + window_size - 1) / window_size; }
};

struct WindowAttentionForward {
  WindowAttentionShape shape;
  ConstMapView qk;         // 2C channels, queries then keys
  ConstMapView v;          // C channels
  const void* bias_table;  // [(2w−1)², heads], contiguous
  MapView y;
};

// A gradient whose data is null is not computed. That of the table is contiguous.
struct WindowAttentionBackward {
  WindowAttentionShape shape;
  ConstMapView grad;
  ConstMapView qk;
  ConstMapView v;
  const void* bias_table;
  MapView grad_qk;
  MapView grad_v;
  void* grad_bias_table;
};

}  // namespace mitnet_fast
