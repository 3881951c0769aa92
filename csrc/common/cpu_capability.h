// Which vector instructions the kernels use.
#pragma once

#include <string>

namespace mitnet_fast {

enum class CpuCapability { baseline, avx2, avx512 };

// The widest that this build has code for and that the processor and its operating system offer. As
// in PyTorch, the environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers it.
CpuCapability cpu_capability();

// "DEFAULT", "AVX2" or "AVX512", the names that PyTorch uses for its own kernels.
std::string cpu_capability_name();

}  // namespace mitnet_fast
