#include "window_attention/window_attention_cpu.h"

#include "common/cpu_capability.h"

namespace mitnet_fast {

namespace DEFAULT {
extern const WindowAttentionCpuKernels window_attention_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const WindowAttentionCpuKernels window_attention_kernels;
}
namespace AVX512 {
extern const WindowAttentionCpuKernels window_attention_kernels;
}
#endif

const WindowAttentionCpuKernels& window_attention_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::window_attention_kernels;
    case CpuCapability::avx2:
      return AVX2::window_attention_kernels;
#endif
    default:
      return DEFAULT::window_attention_kernels;
  }
}

}  // namespace mitnet_fast
