// A kernel for the CPU as its translation unit offers it. Sources named *_cpu_kernels.cpp are compiled
// once per instruction set, into the namespaces mitnet_fast::DEFAULT, ::AVX2 and ::AVX512.
#pragma once

#include <cstdint>

namespace mitnet_fast {

// A call needs a workspace of workspace_bytes(call, threads) bytes, aligned to 64, of any content,
// and runs on at most that many threads. Results do not depend on their number.
template <typename Call>
struct CpuKernel {
  int64_t (*workspace_bytes)(const Call& call, int threads);
  void (*launch)(const Call& call, void* workspace, int threads);
};

}  // namespace mitnet_fast
