// Window attention on CUDA devices: float32, bfloat16 and float16, windows up to 16×16, up to 64 channels
// per head.
//
// Launchers work on the current device and on `stream`, a cudaStream_t. They neither wait nor allocate: the
// backward says how many bytes of workspace it needs, aligned to 256, of any content. Results do not depend
// on the device. Errors are exceptions. `tf32`: products of float32 maps round their factors to TF32; else
// they are IEEE.
#pragma once

#include <cstdint>

#include "window_attention/window_attention.h"

namespace mitnet_fast {

void window_attention_forward_cuda(const WindowAttentionForward& call, bool tf32, void* stream);

int64_t window_attention_backward_workspace_cuda(const WindowAttentionBackward& call);
void window_attention_backward_cuda(const WindowAttentionBackward& call, bool tf32, void* workspace, void* stream);

}  // namespace mitnet_fast
