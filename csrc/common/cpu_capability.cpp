#include "common/cpu_capability.h"

#include <algorithm>
#include <cstdlib>

namespace mitnet_fast {
namespace {

CpuCapability offered() {
#if defined(__x86_64__)
  // __builtin_cpu_supports asks the operating system too: registers it does not save count as absent
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return CpuCapability::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return CpuCapability::avx512;
  return CpuCapability::avx2;
#else
  return CpuCapability::baseline;
#endif
}

CpuCapability allowed() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && std::string(wanted) == "default") return CpuCapability::baseline;
  if (wanted && std::string(wanted) == "avx2") return CpuCapability::avx2;
  return CpuCapability::avx512;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = std::min(offered(), allowed());
  return capability;
}

std::string cpu_capability_name() {
  switch (cpu_capability()) {
    case CpuCapability::avx512:
      return "AVX512";
    case CpuCapability::avx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

}  // namespace mitnet_fast
