// Dynamic filter on the CPU.
#pragma once

#include "common/cpu_kernel.h"
#include "dynamic_filter/dynamic_filter.h"

namespace mitnet_fast {

struct DynamicFilterCpuKernels {
  CpuKernel<DynamicFilterForward> forward;
  CpuKernel<DynamicFilterBackward> backward;
  CpuKernel<PredictedDynamicFilterForward> predicted_forward;
  CpuKernel<PredictedDynamicFilterBackward> predicted_backward;
};

// Those for cpu_capability().
const DynamicFilterCpuKernels& dynamic_filter_cpu_kernels();

}  // namespace mitnet_fast
