// The choice among kernels that are compiled once per instruction set.
#pragma once

#include "common/cpu_capability.h"

#if defined(__x86_64__)
#define KERNELS_BEYOND_DEFAULT(Kernels, name) \
  namespace AVX2 {                            \
  extern const Kernels name##_kernels;        \
  }                                           \
  namespace AVX512 {                          \
  extern const Kernels name##_kernels;        \
  }
#define RETURN_KERNELS_BEYOND_DEFAULT(name) \
  case CpuCapability::avx512:               \
    return AVX512::name##_kernels;          \
  case CpuCapability::avx2:                 \
    return AVX2::name##_kernels;
#else
#define KERNELS_BEYOND_DEFAULT(Kernels, name)
#define RETURN_KERNELS_BEYOND_DEFAULT(name)
#endif

// Defines name_cpu_kernels(), the name_kernels of cpu_capability(); to be used in namespace mitnet_fast.
#define DEFINE_CPU_KERNELS(Kernels, name) \
  namespace DEFAULT {                     \
  extern const Kernels name##_kernels;    \
  }                                       \
  KERNELS_BEYOND_DEFAULT(Kernels, name)   \
  const Kernels& name##_cpu_kernels() {   \
    switch (cpu_capability()) {           \
      RETURN_KERNELS_BEYOND_DEFAULT(name) \
      default:                            \
        return DEFAULT::name##_kernels;   \
    }                                     \
  }
