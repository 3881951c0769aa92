// Tensors as kernels see them: raw pointers, sizes and strides in elements, no PyTorch header.
#pragma once

#include <cstdint>

namespace mitnet_fast {

enum class DataType { float32, float64, bfloat16, float16 };

// A [batch, channels, height, width] map of any layout. Strides are in elements; 64-bit, since a
// 24-megapixel image with 180 filter channels has more than 2^31 elements.
struct MapView {
  void* data;
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride_h;
  int64_t stride_w;
};

struct ConstMapView {
  const void* data;
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride_h;
  int64_t stride_w;
};

}  // namespace mitnet_fast
