// Launches with every error turned into an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace mitnet_fast {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // reported here, not to whoever asks next
  throw std::runtime_error(message);
}

inline int checked_int(int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(value) + " is more than CUDA kernels take");
  }
  return static_cast<int>(value);
}

inline int64_t blocks_of(int64_t size, int64_t of_block) { return (size + of_block - 1) / of_block; }

// Launches `kernel` on blocks of `threads` threads with `shared` bytes of dynamic shared memory each.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  constexpr size_t without_asking = 48 * 1024;
  if (shared > without_asking) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace mitnet_fast
