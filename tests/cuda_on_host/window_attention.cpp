// The launchers of window attention as functions that the harness can call. `sizes`: dtype, batch, channels,
// height, width, heads, window size, shift, tf32.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>

#include "cuda_on_host/entry.h"
#include "window_attention/window_attention_cuda.h"

using namespace mitnet_fast;

namespace {

WindowAttentionShape shape_of(const int64_t* sizes) {
  return {static_cast<DataType>(sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
}

ConstMapView input(const void* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

MapView output(void* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

}  // namespace

EXPORT window_attention_forward(const int64_t* sizes, const void* qk, const int64_t* qk_strides, const void* v,
                                const int64_t* v_strides, const void* bias_table, void* y, const int64_t* y_strides) {
  return report([&] {
    window_attention_forward_cuda(
        {shape_of(sizes), input(qk, qk_strides), input(v, v_strides), bias_table, output(y, y_strides)}, sizes[8] != 0,
        nullptr);
  });
}

EXPORT window_attention_backward(const int64_t* sizes, const void* grad, const int64_t* grad_strides, const void* qk,
                                 const int64_t* qk_strides, const void* v, const int64_t* v_strides,
                                 const void* bias_table, void* grad_qk, const int64_t* grad_qk_strides, void* grad_v,
                                 const int64_t* grad_v_strides, void* grad_bias_table) {
  return report([&] {
    const WindowAttentionBackward call{
        shape_of(sizes), input(grad, grad_strides),        input(qk, qk_strides),          input(v, v_strides),
        bias_table,      output(grad_qk, grad_qk_strides), output(grad_v, grad_v_strides), grad_bias_table};
    const int64_t bytes = window_attention_backward_workspace_cuda(call);
    const auto workspace = std::make_unique<unsigned char[]>(bytes);
    std::memset(workspace.get(), 0xff, bytes);  // NaN
    window_attention_backward_cuda(call, sizes[8] != 0, workspace.get(), nullptr);
  });
}
