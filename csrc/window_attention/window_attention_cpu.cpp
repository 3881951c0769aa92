#include "window_attention/window_attention_cpu.h"

#include "common/kernels_of_capability.h"

namespace mitnet_fast {

DEFINE_CPU_KERNELS(WindowAttentionCpuKernels, window_attention)

}  // namespace mitnet_fast
