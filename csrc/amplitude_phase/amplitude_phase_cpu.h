// Spectral step of the amplitude / phase convolution on the CPU. Samples are transformed and mapped one
// after the other, in place where that is possible, so that the spectra of one are in memory at a time:
// the batch of these calls is 1.
#pragma once

#include "amplitude_phase/amplitude_phase.h"
#include "common/cpu_kernel.h"

namespace mitnet_fast {

// `sums` are the weight gradients' sums over groups of bins. Every sample adds to them.
struct AmplitudePhaseSampleBackward {
  AmplitudePhaseBackward call;
  void* sums;
};

struct AmplitudePhaseCpuKernels {
  CpuKernel<AmplitudePhaseForward> forward;
  CpuKernel<AmplitudePhaseSampleBackward> backward;
  // Bytes of the sums, which are zero before the first sample.
  int64_t (*sums_bytes)(const AmplitudePhaseSampleBackward& call);
  // Adds up the groups in their order to the gradients of the weights.
  void (*add_up)(const AmplitudePhaseSampleBackward& call, int threads);
  // Copies an image [C, H, W] of any strides to planes in the memory of its half spectrum, the first HW numbers of each
  // channel's, or back. An FFT library takes a few channels at a time, which in channels_last lie all over the memory.
  void (*to_planes)(const AmplitudePhaseShape& shape, const ConstMapView& image, int64_t channels, void* spectrum,
                    int threads);
  void (*from_planes)(const AmplitudePhaseShape& shape, const void* spectrum, int64_t channels, const MapView& image,
                      int threads);
};

// Those for cpu_capability().
const AmplitudePhaseCpuKernels& amplitude_phase_cpu_kernels();

// Sets the imaginary part of bins that are real for every real image to +0, in `planes` half spectra.
void clear_real_bins(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes);

// ½(Y(ky) + conj Y(−ky)) in columns 0 and W/2 (even W) of `planes` half spectra: inverse transforms of
// other columns would differ from library to library.
void make_hermitian(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes);

}  // namespace mitnet_fast
