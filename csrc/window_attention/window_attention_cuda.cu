#include <stdexcept>

#include "window_attention/window_attention_cuda.cuh"
#include "window_attention/window_attention_cuda.h"

namespace mitnet_fast {

#define MITNET_FAST_DECLARED_FOR(Products)                                                       \
  extern template void attention_forward<Products>(const WindowAttentionForward&, cudaStream_t); \
  extern template void attention_backward<Products>(const WindowAttentionBackward&, void*, cudaStream_t);
MITNET_FAST_DECLARED_FOR(HalfAttention<__nv_bfloat16>)
MITNET_FAST_DECLARED_FOR(HalfAttention<__half>)
MITNET_FAST_DECLARED_FOR(Tf32Attention)
MITNET_FAST_DECLARED_FOR(IeeeAttention)
#undef MITNET_FAST_DECLARED_FOR

// Calls visitor(products) with a value of the way of multiplying.
template <typename Visitor>
void with_products(DataType dtype, bool tf32, Visitor&& visitor) {
  switch (dtype) {
    case DataType::float32:
      return tf32 ? visitor(Tf32Attention()) : visitor(IeeeAttention());
    case DataType::bfloat16:
      return visitor(HalfAttention<__nv_bfloat16>());
    case DataType::float16:
      return visitor(HalfAttention<__half>());
    default:
      throw std::invalid_argument("v: CUDA kernels take float32, bfloat16 and float16");
  }
}

void window_attention_forward_cuda(const WindowAttentionForward& call, bool tf32, void* stream) {
  with_products(call.shape.dtype, tf32,
                [&](auto products) { attention_forward<decltype(products)>(call, static_cast<cudaStream_t>(stream)); });
}

int64_t window_attention_backward_workspace_cuda(const WindowAttentionBackward& call) {
  return workspace_of(call).bytes;
}

void window_attention_backward_cuda(const WindowAttentionBackward& call, bool tf32, void* workspace, void* stream) {
  with_products(call.shape.dtype, tf32, [&](auto products) {
    attention_backward<decltype(products)>(call, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mitnet_fast
