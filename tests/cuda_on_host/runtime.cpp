#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"

namespace {

constexpr size_t shared_by_default = 48 * 1024;
constexpr size_t shared_at_most = 227 * 1024;  // of an H100

std::mutex mutex;
std::map<const void*, size_t> shared_limits;  // of kernels that asked for more than the default
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_fault;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return last_fault.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_at_most;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t count, cudaStream_t) {
  std::memset(pointer, value, count);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, count);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > shared_at_most) return report(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(mutex);
  shared_limits[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* argument) {
  const dim3 grid = config.grid_size, block = config.block_size;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || !block.x ||
      !block.y || !block.z || block.z > 64 || block.x > 1024 || block.y > 1024 || block.x * block.y * block.z > 1024) {
    return report(cudaErrorInvalidConfiguration);
  }
  size_t limit = shared_by_default;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = shared_limits.find(kernel);
    if (found != shared_limits.end()) limit = std::max(limit, found->second);
  }
  if (config.dynamicSmemBytes > limit) return report(cudaErrorInvalidValue);
  try {
    run_grid(grid, block, config.dynamicSmemBytes, body, argument);
  } catch (const Fault& fault) {
    last_fault = fault.what();
    return report(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

}  // namespace cuda_on_host

extern "C" __attribute__((visibility("default"))) void cuda_on_host_configure(int order, uint64_t seed, int workers) {
  cuda_on_host::settings() = {static_cast<cuda_on_host::Order>(order), seed, workers};
}
