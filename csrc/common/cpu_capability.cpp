#include "cpu_capability.h"

namespace mitnet_fast {

std::string cpu_capability() {
#if defined(__x86_64__)
  // __builtin_cpu_supports asks the operating system too: registers it does not save count as absent
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return "AVX512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
  return "DEFAULT";
}

}  // namespace mitnet_fast
