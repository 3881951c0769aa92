// CUDA C++ as plain C++: what the kernels' sources include instead of NVIDIA's header.
#pragma once

#include <tuple>
#include <utility>

#include "cuda_on_host/block.h"
#include "cuda_on_host/intrinsics.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::cuda_on_host::current->index)
#define blockIdx (::cuda_on_host::current->block->index)
// functions, since cudaLaunchConfig_t has members of these names
#define blockDim cuda_on_host_block_size()
#define gridDim cuda_on_host_grid_size()
inline const dim3& cuda_on_host_block_size() { return cuda_on_host::current->block->size; }
inline const dim3& cuda_on_host_grid_size() { return cuda_on_host::current->block->grid; }
constexpr int warpSize = 32;

template <typename T>
cudaError_t cudaFuncSetAttribute(T* function, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* argument);

// What `extern __shared__ T name[];` declares.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(current->block->dynamic_shared());
}

// What `__shared__ declaration;` declares, as the member of a struct of its own.
template <typename Variable>
Variable& shared_variable() {
  static const char key = 0;
  return *static_cast<Variable*>(current->block->shared_variable(&key, sizeof(Variable), alignof(Variable)));
}

}  // namespace cuda_on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* pointer) {
    const auto* call = static_cast<const Call*>(pointer);
    std::apply(call->kernel, call->parameters);
  };
  return cuda_on_host::launch(*config, reinterpret_cast<const void*>(kernel), body, &call);
}
