// The only file that knows Python: what mitnet_fast._C offers. Checks what comes in, allocates what
// goes out, and hands raw pointers to the launchers.
#include <ATen/Functions.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "dynamic_filter/dynamic_filter_cpu.h"
#ifdef MITNET_FAST_WITH_CUDA
#include "common/cuda_device.h"
#endif

namespace py = pybind11;

namespace mitnet_fast {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = MITNET_FAST_TORCH_VERSION;
#ifdef MITNET_FAST_WITH_CUDA
  info["cuda"] = MITNET_FAST_CUDA_VERSION;
  info["cuda_architectures"] = MITNET_FAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

py::list cuda_device_list() {
  py::list devices;
#ifdef MITNET_FAST_WITH_CUDA
  for (const auto& device : cuda_devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    entry["shared_memory_per_block"] = device.shared_memory_per_block;
    devices.append(entry);
  }
#endif
  return devices;
}

DataType data_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DataType::float32;
    case at::kDouble:
      return DataType::float64;
    case at::kBFloat16:
      return DataType::bfloat16;
    case at::kHalf:
      return DataType::float16;
    default:
      TORCH_CHECK_TYPE(false, "x: dtype ", tensor.scalar_type(),
                       " is not supported, allowed: float32, float64, bfloat16, float16");
  }
}

// Raises unless `tensor` has the sizes and is on the device and of the dtype of `x`.
void check_like(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == at::kStrided, name, ": expected a dense tensor");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, ": expected shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, ": expected dtype ", x.scalar_type(),
                   " as x has, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, ": expected device ", x.device(), " as x has, got ",
                    tensor.device());
}

// Raises unless `x` is a [B, C, H, W] map with at least one channel and one pixel.
void check_map(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.defined() && x.layout() == at::kStrided && x.dim() == 4, name,
                    ": expected a dense tensor [B, C, H, W], got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
                    ": needs at least one channel and one pixel, got shape ", x.sizes());
}

