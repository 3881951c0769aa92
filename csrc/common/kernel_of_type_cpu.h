// The choice of a kernel by the data type of a call: float32, float64 or bfloat16.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "common/tensor_view.h"
#include "common/vectors_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

// Calls function with a kernel made for the call's data type.
template <template <typename S> class Kernel, typename Call, typename Function>
auto with_kernel(const Call& call, Function function) {
  switch (call.shape.dtype) {
    case DataType::float64:
      return function(Kernel<double>{call});
    case DataType::bfloat16:
      return function(Kernel<c10::BFloat16>{call});
    default:
      return function(Kernel<float>{call});
  }
}

template <template <typename S> class Kernel, typename Call>
int64_t workspace_bytes(const Call& call, int threads) {
  return with_kernel<Kernel>(call, [&](const auto& kernel) { return kernel.workspace_bytes(threads); });
}

template <template <typename S> class Kernel, typename Call>
void launch(const Call& call, void* workspace, int threads) {
  with_kernel<Kernel>(call, [&](const auto& kernel) { kernel.launch(workspace, threads); });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
