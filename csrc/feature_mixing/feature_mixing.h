// Calls of feature mixing: the parts of a LEGM block, the dilated dense block of the depth network and the
// convolutions of the U-Net prior.
//
//   pointwise MLP   y = x + weight2 · ReLU(weight1 · x + bias1) + bias2
//   local mixing    y = x + rescale · (proj · (depthwise5×5(value) + attended) + proj_bias) + rebias
//
// The depthwise convolution continues its map by reflection. Local mixing comes without attention, with
// value = value_weight · x + value_bias computed here, no attended map, rescale 1 and rebias 0, or with
// attention and all of them given.
//
//   normalized QKV  n = norm_weight ⊙ (x − μ)/σ + norm_bias, μ and σ = √(variance + norm_eps) of each sample
//                   value = value_weight · n + value_bias,  query_key = query_key_weight · n + query_key_bias
//
//   dense block     f_0 = x,  f_k = [f_{k−1}, ReLU(conv3×3, dilation 2 (f_{k−1}))],  k = 1 … 5
//                   y = ReLU(fuse_weight · f_5 + fuse_bias) + x
//   conv-ReLU       y = ReLU(scale · conv3×3([x, joined]) + shift), zeros around the map
//   residual        h = LeakyReLU(conv3×3([x, joined]) + bias1), zeros around both maps
//   convolutions    s = identity_weight · [x, joined] + identity_bias
//                   y = LeakyReLU(conv3×3(h) + bias2) + identity_scale · s
//
// Maps have any strides; all tensors of a call have one data type, arithmetic is float32 (float64 for
// float64). Weights and their gradients are contiguous.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace mitnet_fast {

struct FeatureMixingShape {
  DataType dtype;
  int64_t batch;
  int64_t channels;  // C
  int64_t hidden;    // of the MLP, Ch
  int64_t height;
  int64_t width;
};

struct PointwiseMlpForward {
  FeatureMixingShape shape;
  ConstMapView x;
  const void* weight1;  // [Ch, C]
  const void* bias1;
  const void* weight2;  // [C, Ch]
  const void* bias2;
  MapView y;
};

// A gradient whose data is null is not computed.
struct PointwiseMlpBackward {
  FeatureMixingShape shape;
  ConstMapView grad;
  ConstMapView x;
  const void* weight1;
  const void* bias1;
  const void* weight2;
  MapView grad_x;
  void* grad_weight1;
  void* grad_bias1;
  void* grad_weight2;
  void* grad_bias2;
};

struct MixingWeights {
  const void* value_weight;  // [C, C], null with attention
  const void* value_bias;    // [C], null with attention
  const void* local_weight;  // [C, 25]
  const void* local_bias;    // [C]
  const void* proj_weight;   // [C, C]
  const void* proj_bias;     // [C]
  const void* rescale;       // [B, C], null without attention
  const void* rebias;        // [B, C], null without attention
};

struct LocalMixingForward {
  FeatureMixingShape shape;
  ConstMapView x;
  ConstMapView value;     // null without attention
  ConstMapView attended;  // null without attention
  MixingWeights weights;
  MapView y;
};

// A gradient whose data is null is not computed. With attention that of x is the incoming one.
struct LocalMixingBackward {
  FeatureMixingShape shape;
  ConstMapView grad;
  ConstMapView x;
  ConstMapView value;
  ConstMapView attended;
  MixingWeights weights;
  MapView grad_x;
  MapView grad_value;
  MapView grad_attended;
  void* grad_value_weight;
  void* grad_value_bias;
  void* grad_local_weight;
  void* grad_local_bias;
  void* grad_proj_weight;
  void* grad_proj_bias;
  void* grad_rescale;
  void* grad_rebias;
};

constexpr double norm_eps = 1e-5;

struct NormalizedQkvWeights {
  const void* norm_weight;       // [C]
  const void* norm_bias;         // [C]
  const void* value_weight;      // [C, C]
  const void* value_bias;        // [C]
  const void* query_key_weight;  // [2C, C]
  const void* query_key_bias;    // [2C]
};