ConstMapView view(const at::Tensor& map) {
  return {map.const_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

MapView mutable_view(const at::Tensor& map) {
  if (!map.defined()) return {nullptr, 0, 0, 0, 0};
  return {map.mutable_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// A result of the shape of `like`, channels_last if that is how `like` lies in memory; undefined if not needed.
at::Tensor empty_for(const at::Tensor& like, bool needed = true) {
  if (!needed) return {};
  const bool channels_last = !like.is_contiguous() && like.is_contiguous(at::MemoryFormat::ChannelsLast);
  return at::empty(like.sizes(), like.options().memory_format(channels_last ? at::MemoryFormat::ChannelsLast
                                                                            : at::MemoryFormat::Contiguous));
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

template <typename Call>
void launch_on_cpu(const CpuKernel<Call>& kernel, const Call& call) {
  const int threads = max_threads();
  const at::Tensor workspace = at::empty({kernel.workspace_bytes(call, threads)}, at::kByte);
  kernel.launch(call, workspace.mutable_data_ptr(), threads);
}

[[noreturn]] void no_kernels_for(const at::Tensor& x) {
  TORCH_CHECK_VALUE(false, "x: this build has no kernels for tensors on ", x.device());
}

// K of filters with `filter_channels` channels for the channels of x.
int filter_size(const char* name, int64_t filter_channels, const at::Tensor& x) {
  const int64_t channels = x.size(1);
  for (const int size : {1, 3, 5, 7}) {
    if (filter_channels == channels * size * size) return size;
  }
  TORCH_CHECK_VALUE(false, name, ": expected C·K² filter channels with K = 1, 3, 5 or 7 for C = ", channels,
                    " channels of x, got ", filter_channels);
}

DynamicFilterShape checked_shape(const at::Tensor& x, const at::Tensor& filters, bool residual) {
  check_map("x", x);
  const DataType dtype = data_type(x);
  check_map("filters", filters);
  const int size = filter_size("filters", filters.size(1), x);
  check_like("filters", filters, {x.size(0), filters.size(1), x.size(2), x.size(3)}, x);
  return {dtype, size, x.size(0), x.size(1), x.size(2), x.size(3), residual};
}

at::Tensor dynamic_filter_forward(const at::Tensor& x, const at::Tensor& filters, bool residual) {
  const auto shape = checked_shape(x, filters, residual);
  const at::Tensor y = empty_for(x);
  const DynamicFilterForward call{shape, view(x), view(filters), mutable_view(y)};
  if (x.is_cpu()) {
    launch_on_cpu(dynamic_filter_cpu_kernels().forward, call);
  } else {
    no_kernels_for(x);
  }
  return y;
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> dynamic_filter_backward(const at::Tensor& grad,
                                                                                         const at::Tensor& x,
                                                                                         const at::Tensor& filters,
                                                                                         bool residual, bool needs_x,
                                                                                         bool needs_filters) {
  const auto shape = checked_shape(x, filters, residual);
  check_like("grad", grad, x.sizes(), x);
  const at::Tensor grad_x = empty_for(x, needs_x);
  const at::Tensor grad_filters = empty_for(filters, needs_filters);
  const DynamicFilterBackward call{shape,         view(grad),           view(x),
                                   view(filters), mutable_view(grad_x), mutable_view(grad_filters)};
  if (x.is_cpu()) {
    launch_on_cpu(dynamic_filter_cpu_kernels().backward, call);
  } else {
    no_kernels_for(x);
  }
  return {if_defined(grad_x), if_defined(grad_filters)};
}

DynamicFilterShape checked_shape(const at::Tensor& x, const at::Tensor& features, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, bool residual) {
  check_map("x", x);
  const DataType dtype = data_type(x);
  check_map("features", features);
  check_like("features", features, {x.size(0), features.size(1), x.size(2), x.size(3)}, x);
  TORCH_CHECK_VALUE(weight.defined() && weight.dim() == 2, "weight: expected shape [C·K², Cf], got ", weight.sizes());
  const int size = filter_size("weight", weight.size(0), x);
  check_like("weight", weight, {weight.size(0), features.size(1)}, x);
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 || bias->dim() == 2, "bias: expected shape [C·K²] or [B, C·K²], got ",
                      bias->sizes());
    if (bias->dim() == 1) {
      check_like("bias", *bias, {weight.size(0)}, x);
    } else {
      check_like("bias", *bias, {x.size(0), weight.size(0)}, x);
    }
  }
  return {dtype, size, x.size(0), x.size(1), x.size(2), x.size(3), residual};
}

FilterPredictor predictor_of(const at::Tensor& features, const at::Tensor& weight, const at::Tensor& bias) {
  return {view(features), features.size(1), weight.const_data_ptr(), bias.defined() ? bias.const_data_ptr() : nullptr,
          bias.defined() && bias.dim() == 2};
}

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

at::Tensor predicted_dynamic_filter_forward(const at::Tensor& x, const at::Tensor& features, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias, bool residual, bool tf32) {
  const auto shape = checked_shape(x, features, weight, bias, residual);
  const at::Tensor dense_weight = weight.contiguous(), dense_bias = contiguous(bias);
  const at::Tensor y = empty_for(x);
  const PredictedDynamicFilterForward call{shape, view(x), predictor_of(features, dense_weight, dense_bias),
                                           mutable_view(y)};
  if (x.is_cpu()) {
    launch_on_cpu(dynamic_filter_cpu_kernels().predicted_forward, call);
  } else {
    no_kernels_for(x);
  }
  return y;
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>
predicted_dynamic_filter_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& features,
                                  const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool residual,
                                  bool tf32, bool needs_x, bool needs_features, bool needs_weight, bool needs_bias) {
  const auto shape = checked_shape(x, features, weight, bias, residual);
  check_like("grad", grad, x.sizes(), x);
  TORCH_CHECK_VALUE(bias || !needs_bias, "needs_bias: there is no bias");
  const at::Tensor dense_weight = weight.contiguous(), dense_bias = contiguous(bias);
  const at::Tensor grad_x = empty_for(x, needs_x);
  const at::Tensor grad_features = empty_for(features, needs_features);
  const at::Tensor grad_weight = needs_weight ? at::empty(weight.sizes(), weight.options()) : at::Tensor();
  const at::Tensor grad_bias = needs_bias ? at::empty(bias->sizes(), bias->options()) : at::Tensor();
  const PredictedDynamicFilterBackward call{shape,
                                            view(grad),
                                            view(x),
                                            predictor_of(features, dense_weight, dense_bias),
                                            mutable_view(grad_x),
                                            mutable_view(grad_features),
                                            needs_weight ? grad_weight.mutable_data_ptr() : nullptr,
                                            needs_bias ? grad_bias.mutable_data_ptr() : nullptr};
  if (x.is_cpu()) {
    launch_on_cpu(dynamic_filter_cpu_kernels().predicted_backward, call);
  } else {
    no_kernels_for(x);
  }
  return {if_defined(grad_x), if_defined(grad_features), if_defined(grad_weight), if_defined(grad_bias)};
}

}  // namespace
}  // namespace mitnet_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace mitnet_fast;
  module.doc() = "Compiled half of mitnet_fast";
  module.def(
      "build_info", &build_info,
      "Compiler, torch and CUDA versions of this build, its CUDA architectures, and whether it is a debug build");
  module.def("cpu_capability", &cpu_capability_name,
             "Vector instructions that the kernels use on this processor: 'AVX512', 'AVX2' or 'DEFAULT'");
  module.def("cuda_devices", &cuda_device_list,
             "Every CUDA device as the CUDA runtime describes it; empty in a CPU build or without a GPU");

  const auto kernel = [](auto function) { return torch::wrap_pybind_function_no_gil(function); };
  module.def("dynamic_filter_forward", kernel(&dynamic_filter_forward), py::arg("x"), py::arg("filters"),
             py::arg("residual"));
  module.def("dynamic_filter_backward", kernel(&dynamic_filter_backward), py::arg("grad"), py::arg("x"),
             py::arg("filters"), py::arg("residual"), py::arg("needs_x"), py::arg("needs_filters"));
  module.def("predicted_dynamic_filter_forward", kernel(&predicted_dynamic_filter_forward), py::arg("x"),
             py::arg("features"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("tf32"));
  module.def("predicted_dynamic_filter_backward", kernel(&predicted_dynamic_filter_backward), py::arg("grad"),
             py::arg("x"), py::arg("features"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
             py::arg("tf32"), py::arg("needs_x"), py::arg("needs_features"), py::arg("needs_weight"),
             py::arg("needs_bias"));
}
