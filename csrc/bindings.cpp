// The only file that knows Python: what mitnet_fast._C offers. Checks what comes in, allocates what
// goes out, and hands raw pointers to the launchers.
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "amplitude_phase/amplitude_phase_cpu.h"
#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "dynamic_filter/dynamic_filter_cpu.h"
#include "feature_mixing/feature_mixing_cpu.h"
#include "window_attention/window_attention_cpu.h"
#ifdef MITNET_FAST_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "amplitude_phase/amplitude_phase_cuda.h"
#include "common/cuda_device.h"
#include "dynamic_filter/dynamic_filter_cuda.h"
#include "window_attention/window_attention_cuda.h"
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

DataType data_type(const at::Tensor& tensor, const char* name = "x") {
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
      TORCH_CHECK_TYPE(false, name, ": dtype ", tensor.scalar_type(),
                       " is not supported, allowed: float32, float64, bfloat16, float16");
  }
}

// Raises unless `tensor` has the sizes and is on the device and of the dtype of `x`.
void check_like(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, const at::Tensor& x,
                const char* x_name = "x") {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == at::kStrided, name, ": expected a dense tensor");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, ": expected shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, ": expected dtype ", x.scalar_type(), " as ", x_name,
                   " has, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, ": expected device ", x.device(), " as ", x_name, " has, got ",
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

// A result of these sizes, channels_last if that is how `like` lies in memory.
at::Tensor empty_for(const at::Tensor& like, at::IntArrayRef sizes) {
  const bool channels_last = !like.is_contiguous() && like.is_contiguous(at::MemoryFormat::ChannelsLast);
  return at::empty(sizes, like.options().memory_format(channels_last ? at::MemoryFormat::ChannelsLast
                                                                     : at::MemoryFormat::Contiguous));
}

// A result of the shape of `like`, undefined if not needed.
at::Tensor empty_for(const at::Tensor& like, bool needed = true) {
  return needed ? empty_for(like, like.sizes()) : at::Tensor();
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// The workspace is zeroed where the kernel reads what it has not written: vectors run over the gaps between rows and
// channels. What lies there reaches no result, but products of subnormal numbers, which memory that others have used is
// full of, take a hundred times as long.
template <typename Call>
void launch_on_cpu(const CpuKernel<Call>& kernel, const Call& call, bool reads_gaps = true) {
  const int threads = max_threads();
  const at::Tensor workspace = at::empty({kernel.workspace_bytes(call, threads)}, at::kByte);
  if (reads_gaps) workspace.zero_();
  kernel.launch(call, workspace.mutable_data_ptr(), threads);
}

#ifdef MITNET_FAST_WITH_CUDA
// Calls launcher(workspace, stream) on the device of `x` and its current stream, with `bytes` of workspace.
template <typename Launcher>
void launch_on_cuda(const at::Tensor& x, int64_t bytes, Launcher&& launcher) {
  const c10::DeviceGuard guard(x.device());
  const at::Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
  const c10::Stream stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device());
  launcher(workspace.mutable_data_ptr(), stream.native_handle());
}
#endif

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
#ifdef MITNET_FAST_WITH_CUDA
  } else if (x.is_cuda()) {
    launch_on_cuda(x, 0, [&](void*, void* stream) { dynamic_filter_forward_cuda(call, stream); });
#endif
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
#ifdef MITNET_FAST_WITH_CUDA
  } else if (x.is_cuda()) {
    launch_on_cuda(x, 0, [&](void*, void* stream) { dynamic_filter_backward_cuda(call, stream); });
#endif
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
#ifdef MITNET_FAST_WITH_CUDA
  } else if (x.is_cuda()) {
    launch_on_cuda(x, predicted_dynamic_filter_forward_workspace_cuda(call, tf32), [&](void* workspace, void* stream) {
      predicted_dynamic_filter_forward_cuda(call, tf32, workspace, stream);
    });
#endif
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
#ifdef MITNET_FAST_WITH_CUDA
  } else if (x.is_cuda()) {
    launch_on_cuda(x, predicted_dynamic_filter_backward_workspace_cuda(call, tf32), [&](void* workspace, void* stream) {
      predicted_dynamic_filter_backward_cuda(call, tf32, workspace, stream);
    });
#endif
  } else {
    no_kernels_for(x);
  }
  return {if_defined(grad_x), if_defined(grad_features), if_defined(grad_weight), if_defined(grad_bias)};
}

AmplitudePhaseShape checked_shape(const at::Tensor& x, const at::Tensor& weight1, const at::Tensor& bias1,
                                  const at::Tensor& weight2, const at::Tensor& bias2,
                                  const std::optional<at::Tensor>& output_weight,
                                  const std::optional<at::Tensor>& output_bias, bool phase, double negative_slope,
                                  bool tf32) {
  check_map("x", x);
  const DataType dtype = data_type(x);
  TORCH_CHECK_TYPE(dtype == DataType::float32 || dtype == DataType::float64, "x: dtype ", x.scalar_type(),
                   " is not supported, allowed: float32, float64");
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(weight1.defined() && weight1.dim() == 2, "weight1: expected shape [Ch, C], got ", weight1.sizes());
  const int64_t hidden = weight1.size(0);
  check_like("weight1", weight1, {hidden, channels}, x);
  check_like("bias1", bias1, {hidden}, x);
  check_like("weight2", weight2, {channels, hidden}, x);
  check_like("bias2", bias2, {channels}, x);
  int64_t out_channels = channels;
  bool skip = false;
  if (output_weight) {
    const auto sizes = output_weight->sizes();
    TORCH_CHECK_VALUE(sizes.size() == 2 && (sizes[1] == channels || sizes[1] == 2 * channels),
                      "output_weight: expected shape [Co, C] or [Co, 2C] with C = ", channels, ", got ", sizes);
    out_channels = sizes[0];
    skip = sizes[1] == 2 * channels;
    check_like("output_weight", *output_weight, sizes, x);
  }
  if (output_bias) {
    TORCH_CHECK_VALUE(output_weight, "output_bias: taken only with output_weight");
    check_like("output_bias", *output_bias, {out_channels}, x);
  }
  return {dtype, x.size(0), channels, hidden, out_channels, x.size(2), x.size(3), phase, negative_slope, tf32, skip};
}

// Contiguous tensors behind a SpectralMap.
struct SpectralWeights {
  at::Tensor weight1, bias1, weight2, bias2, output_weight, output_bias;

  SpectralWeights(const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2,
                  const at::Tensor& bias2, const std::optional<at::Tensor>& output_weight,
                  const std::optional<at::Tensor>& output_bias)
      : weight1(weight1.contiguous()),
        bias1(bias1.contiguous()),
        weight2(weight2.contiguous()),
        bias2(bias2.contiguous()),
        output_weight(contiguous(output_weight)),
        output_bias(contiguous(output_bias)) {}

  SpectralMap map() const {
    const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
    return {data(weight1), data(bias1), data(weight2), data(bias2), data(output_weight), data(output_bias)};
  }
};

