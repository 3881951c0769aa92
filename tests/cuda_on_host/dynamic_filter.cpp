// The launchers of the dynamic filter as functions that the harness can call. `sizes`: dtype, K, batch, channels,
// height, width, residual, and for predicted filters the channels of the features, bias per sample and tf32.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "dynamic_filter/dynamic_filter_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

using namespace mitnet_fast;

namespace {

std::string message;

template <typename Call>
const char* report(Call&& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

DynamicFilterShape shape_of(const int64_t* sizes) {
  return {static_cast<DataType>(sizes[0]),
          static_cast<int>(sizes[1]),
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6] != 0};
}

template <typename View, typename Data>
View view(Data* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

// Memory of exactly `bytes`, a multiple of 256, that begins as NaN in every format.
struct Workspace {
  explicit Workspace(int64_t bytes) : data(std::aligned_alloc(256, bytes)) { std::memset(data, 0xff, bytes); }
  ~Workspace() { std::free(data); }
  void* const data;
};

}  // namespace

EXPORT dynamic_filter_forward(const int64_t* sizes, const void* x, const int64_t* x_strides, const void* filters,
                              const int64_t* filters_strides, void* y, const int64_t* y_strides) {
  return report([&] {
    dynamic_filter_forward_cuda({shape_of(sizes), view<ConstMapView>(x, x_strides),
                                 view<ConstMapView>(filters, filters_strides), view<MapView>(y, y_strides)},
                                nullptr);
  });
}

EXPORT dynamic_filter_backward(const int64_t* sizes, const void* grad, const int64_t* grad_strides, const void* x,
                               const int64_t* x_strides, const void* filters, const int64_t* filters_strides,
                               void* grad_x, const int64_t* grad_x_strides, void* grad_filters,
                               const int64_t* grad_filters_strides) {
  return report([&] {
    dynamic_filter_backward_cuda(
        {shape_of(sizes), view<ConstMapView>(grad, grad_strides), view<ConstMapView>(x, x_strides),
         view<ConstMapView>(filters, filters_strides), view<MapView>(grad_x, grad_x_strides),
         view<MapView>(grad_filters, grad_filters_strides)},
        nullptr);
  });
}

EXPORT predicted_dynamic_filter_forward(const int64_t* sizes, const void* x, const int64_t* x_strides,
                                        const void* features, const int64_t* features_strides, const void* weight,
                                        const void* bias, void* y, const int64_t* y_strides) {
  return report([&] {
    const PredictedDynamicFilterForward call{
        shape_of(sizes),
        view<ConstMapView>(x, x_strides),
        {view<ConstMapView>(features, features_strides), sizes[7], weight, bias, sizes[8] != 0},
        view<MapView>(y, y_strides)};
    const bool tf32 = sizes[9] != 0;
    const Workspace workspace(predicted_dynamic_filter_forward_workspace_cuda(call, tf32));
    predicted_dynamic_filter_forward_cuda(call, tf32, workspace.data, nullptr);
  });
}

EXPORT predicted_dynamic_filter_backward(const int64_t* sizes, const void* grad, const int64_t* grad_strides,
                                         const void* x, const int64_t* x_strides, const void* features,
                                         const int64_t* features_strides, const void* weight, const void* bias,
                                         void* grad_x, const int64_t* grad_x_strides, void* grad_features,
                                         const int64_t* grad_features_strides, void* grad_weight, void* grad_bias) {
  return report([&] {
    const PredictedDynamicFilterBackward call{
        shape_of(sizes),
        view<ConstMapView>(grad, grad_strides),
        view<ConstMapView>(x, x_strides),
        {view<ConstMapView>(features, features_strides), sizes[7], weight, bias, sizes[8] != 0},
        view<MapView>(grad_x, grad_x_strides),
        view<MapView>(grad_features, grad_features_strides),
        grad_weight,
        grad_bias};
    const bool tf32 = sizes[9] != 0;
    const Workspace workspace(predicted_dynamic_filter_backward_workspace_cuda(call, tf32));
    predicted_dynamic_filter_backward_cuda(call, tf32, workspace.data, nullptr);
  });
}
