#include "feature_mixing/feature_mixing_cpu.h"

#include "common/cpu_capability.h"

namespace mitnet_fast {

namespace DEFAULT {
extern const FeatureMixingCpuKernels feature_mixing_kernels;
extern const NormalizedQkvCpuKernels normalized_qkv_kernels;
extern const DenseBlockCpuKernels dense_block_kernels;
extern const ConvReluCpuKernels conv_relu_kernels;
}  // namespace DEFAULT
#if defined(__x86_64__)
namespace AVX2 {
extern const FeatureMixingCpuKernels feature_mixing_kernels;
extern const NormalizedQkvCpuKernels normalized_qkv_kernels;
extern const DenseBlockCpuKernels dense_block_kernels;
extern const ConvReluCpuKernels conv_relu_kernels;
}  // namespace AVX2
namespace AVX512 {
extern const FeatureMixingCpuKernels feature_mixing_kernels;
extern const NormalizedQkvCpuKernels normalized_qkv_kernels;
extern const DenseBlockCpuKernels dense_block_kernels;
extern const ConvReluCpuKernels conv_relu_kernels;
}  // namespace AVX512
#endif

const FeatureMixingCpuKernels& feature_mixing_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::feature_mixing_kernels;
    case CpuCapability::avx2:
      return AVX2::feature_mixing_kernels;
#endif
    default:
      return DEFAULT::feature_mixing_kernels;
  }
}

const NormalizedQkvCpuKernels& normalized_qkv_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::normalized_qkv_kernels;
    case CpuCapability::avx2:
      return AVX2::normalized_qkv_kernels;
#endif
    default:
      return DEFAULT::normalized_qkv_kernels;
  }
}

const DenseBlockCpuKernels& dense_block_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::dense_block_kernels;
    case CpuCapability::avx2:
      return AVX2::dense_block_kernels;
#endif
    default:
      return DEFAULT::dense_block_kernels;
  }
}

const ConvReluCpuKernels& conv_relu_cpu_kernels() {
  switch (cpu_capability()) {
#if defined(__x86_64__)
    case CpuCapability::avx512:
      return AVX512::conv_relu_kernels;
    case CpuCapability::avx2:
      return AVX2::conv_relu_kernels;
#endif
    default:
      return DEFAULT::conv_relu_kernels;
  }
}

}  // namespace mitnet_fast