// Calls function(first, planes) for groups of the planes of a sample, which fit into cache with what the FFT
// library allocates. It runs on one thread inside, so that its results do not depend on their number.
template <typename Function>
void for_each_group_of_planes(const AmplitudePhaseShape& shape, int64_t planes, Function function) {
  constexpr int64_t cache = 1 << 19, fewest_groups = 4;
  const int64_t bytes = shape.height * shape.width * (shape.dtype == DataType::float64 ? 8 : 4);
  const int64_t size = std::max<int64_t>(1, std::min(cache / bytes, (planes + fewest_groups - 1) / fewest_groups));
  parallel_tasks((planes + size - 1) / size, max_threads(), [&](int64_t group, int) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // a thread has a state of its own
    function(group * size, std::min(size, planes - group * size));
  });
}

// Real planes [C, H, W] in the memory of their half spectra.
at::Tensor planes_in(const at::Tensor& spectrum, const AmplitudePhaseShape& shape) {
  return at::view_as_real(spectrum).as_strided({spectrum.size(0), shape.height, shape.width},
                                               {2 * shape.bins(), shape.width, 1});
}

// The half spectrum [C, H, W/2 + 1] of one sample [C, H, W]. The FFT library's rounding depends on how its
// input is aligned: it gets one that always is.
at::Tensor half_spectrum_on_cpu(const AmplitudePhaseShape& shape, const at::Tensor& sample) {
  const at::Tensor spectrum = at::empty({sample.size(0), shape.height, shape.columns()},
                                        sample.options().dtype(at::toComplexType(sample.scalar_type())));
  at::Tensor all_images = sample;
  if (!sample.is_contiguous()) {
    all_images = planes_in(spectrum, shape);
    amplitude_phase_cpu_kernels().to_planes(shape, view(sample.unsqueeze(0)), sample.size(0),
                                            spectrum.mutable_data_ptr(), max_threads());
  }
  for_each_group_of_planes(shape, sample.size(0), [&](int64_t first, int64_t planes) {
    at::Tensor images = all_images.narrow(0, first, planes);
    if (!images.is_contiguous() || reinterpret_cast<uintptr_t>(images.const_data_ptr()) % 64 != 0)
      images = at::empty(images.sizes(), images.options()).copy_(images);
    const at::Tensor target = spectrum.narrow(0, first, planes);
    target.copy_(at::_fft_r2c(images, {1, 2}, /*normalization=*/0, /*onesided=*/true));
    clear_real_bins(shape, target.mutable_data_ptr(), planes);
  });
  return spectrum;
}

// Writes the unnormalised inverse transform of a half spectrum, which is overwritten.
void inverse_on_cpu(const AmplitudePhaseShape& shape, const at::Tensor& spectrum, const at::Tensor& images) {
  const at::Tensor all_planes = images.is_contiguous() ? images : planes_in(spectrum, shape);
  for_each_group_of_planes(shape, spectrum.size(0), [&](int64_t first, int64_t planes) {
    const at::Tensor source = spectrum.narrow(0, first, planes);
    make_hermitian(shape, source.mutable_data_ptr(), planes);
    all_planes.narrow(0, first, planes).copy_(at::_fft_c2r(source, {1, 2}, /*normalization=*/0, shape.width));
  });
  if (!images.is_contiguous()) {
    amplitude_phase_cpu_kernels().from_planes(shape, spectrum.const_data_ptr(), images.size(0),
                                              mutable_view(images.unsqueeze(0)), max_threads());
  }
}

#ifdef MITNET_FAST_WITH_CUDA
void check_on_cuda(const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x: dtype ", x.scalar_type(),
                   " is not supported on CUDA devices, allowed: float32");
}

// The half spectrum [B, C, H, W/2 + 1] of images.
at::Tensor half_spectrum_on_cuda(const at::Tensor& x) {
  return at::_fft_r2c(x.contiguous(), {2, 3}, /*normalization=*/0, /*onesided=*/true).contiguous();
}

