#include "dynamic_filter/predicted_dynamic_filter_cuda.cuh"

namespace mitnet_fast {

template int64_t predicted_forward_workspace<Tf32Products>(const PredictedDynamicFilterForward&);
template void predicted_forward<Tf32Products>(const PredictedDynamicFilterForward&, void*, cudaStream_t);
template int64_t predicted_backward_workspace<Tf32Products>(const PredictedDynamicFilterBackward&);
template void predicted_backward<Tf32Products>(const PredictedDynamicFilterBackward&, void*, cudaStream_t);

}  // namespace mitnet_fast
