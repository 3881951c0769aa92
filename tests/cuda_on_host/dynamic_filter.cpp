// The launchers of the dynamic filter as functions that the harness can call. `sizes`: dtype, K, batch, channels,
// height, width, residual, and for predicted filters the channels of the features, bias per sample and tf32.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_on_host/entry.h"
#include "dynamic_filter/dynamic_filter_cuda.h"

using namespace mitnet_fast;

namespace {

DynamicFilterShape shape_of(const int64_t* sizes) {
  return {static_cast<DataType>(sizes[0]),
          static_cast<int>(sizes[1]),
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6] != 0};
}

// A dimension of all maps whose entries are to lie 1.5·2^30 elements apart; −1 for none.
int64_t spread = -1;

// A map's elements in memory of their own, most of it never touched, and back when the call is over.
class SpreadMap {
 public:
  SpreadMap(void* near, const int64_t* strides, std::vector<int64_t> shape, int64_t element)
      : near_(static_cast<char*>(near)), near_strides_(strides), shape_(std::move(shape)), element_(element) {
    for (int d = 0; d < 4; ++d) far_strides[d] = d == spread ? 3 * (int64_t{1} << 29) : strides[d];
    bytes_ = element;
    for (int d = 0; d < 4; ++d) bytes_ += (shape_[d] - 1) * far_strides[d] * element;
    data = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (data == MAP_FAILED) throw std::runtime_error("mmap");
    copy(data, far_strides, near_, near_strides_);
  }
  SpreadMap(const SpreadMap&) = delete;
  ~SpreadMap() {
    copy(near_, near_strides_, data, far_strides);
    munmap(data, bytes_);
  }

  char* data;
  int64_t far_strides[4];

 private:
  void copy(char* to, const int64_t* to_strides, const char* from, const int64_t* from_strides) const {
    for (int64_t n = 0; n < shape_[0]; ++n)
      for (int64_t c = 0; c < shape_[1]; ++c)
        for (int64_t h = 0; h < shape_[2]; ++h)
          for (int64_t w = 0; w < shape_[3]; ++w) {
            const auto at = [&](const int64_t* s) { return (n * s[0] + c * s[1] + h * s[2] + w * s[3]) * element_; };
            std::memcpy(to + at(to_strides), from + at(from_strides), element_);
          }
  }

  char* near_;
  const int64_t* near_strides_;
  std::vector<int64_t> shape_;
  int64_t element_;
  size_t bytes_;
};

// The maps of one call.
class Maps {
 public:
  explicit Maps(const int64_t* sizes) : sizes_(sizes) {}

  template <typename View = ConstMapView, typename Data>
  View operator()(Data* data, const int64_t* strides, int64_t channels) {
    if (spread < 0 || data == nullptr) return {data, strides[0], strides[1], strides[2], strides[3]};
    const int64_t element = sizes_[0] == 0 ? 4 : 2;
    spread_.push_back(std::make_unique<SpreadMap>(const_cast<void*>(static_cast<const void*>(data)), strides,
                                                  std::vector<int64_t>{sizes_[2], channels, sizes_[4], sizes_[5]},
                                                  element));
    const int64_t* s = spread_.back()->far_strides;
    return {spread_.back()->data, s[0], s[1], s[2], s[3]};
  }

 private:
  const int64_t* sizes_;
  std::vector<std::unique_ptr<SpreadMap>> spread_;
};

// Memory of exactly `bytes`, a multiple of 256, that begins as NaN in every format.
struct Workspace {
  explicit Workspace(int64_t bytes) : data(std::aligned_alloc(256, bytes)) { std::memset(data, 0xff, bytes); }
  ~Workspace() { std::free(data); }
  void* const data;
};

}  // namespace

EXPORT spread_maps(int64_t dimension) {
  spread = dimension;
  return nullptr;
}

EXPORT dynamic_filter_forward(const int64_t* sizes, const void* x, const int64_t* x_strides, const void* filters,
                              const int64_t* filters_strides, void* y, const int64_t* y_strides) {
  return report([&] {
    Maps map(sizes);
    const int64_t channels = sizes[3], filter_channels = channels * sizes[1] * sizes[1];
    dynamic_filter_forward_cuda(
        {shape_of(sizes), map(x, x_strides, channels), map(filters, filters_strides, filter_channels),
         map.operator()<MapView>(y, y_strides, channels)},
        nullptr);
  });
}

EXPORT dynamic_filter_backward(const int64_t* sizes, const void* grad, const int64_t* grad_strides, const void* x,
                               const int64_t* x_strides, const void* filters, const int64_t* filters_strides,
                               void* grad_x, const int64_t* grad_x_strides, void* grad_filters,
                               const int64_t* grad_filters_strides) {
  return report([&] {
    Maps map(sizes);
    const int64_t channels = sizes[3], filter_channels = channels * sizes[1] * sizes[1];
    dynamic_filter_backward_cuda(
        {shape_of(sizes), map(grad, grad_strides, channels), map(x, x_strides, channels),
         map(filters, filters_strides, filter_channels), map.operator()<MapView>(grad_x, grad_x_strides, channels),
         map.operator()<MapView>(grad_filters, grad_filters_strides, filter_channels)},
        nullptr);
  });
}

EXPORT predicted_dynamic_filter_forward(const int64_t* sizes, const void* x, const int64_t* x_strides,
                                        const void* features, const int64_t* features_strides, const void* weight,
                                        const void* bias, void* y, const int64_t* y_strides) {
  return report([&] {
    Maps map(sizes);
    const PredictedDynamicFilterForward call{
        shape_of(sizes),
        map(x, x_strides, sizes[3]),
        {map(features, features_strides, sizes[7]), sizes[7], weight, bias, sizes[8] != 0},
        map.operator()<MapView>(y, y_strides, sizes[3])};
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
    Maps map(sizes);
    const PredictedDynamicFilterBackward call{
        shape_of(sizes),
        map(grad, grad_strides, sizes[3]),
        map(x, x_strides, sizes[3]),
        {map(features, features_strides, sizes[7]), sizes[7], weight, bias, sizes[8] != 0},
        map.operator()<MapView>(grad_x, grad_x_strides, sizes[3]),
        map.operator()<MapView>(grad_features, grad_features_strides, sizes[7]),
        grad_weight,
        grad_bias};
    const bool tf32 = sizes[9] != 0;
    const Workspace workspace(predicted_dynamic_filter_backward_workspace_cuda(call, tf32));
    predicted_dynamic_filter_backward_cuda(call, tf32, workspace.data, nullptr);
  });
}