at::Tensor laid_out_like(const at::Tensor& x, const at::Tensor& result) {
  const bool channels_last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  return result.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

at::Tensor forward_on_cuda(const AmplitudePhaseShape& shape, const SpectralMap& map, const at::Tensor& x) {
  check_on_cuda(x);
  const c10::DeviceGuard guard(x.device());
  AmplitudePhaseForward call{shape, map, nullptr, nullptr};
  at::Tensor y;
  if (shape.batch == 0 || has_images_cuda(shape)) {
    const at::Tensor image = x.contiguous();
    y = at::empty({shape.batch, shape.out_channels, shape.height, shape.width}, image.options());
    call.x = image.const_data_ptr();
    call.y = y.mutable_data_ptr();
    launch_on_cuda(x, amplitude_phase_images_forward_workspace_cuda(call), [&](void* workspace, void* stream) {
      amplitude_phase_images_forward_cuda(call, workspace, stream);
    });
  } else {
    const at::Tensor spectrum = half_spectrum_on_cuda(x);
    const at::Tensor mapped =
        at::empty({shape.batch, shape.out_channels, shape.height, shape.columns()}, spectrum.options());
    call.x = spectrum.const_data_ptr();
    call.y = mapped.mutable_data_ptr();
    launch_on_cuda(x, amplitude_phase_forward_workspace_cuda(call),
                   [&](void* workspace, void* stream) { amplitude_phase_forward_cuda(call, workspace, stream); });
    y = at::_fft_c2r(mapped, {2, 3}, /*normalization=*/0, shape.width);
  }
  return laid_out_like(x, y);
}

// `call` has everything but maps; returns the gradient of x if it is needed.
at::Tensor backward_on_cuda(AmplitudePhaseBackward call, const at::Tensor& grad, const at::Tensor& x, bool needs_x) {
  check_on_cuda(x);
  const c10::DeviceGuard guard(x.device());
  at::Tensor grad_x;
  if (call.shape.batch == 0 || has_images_cuda(call.shape)) {
    const at::Tensor image = x.contiguous(), grad_image = grad.contiguous();
    if (needs_x) grad_x = at::empty(x.sizes(), image.options());
    call.x = image.const_data_ptr();
    call.grad = grad_image.const_data_ptr();
    call.grad_x = needs_x ? grad_x.mutable_data_ptr() : nullptr;
    launch_on_cuda(x, amplitude_phase_images_backward_workspace_cuda(call), [&](void* workspace, void* stream) {
      amplitude_phase_images_backward_cuda(call, workspace, stream);
    });
  } else {
    const at::Tensor spectrum = half_spectrum_on_cuda(x), grad_spectrum = half_spectrum_on_cuda(grad);
    const at::Tensor result = needs_x ? at::empty_like(spectrum) : at::Tensor();
    call.x = spectrum.const_data_ptr();
    call.grad = grad_spectrum.const_data_ptr();
    call.grad_x = needs_x ? result.mutable_data_ptr() : nullptr;
    launch_on_cuda(x, amplitude_phase_backward_workspace_cuda(call),
                   [&](void* workspace, void* stream) { amplitude_phase_backward_cuda(call, workspace, stream); });
    if (needs_x) grad_x = at::_fft_c2r(result, {2, 3}, /*normalization=*/0, call.shape.width);
  }
  return needs_x ? laid_out_like(x, grad_x) : grad_x;
}

at::Tensor spectrum_on_cuda(const AmplitudePhaseShape& shape, const at::Tensor& x) {
  check_on_cuda(x);
  const c10::DeviceGuard guard(x.device());
  if (shape.batch == 0 || has_images_cuda(shape)) {
    const at::Tensor image = x.contiguous();
    const at::Tensor spectrum =
        at::empty({shape.batch, shape.channels, shape.height, shape.columns(), 2}, image.options());
    launch_on_cuda(x, amplitude_phase_images_spectrum_workspace_cuda(shape), [&](void* workspace, void* stream) {
      amplitude_phase_images_spectrum_cuda(shape, image.const_data_ptr(), spectrum.mutable_data_ptr(), workspace,
                                           stream);
    });
    return spectrum;
  }
  const at::Tensor spectrum = at::view_as_real(half_spectrum_on_cuda(x));
  const auto self_conjugate = [](const at::Tensor& bins, int64_t dimension, int64_t side) {
    return side % 2 ? bins.narrow(dimension, 0, 1) : bins.slice(dimension, 0, bins.size(dimension), side / 2);
  };
  self_conjugate(self_conjugate(spectrum, 2, shape.height), 3, shape.width).select(-1, 1).zero_();
  return spectrum;
}
#endif

at::Tensor amplitude_phase_conv_forward(const at::Tensor& x, const at::Tensor& weight1, const at::Tensor& bias1,
                                        const at::Tensor& weight2, const at::Tensor& bias2,
                                        const std::optional<at::Tensor>& output_weight,
                                        const std::optional<at::Tensor>& output_bias, bool phase, double negative_slope,
                                        bool tf32) {
  const at::NoGradGuard no_grad;
  const auto shape =
      checked_shape(x, weight1, bias1, weight2, bias2, output_weight, output_bias, phase, negative_slope, tf32);
  const SpectralWeights weights(weight1, bias1, weight2, bias2, output_weight, output_bias);
#ifdef MITNET_FAST_WITH_CUDA
  if (x.is_cuda()) return forward_on_cuda(shape, weights.map(), x);
#endif
  const at::Tensor y = empty_for(x, {shape.batch, shape.out_channels, shape.height, shape.width});
  if (!x.is_cpu()) no_kernels_for(x);
  AmplitudePhaseShape sample = shape;
  sample.batch = 1;
  for (int64_t n = 0; n < shape.batch; ++n) {
    const at::Tensor spectrum = half_spectrum_on_cpu(sample, x[n]);
    const at::Tensor mapped = shape.out_channels == shape.channels
                                  ? spectrum
                                  : at::empty({shape.out_channels, shape.height, shape.columns()}, spectrum.options());
    const AmplitudePhaseForward call{sample, weights.map(), spectrum.const_data_ptr(), mapped.mutable_data_ptr()};
    launch_on_cpu(amplitude_phase_cpu_kernels().forward, call);
    inverse_on_cpu(sample, mapped, y[n]);
  }
  return y;
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>,
           std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>
amplitude_phase_conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight1,
                              const at::Tensor& bias1, const at::Tensor& weight2, const at::Tensor& bias2,
                              const std::optional<at::Tensor>& output_weight,
                              const std::optional<at::Tensor>& output_bias, bool phase, double negative_slope,
                              bool tf32, bool needs_x, bool needs_weight1, bool needs_bias1, bool needs_weight2,
                              bool needs_bias2, bool needs_output_weight, bool needs_output_bias) {
  const at::NoGradGuard no_grad;
  const auto shape =
      checked_shape(x, weight1, bias1, weight2, bias2, output_weight, output_bias, phase, negative_slope, tf32);
  check_like("grad", grad, {shape.batch, shape.out_channels, shape.height, shape.width}, x);
  TORCH_CHECK_VALUE(output_weight || !needs_output_weight, "needs_output_weight: there is no output_weight");
  TORCH_CHECK_VALUE(output_bias || !needs_output_bias, "needs_output_bias: there is no output_bias");
  const SpectralWeights weights(weight1, bias1, weight2, bias2, output_weight, output_bias);
  const auto gradient_of = [](const at::Tensor& weight, bool needed) {
    return needed ? at::empty(weight.sizes(), weight.options()) : at::Tensor();
  };
  const auto data = [](const at::Tensor& gradient) {
    return gradient.defined() ? gradient.mutable_data_ptr() : nullptr;
  };
  const at::Tensor grad_weight1 = gradient_of(weight1, needs_weight1), grad_bias1 = gradient_of(bias1, needs_bias1);
  const at::Tensor grad_weight2 = gradient_of(weight2, needs_weight2), grad_bias2 = gradient_of(bias2, needs_bias2);
  const at::Tensor grad_output_weight = gradient_of(weights.output_weight, needs_output_weight);
  const at::Tensor grad_output_bias = gradient_of(weights.output_bias, needs_output_bias);
  const AmplitudePhaseBackward call{shape,
                                    weights.map(),
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    data(grad_weight1),
                                    data(grad_bias1),
                                    data(grad_weight2),
                                    data(grad_bias2),
                                    data(grad_output_weight),
                                    data(grad_output_bias)};
#ifdef MITNET_FAST_WITH_CUDA
  if (x.is_cuda()) {
    const at::Tensor result = backward_on_cuda(call, grad, x, needs_x);
    return {if_defined(result),          if_defined(grad_weight1), if_defined(grad_bias1),
            if_defined(grad_weight2),    if_defined(grad_bias2),   if_defined(grad_output_weight),
            if_defined(grad_output_bias)};
  }
#endif
  if (!x.is_cpu()) no_kernels_for(x);
  const at::Tensor grad_x = empty_for(x, needs_x);
  const auto& kernels = amplitude_phase_cpu_kernels();
  AmplitudePhaseSampleBackward sample{call, nullptr};
  sample.call.shape.batch = 1;
  const at::Tensor sums = at::zeros({kernels.sums_bytes(sample)}, at::kByte);
  sample.sums = sums.mutable_data_ptr();
  for (int64_t n = 0; n < shape.batch; ++n) {
    const at::Tensor spectrum = half_spectrum_on_cpu(sample.call.shape, x[n]);
    const at::Tensor grad_spectrum = half_spectrum_on_cpu(sample.call.shape, grad[n]);
    sample.call.grad = grad_spectrum.const_data_ptr();
    sample.call.x = spectrum.const_data_ptr();
    sample.call.grad_x = needs_x ? spectrum.mutable_data_ptr() : nullptr;
    launch_on_cpu(kernels.backward, sample);
    if (needs_x) inverse_on_cpu(sample.call.shape, spectrum, grad_x[n]);
  }
  kernels.add_up(sample, max_threads());
  return {if_defined(grad_x),     if_defined(grad_weight1),       if_defined(grad_bias1),      if_defined(grad_weight2),
          if_defined(grad_bias2), if_defined(grad_output_weight), if_defined(grad_output_bias)};
}

// What the kernels see of x: [B, C, H, W/2 + 1, 2]. Phases are discontinuous, so that only results from the
// same spectrum can be compared.
at::Tensor amplitude_phase_conv_spectrum(const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  check_map("x", x);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
#ifdef MITNET_FAST_WITH_CUDA
  if (x.is_cuda()) {
    return spectrum_on_cuda({data_type(x), x.size(0), channels, 1, channels, height, width, false, 0, false, false}, x);
  }
#endif
  if (!x.is_cpu()) no_kernels_for(x);
  const AmplitudePhaseShape shape{data_type(x), 1, channels, 1, channels, height, width, false, 0, false, false};
  const at::Tensor spectra = at::empty({x.size(0), x.size(1), shape.height, shape.columns(), 2}, x.options());
  for (int64_t n = 0; n < x.size(0); ++n) spectra[n].copy_(at::view_as_real(half_spectrum_on_cpu(shape, x[n])));
  return spectra;
}

// Whether reflection can pad an axis of `size` pixels to whole windows.
void check_reflection(const char* axis, int64_t size, int64_t window_size, int64_t shift) {
  const int64_t after = (window_size - (shift + size) % window_size) % window_size;
  TORCH_CHECK_VALUE(std::max(shift, after) < size, "v: ", axis, " ", size,
                    " is too small to be padded by reflection to whole windows, needs at least ",
                    std::max(shift, after) + 1, " pixels");
}

WindowAttentionShape checked_shape(const at::Tensor& qk, const at::Tensor& v, const at::Tensor& bias_table,
                                   int64_t num_heads, int64_t window_size, int64_t shift) {
  check_map("v", v);
  const DataType dtype = data_type(v, "v");
  check_like("qk", qk, {v.size(0), 2 * v.size(1), v.size(2), v.size(3)}, v, "v");
  TORCH_CHECK_VALUE(num_heads >= 1 && v.size(1) % num_heads == 0, "num_heads: must divide the ", v.size(1),
                    " channels of v, got ", num_heads);
  TORCH_CHECK_VALUE(window_size >= 1, "window_size: must be at least 1, got ", window_size);
  TORCH_CHECK_VALUE(0 <= shift && shift < window_size,
                    "shift: must be at least 0 and below window_size = ", window_size, ", got ", shift);
  check_like("bias_table", bias_table, {(2 * window_size - 1) * (2 * window_size - 1), num_heads}, v, "v");
  check_reflection("height", v.size(2), window_size, shift);
  check_reflection("width", v.size(3), window_size, shift);
  return {dtype, v.size(0), v.size(1), v.size(2), v.size(3), num_heads, window_size, shift};
}

void check_window_attention_on_cpu(const at::Tensor& v) {
  TORCH_CHECK_TYPE(v.scalar_type() != at::kHalf,
                   "v: dtype Half is not supported on cpu, allowed: float32, float64, bfloat16");
}

at::Tensor window_attention_forward(const at::Tensor& qk, const at::Tensor& v, const at::Tensor& bias_table,
                                    int64_t num_heads, int64_t window_size, int64_t shift, bool tf32) {
  const auto shape = checked_shape(qk, v, bias_table, num_heads, window_size, shift);
  const at::Tensor table = bias_table.contiguous();
  const at::Tensor y = empty_for(v);
  const WindowAttentionForward call{shape, view(qk), view(v), table.const_data_ptr(), mutable_view(y)};
  if (v.is_cpu()) {
    check_window_attention_on_cpu(v);
    launch_on_cpu(window_attention_cpu_kernels().forward, call);
#ifdef MITNET_FAST_WITH_CUDA
  } else if (v.is_cuda()) {
    launch_on_cuda(v, 0, [&](void*, void* stream) { window_attention_forward_cuda(call, tf32, stream); });
#endif
  } else {
    no_kernels_for(v);
  }
  return y;
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>> window_attention_backward(
    const at::Tensor& grad, const at::Tensor& qk, const at::Tensor& v, const at::Tensor& bias_table, int64_t num_heads,
    int64_t window_size, int64_t shift, bool tf32, bool needs_qk, bool needs_v, bool needs_bias_table) {
  const auto shape = checked_shape(qk, v, bias_table, num_heads, window_size, shift);
  check_like("grad", grad, v.sizes(), v, "v");
  const at::Tensor table = bias_table.contiguous();
  const at::Tensor grad_qk = empty_for(qk, needs_qk);
  const at::Tensor grad_v = empty_for(v, needs_v);
  const at::Tensor grad_bias_table = needs_bias_table ? at::empty(table.sizes(), table.options()) : at::Tensor();
  const WindowAttentionBackward call{shape,
                                     view(grad),
                                     view(qk),
                                     view(v),
                                     table.const_data_ptr(),
                                     mutable_view(grad_qk),
                                     mutable_view(grad_v),
                                     needs_bias_table ? grad_bias_table.mutable_data_ptr() : nullptr};
  if (v.is_cpu()) {
    check_window_attention_on_cpu(v);
    launch_on_cpu(window_attention_cpu_kernels().backward, call);
#ifdef MITNET_FAST_WITH_CUDA
  } else if (v.is_cuda()) {
    launch_on_cuda(v, window_attention_backward_workspace_cuda(call), [&](void* workspace, void* stream) {
      window_attention_backward_cuda(call, tf32, workspace, stream);
    });
#endif
  } else {
    no_kernels_for(v);
  }
  return {if_defined(grad_qk), if_defined(grad_v), if_defined(grad_bias_table)};
}

using Gradients = std::vector<std::optional<at::Tensor>>;

// Gradients of contiguous weights, empty where not needed, in the order of the arguments from `first` on.
struct WeightGradients {
  std::vector<at::Tensor> tensors;

  WeightGradients(const std::vector<at::Tensor>& weights, const std::vector<bool>& needs, size_t first) {
    TORCH_CHECK_VALUE(needs.size() == first + weights.size(), "needs: expected ", first + weights.size(),
                      " entries, got ", needs.size());
    for (size_t i = 0; i < weights.size(); ++i)
      tensors.push_back(needs[first + i] ? at::empty(weights[i].sizes(), weights[i].options()) : at::Tensor());
  }

  void* data(size_t i) const { return tensors[i].defined() ? tensors[i].mutable_data_ptr() : nullptr; }

  // After the gradients of maps.
  Gradients behind(Gradients found) const {
    for (const at::Tensor& tensor : tensors) found.push_back(if_defined(tensor));
    return found;
  }
};

// Contiguous tensors, and a pointer to the elements of each.
struct DenseTensors {
  std::vector<at::Tensor> tensors;

  explicit DenseTensors(const std::vector<at::Tensor>& given) {
    for (const at::Tensor& tensor : given) tensors.push_back(tensor.defined() ? tensor.contiguous() : tensor);
  }

  const void* data(size_t i) const { return tensors[i].defined() ? tensors[i].const_data_ptr() : nullptr; }
};

FeatureMixingShape checked_features(const at::Tensor& x, int64_t hidden) {
  check_map("x", x);
  const DataType dtype = data_type(x);
  if (!x.is_cpu()) no_kernels_for(x);
  TORCH_CHECK_TYPE(dtype != DataType::float16, "x: dtype ", x.scalar_type(),
                   " is not supported, allowed: float32, float64, bfloat16");
  return {dtype, x.size(0), x.size(1), hidden, x.size(2), x.size(3)};
}

FeatureMixingShape checked_mlp(const at::Tensor& x, const at::Tensor& weight1, const at::Tensor& bias1,
                               const at::Tensor& weight2, const at::Tensor& bias2) {
  TORCH_CHECK_VALUE(weight1.defined() && weight1.dim() == 2 && weight1.size(0) > 0,
                    "weight1: expected shape [Ch, C], got ", weight1.sizes());
  const auto shape = checked_features(x, weight1.size(0));
  check_like("weight1", weight1, {shape.hidden, shape.channels}, x);
  check_like("bias1", bias1, {shape.hidden}, x);
  check_like("weight2", weight2, {shape.channels, shape.hidden}, x);
  check_like("bias2", bias2, {shape.channels}, x);
  return shape;
}

at::Tensor pointwise_mlp_forward(const at::Tensor& x, const at::Tensor& weight1, const at::Tensor& bias1,
                                 const at::Tensor& weight2, const at::Tensor& bias2) {
  const auto shape = checked_mlp(x, weight1, bias1, weight2, bias2);
  const DenseTensors dense({weight1, bias1, weight2, bias2});
  const at::Tensor y = empty_for(x);
  const PointwiseMlpForward call{shape,         view(x),       dense.data(0),  dense.data(1),
                                 dense.data(2), dense.data(3), mutable_view(y)};
  launch_on_cpu(feature_mixing_cpu_kernels().mlp_forward, call);
  return y;
}

Gradients pointwise_mlp_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight1,
                                 const at::Tensor& bias1, const at::Tensor& weight2, const at::Tensor& bias2,
                                 const std::vector<bool>& needs) {
  const auto shape = checked_mlp(x, weight1, bias1, weight2, bias2);
  check_like("grad", grad, x.sizes(), x);
  const WeightGradients grads({weight1, bias1, weight2, bias2}, needs, 1);
  const DenseTensors dense({weight1, bias1, weight2});
  const at::Tensor grad_x = empty_for(x, needs[0]);
  const PointwiseMlpBackward call{shape,         view(grad),           view(x),       dense.data(0), dense.data(1),
                                  dense.data(2), mutable_view(grad_x), grads.data(0), grads.data(1), grads.data(2),
                                  grads.data(3)};
  launch_on_cpu(feature_mixing_cpu_kernels().mlp_backward, call);
  return grads.behind({if_defined(grad_x)});
}

FeatureMixingShape checked_mixing(const at::Tensor& x, const at::Tensor& local_weight, const at::Tensor& local_bias,
                                  const at::Tensor& proj_weight, const at::Tensor& proj_bias) {
  const auto shape = checked_features(x, 0);
  TORCH_CHECK_VALUE(shape.height >= 3 && shape.width >= 3, "x: needs at least 3×3 pixels, got shape ", x.sizes());
  check_like("local_weight", local_weight, {shape.channels, 5, 5}, x);
  check_like("local_bias", local_bias, {shape.channels}, x);
  check_like("proj_weight", proj_weight, {shape.channels, shape.channels}, x);
  check_like("proj_bias", proj_bias, {shape.channels}, x);
  return shape;
}

FeatureMixingShape checked_local(const at::Tensor& x, const at::Tensor& value_weight, const at::Tensor& value_bias,
                                 const at::Tensor& local_weight, const at::Tensor& local_bias,
                                 const at::Tensor& proj_weight, const at::Tensor& proj_bias) {
  const auto shape = checked_mixing(x, local_weight, local_bias, proj_weight, proj_bias);
  check_like("value_weight", value_weight, {shape.channels, shape.channels}, x);
  check_like("value_bias", value_bias, {shape.channels}, x);
  return shape;
}

FeatureMixingShape checked_local_global(const at::Tensor& x, const at::Tensor& value, const at::Tensor& attended,
                                        const at::Tensor& local_weight, const at::Tensor& local_bias,
                                        const at::Tensor& proj_weight, const at::Tensor& proj_bias,
                                        const at::Tensor& rescale, const at::Tensor& rebias) {
  const auto shape = checked_mixing(x, local_weight, local_bias, proj_weight, proj_bias);
  check_like("value", value, x.sizes(), x);
  check_like("attended", attended, x.sizes(), x);
  check_like("rescale", rescale, {shape.batch, shape.channels}, x);
  check_like("rebias", rebias, {shape.batch, shape.channels}, x);
  return shape;
}

MixingWeights mixing_weights(const DenseTensors& dense) {
  return {dense.data(0), dense.data(1), dense.data(2), dense.data(3),
          dense.data(4), dense.data(5), dense.data(6), dense.data(7)};
}

at::Tensor local_mixing_forward(const at::Tensor& x, const at::Tensor& value_weight, const at::Tensor& value_bias,
                                const at::Tensor& local_weight, const at::Tensor& local_bias,
                                const at::Tensor& proj_weight, const at::Tensor& proj_bias) {
  const auto shape = checked_local(x, value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias);
  const DenseTensors dense(
      {value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias, at::Tensor(), at::Tensor()});
  const at::Tensor y = empty_for(x);
  const LocalMixingForward call{shape, view(x), {}, {}, mixing_weights(dense), mutable_view(y)};
  launch_on_cpu(feature_mixing_cpu_kernels().local_forward, call);
  return y;
}

Gradients local_mixing_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& value_weight,
                                const at::Tensor& value_bias, const at::Tensor& local_weight,
                                const at::Tensor& local_bias, const at::Tensor& proj_weight,
                                const at::Tensor& proj_bias, const std::vector<bool>& needs) {
  const auto shape = checked_local(x, value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias);
  check_like("grad", grad, x.sizes(), x);
  const DenseTensors dense(
      {value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias, at::Tensor(), at::Tensor()});
  const WeightGradients grads({value_weight, value_bias, local_weight, local_bias, proj_weight, proj_bias}, needs, 1);
  const at::Tensor grad_x = empty_for(x, needs[0]);
  LocalMixingBackward call{shape, view(grad), view(x), {}, {}, mixing_weights(dense), mutable_view(grad_x)};
  call.grad_value_weight = grads.data(0);
  call.grad_value_bias = grads.data(1);
  call.grad_local_weight = grads.data(2);
  call.grad_local_bias = grads.data(3);
  call.grad_proj_weight = grads.data(4);
  call.grad_proj_bias = grads.data(5);
  launch_on_cpu(feature_mixing_cpu_kernels().local_backward, call);
  return grads.behind({if_defined(grad_x)});
}

