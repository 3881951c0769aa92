#include "dynamic_filter/predicted_dynamic_filter_cuda.cuh"

namespace mitnet_fast {

template int64_t predicted_forward_workspace<IeeeProducts>(const PredictedDynamicFilterForward&);
template void predicted_forward<IeeeProducts>(const PredictedDynamicFilterForward&, void*, cudaStream_t);
template int64_t predicted_backward_workspace<IeeeProducts>(const PredictedDynamicFilterBackward&);
template void predicted_backward<IeeeProducts>(const PredictedDynamicFilterBackward&, void*, cudaStream_t);

}  // namespace mitnet_fast
