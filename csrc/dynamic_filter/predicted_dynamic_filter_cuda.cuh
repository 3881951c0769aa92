// Launchers of the predicted dynamic filter, for one way of doing its products.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "common/launch.cuh"
#include "common/sum_rows.cuh"
#include "dynamic_filter/predicted_dynamic_filter_cuda.h"
#include "dynamic_filter/predicted_dynamic_filter_kernels.cuh"

namespace mitnet_fast {

template <typename Products>
constexpr int steps_for(int channels) {
  return divide_up(channels, Products::depth);
}

// K = 3 is what networks have, with 20 channels or with 40, 80, …: up to 24 channels fit one group of results. The
// other sizes of filters share one tiling.
template <typename Products>
using Narrow =
    FilterSizes<Products, 3, 3, steps_for<Products>(24), 4, 1, (sizeof(typename Products::Element) == 4 ? 3 : 2), 3>;
template <typename Products>
using Wide = FilterSizes<Products, 3, 5, steps_for<Products>(40), 4, 1, 2, 2>;
template <typename Products, int K>
using Other = FilterSizes<Products, K, 3, steps_for<Products>(24), 4, 1,
                          (K == 5 && sizeof(typename Products::Element) == 4 ? 2 : 1), 2>;

// Calls visitor(sizes) with a value of the FilterSizes for a shape.
template <typename Products, typename Visitor>
auto with_sizes(const DynamicFilterShape& shape, int64_t feature_channels, Visitor&& visitor) {
  switch (shape.kernel_size) {
    case 1:
      return visitor(Other<Products, 1>());
    case 3:
      if (shape.channels <= 24 && feature_channels <= 24) return visitor(Narrow<Products>());
      return visitor(Wide<Products>());
    case 5:
      return visitor(Other<Products, 5>());
    case 7:
      return visitor(Other<Products, 7>());
    default:
      throw std::invalid_argument("kernel_size: allowed are 1, 3, 5 and 7");
  }
}

// What a call's workspace holds, and where: offsets in bytes.
struct PredictedWorkspace {
  int64_t filters_slices;
  int64_t features_slices;
  int64_t bias_stride;  // values of a sample
  int64_t bias_samples;
  int64_t features_weight;
  int64_t bias;
  int64_t weight_sums;
  int64_t bias_sums;
  int64_t bytes;
};

// How the backward pass is divided: a function of shapes alone.
struct Division {
  TileNumbers tiles;
  int tile_count;  // of all samples
  int run;         // tiles whose ∂W are summed by the same blocks
  int runs;
  int grad_x_blocks;
  int grad_features_blocks;
  int sums_blocks;
};

template <typename Sizes>
Division division_of(const DynamicFilterShape& shape, int64_t feature_channels, bool needs_x, bool needs_features,
                     bool needs_sums) {
  constexpr int enough_blocks = 256;  // of ∂W: every multiprocessor has work, and partial sums stay few
  Division division;
  division.tiles = {checked_int(blocks_of(shape.width, Sizes::columns_of_tile), "width"),
                    checked_int(blocks_of(shape.height, Sizes::rows_of_tile), "height")};
  division.tile_count = checked_int(shape.batch * division.tiles.columns * division.tiles.rows, "tiles of x");
  const int64_t channel_groups = blocks_of(shape.channels, Sizes::result_channels);
  const int64_t sums_blocks = channel_groups * blocks_of(feature_channels, Sizes::strip_features) * Sizes::rounds;
  const int64_t runs = std::max<int64_t>(1, enough_blocks / sums_blocks);
  division.run = std::max<int>(1, static_cast<int>(blocks_of(division.tile_count, runs)));
  division.runs = static_cast<int>(blocks_of(division.tile_count, division.run));
  division.grad_x_blocks = needs_x ? checked_int(channel_groups, "channels") : 0;
  division.grad_features_blocks =
      needs_features ? checked_int(blocks_of(feature_channels, Sizes::result_channels), "features") : 0;
  division.sums_blocks = needs_sums ? checked_int(sums_blocks, "channels") : 0;
  return division;
}

template <typename Sizes>
PredictedWorkspace workspace_of(const DynamicFilterShape& shape, const FilterPredictor& predictor, bool filters,
                                bool features, const Division* division, bool weight_sums, bool bias_sums) {
  const int channels = checked_int(shape.channels, "channels");
  const int feature_channels = checked_int(predictor.feature_channels, "features");
  const int64_t weight_rows = shape.channels * Sizes::taps;
  PredictedWorkspace workspace{};
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t begin = end;
    end = blocks_of(end + bytes, 256) * 256;
    return begin;
  };
  workspace.filters_slices = filters ? arranged_slices<Sizes>(channels, feature_channels) : 0;
  workspace.features_slices = features ? arranged_slices<Sizes>(feature_channels, channels) : 0;
  workspace.bias_stride = blocks_of(shape.channels, Sizes::result_channels) * Sizes::result_channels * Sizes::taps;
  workspace.bias_samples = !filters ? 0 : predictor.bias_per_sample ? shape.batch : 1;
  place(workspace.filters_slices * sizeof(Slice));
  workspace.features_weight = place(workspace.features_slices * sizeof(Slice));
  workspace.bias = place(workspace.bias_samples * workspace.bias_stride * sizeof(float));
  if (division) {
    const int64_t runs = division->runs;
    workspace.weight_sums = place(weight_sums ? runs * weight_rows * feature_channels * sizeof(float) : 0);
    workspace.bias_sums = place(bias_sums ? (runs + shape.batch) * weight_rows * sizeof(float) : 0);
  }
  workspace.bytes = end;
  return workspace;
}

