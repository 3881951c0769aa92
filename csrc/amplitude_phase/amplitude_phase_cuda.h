// Spectral step of the amplitude / phase convolution on CUDA devices, float32.
//
// Other than on the CPU the self-conjugate columns of what goes into an inverse transform are Hermitian
// already, and imaginary parts of real bins are taken as +0 whatever they are. Inputs are not results.
//
// Launchers work on the current device and on `stream`, a cudaStream_t. They neither wait nor allocate:
// a call that needs a workspace says how many bytes, aligned to 256, of any content. The results of a
// launcher do not depend on the device. Errors are exceptions.
#pragma once

#include <cstdint>

#include "amplitude_phase/amplitude_phase.h"

namespace mitnet_fast {

int64_t amplitude_phase_forward_workspace_cuda(const AmplitudePhaseForward& call);
void amplitude_phase_forward_cuda(const AmplitudePhaseForward& call, void* workspace, void* stream);

int64_t amplitude_phase_backward_workspace_cuda(const AmplitudePhaseBackward& call);
void amplitude_phase_backward_cuda(const AmplitudePhaseBackward& call, void* workspace, void* stream);

// The whole convolution, transforms included, for the sizes that have it: the maps of these calls are images
// [B, C, H, W], contiguous, in the place of their spectra. `has_images_cuda` asks transforms_preferred.h, which has
// what was chosen for every size, and the current device, since columns of all channels have to fit into its shared
// memory. Other than that C, H and W decide, as long as neither Ch nor Co is more than C and 32.

bool has_images_cuda(const AmplitudePhaseShape& shape);

int64_t amplitude_phase_images_forward_workspace_cuda(const AmplitudePhaseForward& call);
void amplitude_phase_images_forward_cuda(const AmplitudePhaseForward& call, void* workspace, void* stream);

int64_t amplitude_phase_images_backward_workspace_cuda(const AmplitudePhaseBackward& call);
void amplitude_phase_images_backward_cuda(const AmplitudePhaseBackward& call, void* workspace, void* stream);

// The half spectrum [B, C, H, W/2 + 1] of images from which the two compute.
int64_t amplitude_phase_images_spectrum_workspace_cuda(const AmplitudePhaseShape& shape);
void amplitude_phase_images_spectrum_cuda(const AmplitudePhaseShape& shape, const void* image, void* spectrum,
                                          void* workspace, void* stream);

}  // namespace mitnet_fast
