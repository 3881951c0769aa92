#include "dynamic_filter/predicted_dynamic_filter_cuda.cuh"

namespace mitnet_fast {

template int64_t predicted_forward_workspace<HalfProducts<__half>>(const PredictedDynamicFilterForward&);
template void predicted_forward<HalfProducts<__half>>(const PredictedDynamicFilterForward&, void*, cudaStream_t);
template int64_t predicted_backward_workspace<HalfProducts<__half>>(const PredictedDynamicFilterBackward&);
template void predicted_backward<HalfProducts<__half>>(const PredictedDynamicFilterBackward&, void*, cudaStream_t);

}  // namespace mitnet_fast
