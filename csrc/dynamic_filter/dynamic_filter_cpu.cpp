#include "dynamic_filter/dynamic_filter_cpu.h"

#include "common/cpu_capability.h"

namespace mitnet_fast {

namespace DEFAULT {
extern const DynamicFilterCpuKernels dynamic_filter_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const DynamicFilterCpuKernels dynamic_filter_kernels;
}
namespace AVX512 {
extern const DynamicFilterCpuKernels dynamic_filter_kernels;
}
#endif

const DynamicFilterCpuKernels& dynamic_filter_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::dynamic_filter_kernels;
    case CpuCapability::avx2:
      return AVX2::dynamic_filter_kernels;
#endif
    default:
      return DEFAULT::dynamic_filter_kernels;
  }
}

}  // namespace mitnet_fast
