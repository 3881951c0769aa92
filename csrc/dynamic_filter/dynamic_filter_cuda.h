// Dynamic filter on CUDA devices: float32, bfloat16 and float16.
//
// Launchers work on the current device and on `stream`, a cudaStream_t. They neither wait nor allocate:
// a call that needs a workspace says how many bytes, aligned to 256, of any content. Results do not
// depend on the device. Errors are exceptions.
#pragma once

#include <cstdint>

#include "dynamic_filter/dynamic_filter.h"

namespace mitnet_fast {

void dynamic_filter_forward_cuda(const DynamicFilterForward& call, void* stream);
void dynamic_filter_backward_cuda(const DynamicFilterBackward& call, void* stream);

// `tf32`: float32 products with the predictor round their factors to TF32; else they are IEEE.

int64_t predicted_dynamic_filter_forward_workspace_cuda(const PredictedDynamicFilterForward& call, bool tf32);
void predicted_dynamic_filter_forward_cuda(const PredictedDynamicFilterForward& call, bool tf32, void* workspace,
                                           void* stream);

int64_t predicted_dynamic_filter_backward_workspace_cuda(const PredictedDynamicFilterBackward& call, bool tf32);
void predicted_dynamic_filter_backward_cuda(const PredictedDynamicFilterBackward& call, bool tf32, void* workspace,
                                            void* stream);

}  // namespace mitnet_fast