at::Tensor local_global_mixing_forward(const at::Tensor& x, const at::Tensor& value, const at::Tensor& attended,
                                       const at::Tensor& local_weight, const at::Tensor& local_bias,
                                       const at::Tensor& proj_weight, const at::Tensor& proj_bias,
                                       const at::Tensor& rescale, const at::Tensor& rebias) {
  const auto shape =
      checked_local_global(x, value, attended, local_weight, local_bias, proj_weight, proj_bias, rescale, rebias);
  const DenseTensors dense(
      {at::Tensor(), at::Tensor(), local_weight, local_bias, proj_weight, proj_bias, rescale, rebias});
  const at::Tensor y = empty_for(x);
  const LocalMixingForward call{shape, view(x), view(value), view(attended), mixing_weights(dense), mutable_view(y)};
  launch_on_cpu(feature_mixing_cpu_kernels().local_forward, call);
  return y;
}

// The gradient of x is the incoming one: it is left out.
Gradients local_global_mixing_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& value,
                                       const at::Tensor& attended, const at::Tensor& local_weight,
                                       const at::Tensor& local_bias, const at::Tensor& proj_weight,
                                       const at::Tensor& proj_bias, const at::Tensor& rescale, const at::Tensor& rebias,
                                       const std::vector<bool>& needs) {
  const auto shape =
      checked_local_global(x, value, attended, local_weight, local_bias, proj_weight, proj_bias, rescale, rebias);
  check_like("grad", grad, x.sizes(), x);
  const DenseTensors dense(
      {at::Tensor(), at::Tensor(), local_weight, local_bias, proj_weight, proj_bias, rescale, rebias});
  const WeightGradients grads({local_weight, local_bias, proj_weight, proj_bias, rescale, rebias}, needs, 3);
  const at::Tensor grad_value = empty_for(value, needs[1]), grad_attended = empty_for(attended, needs[2]);
  LocalMixingBackward call{shape, view(grad), view(x), view(value), view(attended), mixing_weights(dense)};
  call.grad_value = mutable_view(grad_value);
  call.grad_attended = mutable_view(grad_attended);
  call.grad_local_weight = grads.data(0);
  call.grad_local_bias = grads.data(1);
  call.grad_proj_weight = grads.data(2);
  call.grad_proj_bias = grads.data(3);
  call.grad_rescale = grads.data(4);
  call.grad_rebias = grads.data(5);
  launch_on_cpu(feature_mixing_cpu_kernels().local_backward, call);
  return grads.behind({std::nullopt, if_defined(grad_value), if_defined(grad_attended)});
}

