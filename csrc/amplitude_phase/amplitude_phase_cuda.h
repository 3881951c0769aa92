// Spectral step of the amplitude / phase convolution on CUDA devices, float32.
//
// Other than on the CPU the self-conjugate columns of what goes into an inverse transform are Hermitian
// already, and imaginary parts of real bins are taken as +0 whatever they are. Inputs are not results.
//
// Launchers work on the current device and on `stream`, a cudaStream_t. They neither wait nor allocate:
// a call that needs a workspace says how many bytes, aligned to 256, of any content. Results do not
// depend on the device. Errors are exceptions.
#pragma once

#include <cstdint>

#include "amplitude_phase/amplitude_phase.h"

namespace mitnet_fast {

int64_t amplitude_phase_forward_workspace_cuda(const AmplitudePhaseForward& call);
void amplitude_phase_forward_cuda(const AmplitudePhaseForward& call, void* workspace, void* stream);

int64_t amplitude_phase_backward_workspace_cuda(const AmplitudePhaseBackward& call);
void amplitude_phase_backward_cuda(const AmplitudePhaseBackward& call, void* workspace, void* stream);

}  // namespace mitnet_fast
