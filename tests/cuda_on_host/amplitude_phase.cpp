// The launchers of the amplitude / phase convolution as functions that the harness can call. `sizes`: batch, C, Ch, Co,
// height, width, phase, tf32, skip.
// `images`: maps are images, else their spectra.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "amplitude_phase/amplitude_phase_cuda.h"
#include "cuda_on_host/entry.h"

using namespace mitnet_fast;

namespace {

AmplitudePhaseShape shape_of(const int64_t* sizes, double negative_slope) {
  return {DataType::float32, sizes[0],      sizes[1],       sizes[2],      sizes[3],     sizes[4],
          sizes[5],          sizes[6] != 0, negative_slope, sizes[7] != 0, sizes[8] != 0};
}

// Memory of exactly `bytes` that begins as NaN and ends where it ends, so that AddressSanitizer sees what is beyond.
struct Workspace {
  explicit Workspace(int64_t bytes) : data(std::malloc(bytes + 256)), size(bytes) {
    std::memset(data, 0xff, size + 256);
  }
  ~Workspace() { std::free(data); }
  void* aligned() const {
    const auto end = reinterpret_cast<uintptr_t>(data) + size + 256;
    return reinterpret_cast<void*>((end - size) / 256 * 256);
  }
  void* data;
  int64_t size;
};

}  // namespace

EXPORT image_spectrum(const int64_t* sizes, const void* image, void* spectrum) {
  return report([&] {
    const auto shape = shape_of(sizes, 0);
    const Workspace workspace(amplitude_phase_images_spectrum_workspace_cuda(shape));
    amplitude_phase_images_spectrum_cuda(shape, image, spectrum, workspace.aligned(), nullptr);
  });
}

EXPORT has_images(const int64_t* sizes, int64_t* result) {
  return report([&] { *result = has_images_cuda(shape_of(sizes, 0)); });
}

EXPORT amplitude_phase_forward(int64_t images, const int64_t* sizes, double negative_slope, const void* weight1,
                               const void* bias1, const void* weight2, const void* bias2, const void* output_weight,
                               const void* output_bias, const void* x, void* y) {
  return report([&] {
    const AmplitudePhaseForward call{
        shape_of(sizes, negative_slope), {weight1, bias1, weight2, bias2, output_weight, output_bias}, x, y};
    if (images) {
      const Workspace workspace(amplitude_phase_images_forward_workspace_cuda(call));
      amplitude_phase_images_forward_cuda(call, workspace.aligned(), nullptr);
    } else {
      const Workspace workspace(amplitude_phase_forward_workspace_cuda(call));
      amplitude_phase_forward_cuda(call, workspace.aligned(), nullptr);
    }
  });
}

EXPORT amplitude_phase_backward(int64_t images, const int64_t* sizes, double negative_slope, const void* weight1,
                                const void* bias1, const void* weight2, const void* bias2, const void* output_weight,
                                const void* output_bias, const void* grad, const void* x, void* grad_x,
                                void* grad_weight1, void* grad_bias1, void* grad_weight2, void* grad_bias2,
                                void* grad_output_weight, void* grad_output_bias) {
  return report([&] {
    const AmplitudePhaseBackward call{shape_of(sizes, negative_slope),
                                      {weight1, bias1, weight2, bias2, output_weight, output_bias},
                                      grad,
                                      x,
                                      grad_x,
                                      grad_weight1,
                                      grad_bias1,
                                      grad_weight2,
                                      grad_bias2,
                                      grad_output_weight,
                                      grad_output_bias};
    if (images) {
      const Workspace workspace(amplitude_phase_images_backward_workspace_cuda(call));
      amplitude_phase_images_backward_cuda(call, workspace.aligned(), nullptr);
    } else {
      const Workspace workspace(amplitude_phase_backward_workspace_cuda(call));
      amplitude_phase_backward_cuda(call, workspace.aligned(), nullptr);
    }
  });
}
