// The predicted dynamic filter for one way of doing its products, each in a source of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dynamic_filter/dynamic_filter.h"

namespace mitnet_fast {

template <typename Products>
int64_t predicted_forward_workspace(const PredictedDynamicFilterForward& call);
template <typename Products>
void predicted_forward(const PredictedDynamicFilterForward& call, void* workspace, cudaStream_t stream);

template <typename Products>
int64_t predicted_backward_workspace(const PredictedDynamicFilterBackward& call);
template <typename Products>
void predicted_backward(const PredictedDynamicFilterBackward& call, void* workspace, cudaStream_t stream);

}  // namespace mitnet_fast
