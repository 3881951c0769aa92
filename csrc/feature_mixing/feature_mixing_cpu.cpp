#include "feature_mixing/feature_mixing_cpu.h"

#include "common/kernels_of_capability.h"

namespace mitnet_fast {

DEFINE_CPU_KERNELS(FeatureMixingCpuKernels, feature_mixing)
DEFINE_CPU_KERNELS(NormalizedQkvCpuKernels, normalized_qkv)
DEFINE_CPU_KERNELS(DenseBlockCpuKernels, dense_block)
DEFINE_CPU_KERNELS(ConvReluCpuKernels, conv_relu)
DEFINE_CPU_KERNELS(ResidualConvCpuKernels, residual_conv)

}  // namespace mitnet_fast
