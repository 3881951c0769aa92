// Feature mixing on the CPU.
#pragma once

#include "common/cpu_kernel.h"
#include "feature_mixing/feature_mixing.h"

namespace mitnet_fast {

struct FeatureMixingCpuKernels {
  CpuKernel<PointwiseMlpForward> mlp_forward;
  CpuKernel<PointwiseMlpBackward> mlp_backward;
  CpuKernel<LocalMixingForward> local_forward;
  CpuKernel<LocalMixingBackward> local_backward;
};

struct NormalizedQkvCpuKernels {
  CpuKernel<NormalizedQkvForward> forward;
  CpuKernel<NormalizedQkvBackward> backward;
};

struct DenseBlockCpuKernels {
  CpuKernel<DenseBlockForward> forward;
  CpuKernel<DenseBlockBackward> backward;
};

struct ConvReluCpuKernels {
  CpuKernel<ConvReluForward> forward;
};

struct ResidualConvCpuKernels {
  CpuKernel<ResidualConvForward> forward;
  CpuKernel<ResidualConvBackward> backward;
};

// Those for cpu_capability(), for all data types but float16.
const FeatureMixingCpuKernels& feature_mixing_cpu_kernels();
const NormalizedQkvCpuKernels& normalized_qkv_cpu_kernels();
const DenseBlockCpuKernels& dense_block_cpu_kernels();
const ConvReluCpuKernels& conv_relu_cpu_kernels();
const ResidualConvCpuKernels& residual_conv_cpu_kernels();

}  // namespace mitnet_fast
