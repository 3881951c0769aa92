#include "window_attention/window_attention_cuda.cuh"

namespace mitnet_fast {

template void attention_forward<HalfAttention<__half>>(const WindowAttentionForward&, cudaStream_t);
template void attention_backward<HalfAttention<__half>>(const WindowAttentionBackward&, void*, cudaStream_t);

}  // namespace mitnet_fast
