#include "dynamic_filter/dynamic_filter_cpu.h"

#include "common/kernels_of_capability.h"

namespace mitnet_fast {

DEFINE_CPU_KERNELS(DynamicFilterCpuKernels, dynamic_filter)

}  // namespace mitnet_fast