FeatureMixingShape checked_qkv(const at::Tensor& x, const std::vector<at::Tensor>& weights) {
  const auto shape = checked_features(x, 0);
  const int64_t c = shape.channels;
  check_like("norm_weight", weights[0], {c}, x);
  check_like("norm_bias", weights[1], {c}, x);
  check_like("value_weight", weights[2], {c, c}, x);
  check_like("value_bias", weights[3], {c}, x);
  check_like("query_key_weight", weights[4], {2 * c, c}, x);
  check_like("query_key_bias", weights[5], {2 * c}, x);
  return shape;
}

NormalizedQkvWeights qkv_weights(const DenseTensors& dense) {
  return {dense.data(0), dense.data(1), dense.data(2), dense.data(3), dense.data(4), dense.data(5)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> normalized_qkv_forward(
    const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& value_weight,
    const at::Tensor& value_bias, const at::Tensor& query_key_weight, const at::Tensor& query_key_bias) {
  const std::vector<at::Tensor> weights{norm_weight, norm_bias,        value_weight,
                                        value_bias,  query_key_weight, query_key_bias};
  const auto shape = checked_qkv(x, weights);
  const DenseTensors dense(weights);
  const at::Tensor value = empty_for(x);
  const at::Tensor query_key = empty_for(x, {shape.batch, 2 * shape.channels, shape.height, shape.width});
  const at::Tensor mean = at::empty({shape.batch}, x.options()), deviation = at::empty_like(mean);
  const NormalizedQkvForward call{shape,
                                  view(x),
                                  qkv_weights(dense),
                                  mutable_view(value),
                                  mutable_view(query_key),
                                  mean.mutable_data_ptr(),
                                  deviation.mutable_data_ptr()};
  launch_on_cpu(normalized_qkv_cpu_kernels().forward, call);
  return {value, query_key, mean, deviation};
}

Gradients normalized_qkv_backward(const at::Tensor& grad_value, const at::Tensor& grad_query_key,
                                  const at::Tensor& grad_mean, const at::Tensor& grad_deviation, const at::Tensor& x,
                                  const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                  const at::Tensor& value_weight, const at::Tensor& value_bias,
                                  const at::Tensor& query_key_weight, const at::Tensor& query_key_bias,
                                  const std::vector<bool>& needs) {
  const std::vector<at::Tensor> weights{norm_weight, norm_bias,        value_weight,
                                        value_bias,  query_key_weight, query_key_bias};
  const auto shape = checked_qkv(x, weights);
  check_like("grad_value", grad_value, x.sizes(), x);
  check_like("grad_query_key", grad_query_key, {shape.batch, 2 * shape.channels, shape.height, shape.width}, x);
  check_like("grad_mean", grad_mean, {shape.batch}, x);
  check_like("grad_deviation", grad_deviation, {shape.batch}, x);
  const DenseTensors dense(weights), of_samples({grad_mean, grad_deviation});
  const WeightGradients grads(weights, needs, 1);
  const at::Tensor grad_x = empty_for(x, needs[0]);
  const NormalizedQkvBackward call{
      shape,         view(grad_value),   view(grad_query_key), of_samples.data(0), of_samples.data(1),
      view(x),       qkv_weights(dense), mutable_view(grad_x), grads.data(0),      grads.data(1),
      grads.data(2), grads.data(3),      grads.data(4),        grads.data(5)};
  launch_on_cpu(normalized_qkv_cpu_kernels().backward, call);
  return grads.behind({if_defined(grad_x)});
}

DenseBlockShape checked_dense(const at::Tensor& x, const at::Tensor& dense_weight, const at::Tensor& dense_bias,
                              const at::Tensor& fuse_weight, const at::Tensor& fuse_bias) {
  const auto shape = checked_features(x, 0);
  TORCH_CHECK_VALUE(
      dense_bias.defined() && dense_bias.dim() == 1 && dense_bias.size(0) > 0 && dense_bias.size(0) % dense_layers == 0,
      "dense_bias: expected shape [", dense_layers, "·G], got ", dense_bias.sizes());
  const int64_t c = shape.channels, growth = dense_bias.size(0) / dense_layers;
  const int64_t inputs = dense_layers * c + dense_layers * (dense_layers - 1) / 2 * growth;
  check_like("dense_weight", dense_weight, {9 * growth * inputs}, x);
  check_like("dense_bias", dense_bias, {dense_layers * growth}, x);
  check_like("fuse_weight", fuse_weight, {c, c + dense_layers * growth}, x);
  check_like("fuse_bias", fuse_bias, {c}, x);
  return {shape.dtype, shape.batch, c, growth, shape.height, shape.width};
}

at::Tensor dense_block_forward(const at::Tensor& x, const at::Tensor& dense_weight, const at::Tensor& dense_bias,
                               const at::Tensor& fuse_weight, const at::Tensor& fuse_bias) {
  const auto shape = checked_dense(x, dense_weight, dense_bias, fuse_weight, fuse_bias);
  const DenseTensors dense({dense_weight, dense_bias, fuse_weight, fuse_bias});
  const at::Tensor y = empty_for(x);
  const DenseBlockForward call{
      shape, view(x), {dense.data(0), dense.data(1), dense.data(2), dense.data(3)}, mutable_view(y)};
  launch_on_cpu(dense_block_cpu_kernels().forward, call);
  return y;
}

Gradients dense_block_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& dense_weight,
                               const at::Tensor& dense_bias, const at::Tensor& fuse_weight, const at::Tensor& fuse_bias,
                               const std::vector<bool>& needs) {
  const auto shape = checked_dense(x, dense_weight, dense_bias, fuse_weight, fuse_bias);
  check_like("grad", grad, x.sizes(), x);
  const DenseTensors dense({dense_weight, dense_bias, fuse_weight, fuse_bias});
  const WeightGradients grads({dense_weight, dense_bias, fuse_weight, fuse_bias}, needs, 1);
  const at::Tensor grad_x = empty_for(x, needs[0]);
  const DenseBlockBackward call{shape,
                                view(grad),
                                view(x),
                                {dense.data(0), dense.data(1), dense.data(2), dense.data(3)},
                                mutable_view(grad_x),
                                grads.data(0),
                                grads.data(1),
                                grads.data(2),
                                grads.data(3)};
  launch_on_cpu(dense_block_cpu_kernels().backward, call);
  return grads.behind({if_defined(grad_x)});
}

at::Tensor conv_relu_forward(const at::Tensor& x, const std::optional<at::Tensor>& joined, const at::Tensor& weight,
                             const at::Tensor& scale, const at::Tensor& shift) {
  const auto features = checked_features(x, 0);
  const int64_t b = features.batch, h = features.height, w = features.width;
  if (joined) {
    check_map("joined", *joined);
    check_like("joined", *joined, {b, joined->size(1), h, w}, x);
  }
  const int64_t joined_channels = joined ? joined->size(1) : 0;
  TORCH_CHECK_VALUE(weight.defined() && weight.dim() == 4 && weight.size(0) > 0,
                    "weight: expected shape [Co, C, 3, 3], got ", weight.sizes());
  const int64_t out = weight.size(0);
  check_like("weight", weight, {out, features.channels + joined_channels, 3, 3}, x);
  check_like("scale", scale, {out}, x);
  check_like("shift", shift, {out}, x);
  const bool channels_last = !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor dense_weight = channels_last ? weight : weight.contiguous();
  const DenseTensors dense({scale, shift});
  const at::Tensor y = empty_for(x, {b, out, h, w});
  const ConvReluForward call{{features.dtype, b, features.channels, joined_channels, out, h, w},
                             view(x),
                             joined ? view(*joined) : ConstMapView{},
                             dense_weight.const_data_ptr(),
                             channels_last,
                             dense.data(0),
                             dense.data(1),
                             mutable_view(y)};
  launch_on_cpu(conv_relu_cpu_kernels().forward, call);
  return y;
}

ResidualConvShape checked_residual(const at::Tensor& x, const std::optional<at::Tensor>& joined,
                                   const std::vector<at::Tensor>& weights, double identity_scale,
                                   double negative_slope) {
  const auto features = checked_features(x, 0);
  const int64_t b = features.batch, h = features.height, w = features.width;
  if (joined) {
    check_map("joined", *joined);
    check_like("joined", *joined, {b, joined->size(1), h, w}, x);
  }
  const int64_t joined_channels = joined ? joined->size(1) : 0, depth = features.channels + joined_channels;
  TORCH_CHECK_VALUE(weights[0].defined() && weights[0].dim() == 4 && weights[0].size(0) > 0,
                    "weight1: expected shape [Co, C, 3, 3], got ", weights[0].sizes());
  const int64_t out = weights[0].size(0);
  check_like("weight1", weights[0], {out, depth, 3, 3}, x);
  check_like("bias1", weights[1], {out}, x);
  check_like("weight2", weights[2], {out, out, 3, 3}, x);
  check_like("bias2", weights[3], {out}, x);
  check_like("identity_weight", weights[4], {out, depth}, x);
  check_like("identity_bias", weights[5], {out}, x);
  TORCH_CHECK_VALUE(negative_slope >= 0 && negative_slope < 1, "negative_slope: expected a number in [0, 1), got ",
                    negative_slope);
  return {features.dtype, b, features.channels, joined_channels, out, h, w, identity_scale, negative_slope};
}

ResidualConvWeights residual_weights(const DenseTensors& dense) {
  return {dense.data(0), dense.data(1), dense.data(2), dense.data(3), dense.data(4), dense.data(5)};
}

// The result, and the hidden map where it is kept.
std::tuple<at::Tensor, std::optional<at::Tensor>> residual_conv_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& joined, const at::Tensor& weight1, const at::Tensor& bias1,
    const at::Tensor& weight2, const at::Tensor& bias2, const at::Tensor& identity_weight,
    const at::Tensor& identity_bias, double identity_scale, double negative_slope, bool keeps_hidden) {
  const std::vector<at::Tensor> weights{weight1, bias1, weight2, bias2, identity_weight, identity_bias};
  const auto shape = checked_residual(x, joined, weights, identity_scale, negative_slope);
  const DenseTensors dense(weights);
  const at::Tensor y = empty_for(x, {shape.batch, shape.out_channels, shape.height, shape.width});
  const at::Tensor hidden = keeps_hidden ? empty_for(x, y.sizes()) : at::Tensor();
  const ResidualConvForward call{shape,
                                 view(x),
                                 joined ? view(*joined) : ConstMapView{},
                                 residual_weights(dense),
                                 mutable_view(y),
                                 mutable_view(hidden)};
  launch_on_cpu(residual_conv_cpu_kernels().forward, call, /*reads_gaps=*/false);
  return {y, if_defined(hidden)};
}