template <typename Sizes>
PredictedWorkspace workspace_of(const PredictedDynamicFilterForward& call) {
  return workspace_of<Sizes>(call.shape, call.predictor, true, false, nullptr, false, false);
}

template <typename Sizes>
PredictedWorkspace workspace_of(const PredictedDynamicFilterBackward& call, const Division& division) {
  return workspace_of<Sizes>(call.shape, call.predictor, call.grad_x.data, call.grad_features.data, &division,
                             call.grad_weight, call.grad_bias);
}

template <typename Sizes>
Division division_of(const PredictedDynamicFilterBackward& call) {
  return division_of<Sizes>(call.shape, call.predictor.feature_channels, call.grad_x.data, call.grad_features.data,
                            call.grad_weight || call.grad_bias);
}

template <typename T>
T* at(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

template <typename Sizes>
void prepare(const DynamicFilterShape& shape, const FilterPredictor& predictor, const PredictedWorkspace& layout,
             void* workspace, cudaStream_t stream) {
  using Element = typename Sizes::Element;
  const int channels = checked_int(shape.channels, "channels");
  const int features = checked_int(predictor.feature_channels, "features");
  const int64_t row = predictor.feature_channels, rows_of_channel = row * Sizes::taps;
  PrepareArguments<Element> arguments;
  arguments.weight = static_cast<const Element*>(predictor.weight);
  arguments.bias = static_cast<const Element*>(predictor.bias);
  arguments.bias_samples = layout.bias_samples;
  arguments.filters = {channels, features, rows_of_channel, row, 1};
  arguments.features = {features, channels, 1, row, rows_of_channel};
  arguments.filters_slices = layout.filters_slices;
  arguments.features_slices = layout.features_slices;
  arguments.bias_values = layout.bias_samples * layout.bias_stride;
  arguments.filters_arranged = at<Slice>(workspace, 0);
  arguments.features_arranged = at<Slice>(workspace, layout.features_weight);
  arguments.bias_arranged = at<float>(workspace, layout.bias);
  const int64_t threads = arguments.filters_slices + arguments.features_slices + arguments.bias_values;
  if (threads == 0) return;
  const dim3 grid(static_cast<unsigned>(checked_int(blocks_of(threads, 256), "weight")));
  launch("prepare_kernel", prepare_kernel<Sizes>, grid, 256, 0, stream, arguments);
}

template <typename Sizes>
FilterArguments<typename Sizes::Element> filter_arguments(const DynamicFilterShape& shape, const ConstMapView& x,
                                                          const FilterPredictor& predictor, const MapView& y,
                                                          const TileNumbers& tiles, const PredictedWorkspace& layout,
                                                          void* workspace) {
  using Element = typename Sizes::Element;
  FilterArguments<Element> arguments;
  arguments.x = map_of<const Element>(x, shape.channels);
  arguments.features = map_of<const Element>(predictor.features, predictor.feature_channels);
  arguments.y = map_of<Element>(y, shape.channels);
  arguments.weight = at<Slice>(workspace, 0);
  arguments.bias = at<float>(workspace, layout.bias);
  arguments.bias_stride = predictor.bias_per_sample ? layout.bias_stride : 0;
  arguments.channels = static_cast<int>(shape.channels);
  arguments.feature_channels = static_cast<int>(predictor.feature_channels);
  arguments.height = checked_int(shape.height, "height");
  arguments.width = checked_int(shape.width, "width");
  arguments.tiles = tiles;
  arguments.residual = shape.residual;
  return arguments;
}

template <typename Products>
int64_t predicted_forward_workspace(const PredictedDynamicFilterForward& call) {
  return with_sizes<Products>(call.shape, call.predictor.feature_channels,
                              [&](auto sizes) { return workspace_of<decltype(sizes)>(call).bytes; });
}

template <typename Products>
void predicted_forward(const PredictedDynamicFilterForward& call, void* workspace, cudaStream_t stream) {
  with_sizes<Products>(call.shape, call.predictor.feature_channels, [&](auto sizes) {
    using Sizes = decltype(sizes);
    if (call.shape.batch == 0) return;
    const auto layout = workspace_of<Sizes>(call);
    const auto division = division_of<Sizes>(call.shape, call.predictor.feature_channels, true, false, false);
    prepare<Sizes>(call.shape, call.predictor, layout, workspace, stream);
    const auto arguments =
        filter_arguments<Sizes>(call.shape, call.x, call.predictor, call.y, division.tiles, layout, workspace);
    const int64_t blocks = int64_t{division.tile_count} * division.grad_x_blocks;
    launch("predicted_forward_kernel", predicted_forward_kernel<Sizes>,
           dim3(static_cast<unsigned>(checked_int(blocks, "tiles of x"))), Sizes::threads,
           Sizes::forward_shared * sizeof(typename Sizes::Element), stream, arguments);
  });
}

template <typename Products>
int64_t predicted_backward_workspace(const PredictedDynamicFilterBackward& call) {
  return with_sizes<Products>(call.shape, call.predictor.feature_channels, [&](auto sizes) {
    using Sizes = decltype(sizes);
    return workspace_of<Sizes>(call, division_of<Sizes>(call)).bytes;
  });
}

template <typename Products>
void predicted_backward(const PredictedDynamicFilterBackward& call, void* workspace, cudaStream_t stream) {
  with_sizes<Products>(call.shape, call.predictor.feature_channels, [&](auto sizes) {
    using Sizes = decltype(sizes);
    using Element = typename Sizes::Element;
    const auto division = division_of<Sizes>(call);
    const auto layout = workspace_of<Sizes>(call, division);
    const int64_t of_tile = division.grad_x_blocks + division.grad_features_blocks;
    const int64_t blocks = division.runs * (division.sums_blocks + division.run * of_tile);
    float* const weight_sums = call.grad_weight ? at<float>(workspace, layout.weight_sums) : nullptr;
    float* const bias_sums = call.grad_bias ? at<float>(workspace, layout.bias_sums) : nullptr;
    if (blocks > 0) {
      prepare<Sizes>(call.shape, call.predictor, layout, workspace, stream);
      BackwardArguments<Element> arguments;
      arguments.grad_x = filter_arguments<Sizes>(call.shape, call.grad, call.predictor, call.grad_x, division.tiles,
                                                 layout, workspace);
      arguments.x = map_of<const Element>(call.x, call.shape.channels);
      arguments.grad_features = map_of<Element>(call.grad_features, call.predictor.feature_channels);
      arguments.features_weight = at<Slice>(workspace, layout.features_weight);
      arguments.weight_sums = weight_sums;
      arguments.bias_sums = bias_sums;
      arguments.tile_count = division.tile_count;
      arguments.run = division.run;
      arguments.grad_x_blocks = division.grad_x_blocks;
      arguments.grad_features_blocks = division.grad_features_blocks;
      arguments.sums_blocks = division.sums_blocks;
      launch("predicted_backward_kernel", predicted_backward_kernel<Sizes>,
             dim3(static_cast<unsigned>(checked_int(blocks, "tiles of x"))), Sizes::threads,
             Sizes::backward_shared * sizeof(Element), stream, arguments);
    }
    const int64_t weight_rows = call.shape.channels * Sizes::taps;
    const int64_t tiles = int64_t{division.tiles.columns} * division.tiles.rows;
    const RowSums<Element> of_weight{weight_sums,
                                     static_cast<Element*>(call.grad_weight),
                                     weight_rows * call.predictor.feature_channels,
                                     1,
                                     division.runs,
                                     1,
                                     1};
    const RowSums<Element> of_bias{bias_sums,
                                   static_cast<Element*>(call.grad_bias),
                                   weight_rows,
                                   call.predictor.bias_per_sample ? call.shape.batch : 1,
                                   division.runs + call.shape.batch - 1,
                                   tiles,
                                   division.run};
    sum_rows(of_weight, of_bias, stream);
  });
}

}  // namespace mitnet_fast
