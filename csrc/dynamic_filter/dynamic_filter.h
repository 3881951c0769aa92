// Calls of the dynamic filter, the same on every device.
//
//   y[n, c, p] = Σ_k filters[n, c·K² + k, p] · x[n, c, p + offset(k)]   (+ x[n, c, p])
//
// with zeros outside the image, k counting the K×K offsets row by row. The filters are given, or
// predicted at each pixel as weight · features + bias and never stored. Maps have any strides; all
// tensors of a call have one data type, arithmetic is float32 (float64 for float64).
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace mitnet_fast {

struct DynamicFilterShape {
  DataType dtype;
  int kernel_size;  // K: 1, 3, 5 or 7
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool residual;
};

struct DynamicFilterForward {
  DynamicFilterShape shape;
  ConstMapView x;
  ConstMapView filters;
  MapView y;
};

// A gradient whose data is null is not computed.
struct DynamicFilterBackward {
  DynamicFilterShape shape;
  ConstMapView grad;
  ConstMapView x;
  ConstMapView filters;
  MapView grad_x;
  MapView grad_filters;
};

// What predicts the filters.
struct FilterPredictor {
  ConstMapView features;
  int64_t feature_channels;  // Cf
  const void* weight;        // [C·K², Cf], contiguous
  const void* bias;          // [C·K²] or [B, C·K²], contiguous, or null
  bool bias_per_sample;
};

struct PredictedDynamicFilterForward {
  DynamicFilterShape shape;
  ConstMapView x;
  FilterPredictor predictor;
  MapView y;
};

// A gradient whose data is null is not computed. Those of weight and bias are contiguous.
struct PredictedDynamicFilterBackward {
  DynamicFilterShape shape;
  ConstMapView grad;
  ConstMapView x;
  FilterPredictor predictor;
  MapView grad_x;
  MapView grad_features;
  void* grad_weight;
  void* grad_bias;
};

}  // namespace mitnet_fast