// `hidden` has no elements where it was not kept.
Gradients residual_conv_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& hidden,
                                 const at::Tensor& x, const std::optional<at::Tensor>& joined,
                                 const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2,
                                 const at::Tensor& bias2, const at::Tensor& identity_weight,
                                 const at::Tensor& identity_bias, double identity_scale, double negative_slope,
                                 const std::vector<bool>& needs) {
  const std::vector<at::Tensor> weights{weight1, bias1, weight2, bias2, identity_weight, identity_bias};
  const auto shape = checked_residual(x, joined, weights, identity_scale, negative_slope);
  check_like("y", y, {shape.batch, shape.out_channels, shape.height, shape.width}, x);
  check_like("grad", grad, y.sizes(), x);
  if (hidden.numel()) check_like("hidden", hidden, y.sizes(), x);
  const WeightGradients grads(weights, needs, 2);
  TORCH_CHECK_VALUE(joined || !needs[1], "needs: no map is joined");
  const DenseTensors dense(weights);
  const at::Tensor grad_x = empty_for(x, needs[0]), grad_joined = needs[1] ? empty_for(*joined) : at::Tensor();
  const ResidualConvBackward call{shape,
                                  view(grad),
                                  view(y),
                                  hidden.numel() ? view(hidden) : ConstMapView{},
                                  view(x),
                                  joined ? view(*joined) : ConstMapView{},
                                  residual_weights(dense),
                                  mutable_view(grad_x),
                                  mutable_view(grad_joined),
                                  grads.data(0),
                                  grads.data(1),
                                  grads.data(2),
                                  grads.data(3),
                                  grads.data(4),
                                  grads.data(5)};
  launch_on_cpu(residual_conv_cpu_kernels().backward, call, /*reads_gaps=*/false);
  return grads.behind({if_defined(grad_x), if_defined(grad_joined)});
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

  module.def("amplitude_phase_conv_forward", kernel(&amplitude_phase_conv_forward), py::arg("x"), py::arg("weight1"),
             py::arg("bias1"), py::arg("weight2"), py::arg("bias2"), py::arg("output_weight"), py::arg("output_bias"),
             py::arg("phase"), py::arg("negative_slope"), py::arg("tf32"));
  module.def("amplitude_phase_conv_backward", kernel(&amplitude_phase_conv_backward), py::arg("grad"), py::arg("x"),
             py::arg("weight1"), py::arg("bias1"), py::arg("weight2"), py::arg("bias2"), py::arg("output_weight"),
             py::arg("output_bias"), py::arg("phase"), py::arg("negative_slope"), py::arg("tf32"), py::arg("needs_x"),
             py::arg("needs_weight1"), py::arg("needs_bias1"), py::arg("needs_weight2"), py::arg("needs_bias2"),
             py::arg("needs_output_weight"), py::arg("needs_output_bias"));
  module.def("amplitude_phase_conv_spectrum", kernel(&amplitude_phase_conv_spectrum), py::arg("x"));
  module.def("window_attention_forward", kernel(&window_attention_forward), py::arg("qk"), py::arg("v"),
             py::arg("bias_table"), py::arg("num_heads"), py::arg("window_size"), py::arg("shift"), py::arg("tf32"));
  module.def("window_attention_backward", kernel(&window_attention_backward), py::arg("grad"), py::arg("qk"),
             py::arg("v"), py::arg("bias_table"), py::arg("num_heads"), py::arg("window_size"), py::arg("shift"),
             py::arg("tf32"), py::arg("needs_qk"), py::arg("needs_v"), py::arg("needs_bias_table"));
  module.def("pointwise_mlp_forward", kernel(&pointwise_mlp_forward), py::arg("x"), py::arg("weight1"),
             py::arg("bias1"), py::arg("weight2"), py::arg("bias2"));
  module.def("pointwise_mlp_backward", kernel(&pointwise_mlp_backward), py::arg("grad"), py::arg("x"),
             py::arg("weight1"), py::arg("bias1"), py::arg("weight2"), py::arg("bias2"), py::arg("needs"));
  module.def("local_mixing_forward", kernel(&local_mixing_forward), py::arg("x"), py::arg("value_weight"),
             py::arg("value_bias"), py::arg("local_weight"), py::arg("local_bias"), py::arg("proj_weight"),
             py::arg("proj_bias"));
  module.def("local_mixing_backward", kernel(&local_mixing_backward), py::arg("grad"), py::arg("x"),
             py::arg("value_weight"), py::arg("value_bias"), py::arg("local_weight"), py::arg("local_bias"),
             py::arg("proj_weight"), py::arg("proj_bias"), py::arg("needs"));
  module.def("local_global_mixing_forward", kernel(&local_global_mixing_forward), py::arg("x"), py::arg("value"),
             py::arg("attended"), py::arg("local_weight"), py::arg("local_bias"), py::arg("proj_weight"),
             py::arg("proj_bias"), py::arg("rescale"), py::arg("rebias"));
  module.def("local_global_mixing_backward", kernel(&local_global_mixing_backward), py::arg("grad"), py::arg("x"),
             py::arg("value"), py::arg("attended"), py::arg("local_weight"), py::arg("local_bias"),
             py::arg("proj_weight"), py::arg("proj_bias"), py::arg("rescale"), py::arg("rebias"), py::arg("needs"));
  module.def("normalized_qkv_forward", kernel(&normalized_qkv_forward), py::arg("x"), py::arg("norm_weight"),
             py::arg("norm_bias"), py::arg("value_weight"), py::arg("value_bias"), py::arg("query_key_weight"),
             py::arg("query_key_bias"));
  module.def("normalized_qkv_backward", kernel(&normalized_qkv_backward), py::arg("grad_value"),
             py::arg("grad_query_key"), py::arg("grad_mean"), py::arg("grad_deviation"), py::arg("x"),
             py::arg("norm_weight"), py::arg("norm_bias"), py::arg("value_weight"), py::arg("value_bias"),
             py::arg("query_key_weight"), py::arg("query_key_bias"), py::arg("needs"));
  module.def("dense_block_forward", kernel(&dense_block_forward), py::arg("x"), py::arg("dense_weight"),
             py::arg("dense_bias"), py::arg("fuse_weight"), py::arg("fuse_bias"));
  module.def("dense_block_backward", kernel(&dense_block_backward), py::arg("grad"), py::arg("x"),
             py::arg("dense_weight"), py::arg("dense_bias"), py::arg("fuse_weight"), py::arg("fuse_bias"),
             py::arg("needs"));
  module.def("conv_relu_forward", kernel(&conv_relu_forward), py::arg("x"), py::arg("joined"), py::arg("weight"),
             py::arg("scale"), py::arg("shift"));
  module.def("residual_conv_forward", kernel(&residual_conv_forward), py::arg("x"), py::arg("joined"),
             py::arg("weight1"), py::arg("bias1"), py::arg("weight2"), py::arg("bias2"), py::arg("identity_weight"),
             py::arg("identity_bias"), py::arg("identity_scale"), py::arg("negative_slope"), py::arg("keeps_hidden"));
  module.def("residual_conv_backward", kernel(&residual_conv_backward), py::arg("grad"), py::arg("y"),
             py::arg("hidden"), py::arg("x"), py::arg("joined"), py::arg("weight1"), py::arg("bias1"),
             py::arg("weight2"), py::arg("bias2"), py::arg("identity_weight"), py::arg("identity_bias"),
             py::arg("identity_scale"), py::arg("negative_slope"), py::arg("needs"));
}