struct NormalizedQkvForward {
  FeatureMixingShape shape;
  ConstMapView x;
  NormalizedQkvWeights weights;
  MapView value;
  MapView query_key;  // 2C channels
  void* mean;         // [B]
  void* deviation;    // [B]
};

// A gradient whose data is null is not computed.
struct NormalizedQkvBackward {
  FeatureMixingShape shape;
  ConstMapView grad_value;
  ConstMapView grad_query_key;
  const void* grad_mean;
  const void* grad_deviation;
  ConstMapView x;
  NormalizedQkvWeights weights;
  MapView grad_x;
  void* grad_norm_weight;
  void* grad_norm_bias;
  void* grad_value_weight;
  void* grad_value_bias;
  void* grad_query_key_weight;
  void* grad_query_key_bias;
};

constexpr int dense_layers = 5;

struct DenseBlockShape {
  DataType dtype;
  int64_t batch;
  int64_t channels;  // C
  int64_t growth;    // channels that a layer adds, G
  int64_t height;
  int64_t width;
};

struct DenseWeights {
  const void* dense_weight;  // the layers' [G, C + k·G, 3, 3] one after the other
  const void* dense_bias;    // [5·G]
  const void* fuse_weight;   // [C, C + 5·G]
  const void* fuse_bias;     // [C]
};

struct DenseBlockForward {
  DenseBlockShape shape;
  ConstMapView x;
  DenseWeights weights;
  MapView y;
};

// A gradient whose data is null is not computed.
struct DenseBlockBackward {
  DenseBlockShape shape;
  ConstMapView grad;
  ConstMapView x;
  DenseWeights weights;
  MapView grad_x;
  void* grad_dense_weight;
  void* grad_dense_bias;
  void* grad_fuse_weight;
  void* grad_fuse_bias;
};

struct ConvReluShape {
  DataType dtype;
  int64_t batch;
  int64_t channels;         // of x
  int64_t joined_channels;  // 0 where no map is joined
  int64_t out_channels;
  int64_t height;
  int64_t width;
};

struct ConvReluForward {
  ConvReluShape shape;
  ConstMapView x;
  ConstMapView joined;  // null where none is
  const void* weight;   // [out_channels, channels + joined_channels, 3, 3], or its channels innermost
  bool weight_is_channels_last;
  const void* scale;  // [out_channels]
  const void* shift;  // [out_channels]
  MapView y;
};

struct ResidualConvShape {
  DataType dtype;
  int64_t batch;
  int64_t channels;         // of x
  int64_t joined_channels;  // 0 where no map is joined
  int64_t out_channels;     // Co
  int64_t height;
  int64_t width;
  double identity_scale;
  double negative_slope;  // of both LeakyReLUs, in [0, 1)
};

struct ResidualConvWeights {
  const void* weight1;          // [Co, channels + joined_channels, 3, 3]
  const void* bias1;            // [Co]
  const void* weight2;          // [Co, Co, 3, 3]
  const void* bias2;            // [Co]
  const void* identity_weight;  // [Co, channels + joined_channels]
  const void* identity_bias;    // [Co]
};

struct ResidualConvForward {
  ResidualConvShape shape;
  ConstMapView x;
  ConstMapView joined;  // null where none is
  ResidualConvWeights weights;
  MapView y;
  MapView hidden;  // h, null where it is not kept
};

// A gradient whose data is null is not computed. The result y tells where the second LeakyReLU had its slope.
struct ResidualConvBackward {
  ResidualConvShape shape;
  ConstMapView grad;
  ConstMapView y;
  ConstMapView hidden;  // null where it is to be computed again
  ConstMapView x;
  ConstMapView joined;
  ResidualConvWeights weights;
  MapView grad_x;
  MapView grad_joined;
  void* grad_weight1;
  void* grad_bias1;
  void* grad_weight2;
  void* grad_bias2;
  void* grad_identity_weight;
  void* grad_identity_bias;
};

}  // namespace mitnet_fast
