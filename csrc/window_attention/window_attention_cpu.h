// Window attention on the CPU.
#pragma once

#include "common/cpu_kernel.h"
#include "window_attention/window_attention.h"

namespace mitnet_fast {

struct WindowAttentionCpuKernels {
  CpuKernel<WindowAttentionForward> forward;
  CpuKernel<WindowAttentionBackward> backward;
};

// Those for cpu_capability(), for all data types but float16.
const WindowAttentionCpuKernels& window_attention_cpu_kernels();

}  // namespace mitnet_fast
