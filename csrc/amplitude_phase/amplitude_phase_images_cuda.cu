#include "amplitude_phase/amplitude_phase_cuda.h"
#include "amplitude_phase/image_kernels.cuh"
#include "amplitude_phase/packed_map_cuda.cuh"
#include "common/launch.cuh"

namespace mitnet_fast {
namespace {

int64_t spectrum_floats(const AmplitudePhaseShape& shape, int64_t channels) {
  return 2 * shape.batch * channels * shape.bins();
}

struct Tables {
  float2* rows;
  float2* columns;
};

Tables take_tables(const AmplitudePhaseShape& shape, Workspace& workspace) {
  return {reinterpret_cast<float2*>(workspace.floats(2 * shape.width)),
          reinterpret_cast<float2*>(workspace.floats(2 * shape.height))};
}

void fill_tables(const ImageSize& size, const Tables& tables, cudaStream_t stream) {
  const int longest = std::max(size.width(), size.height());
  launch("twiddle_kernel", twiddle_kernel, dim3(static_cast<unsigned>(blocks_of(longest, twiddle_threads)), 2),
         twiddle_threads, 0, stream, size, tables.rows, tables.columns);
}

dim3 blocks_of_rows(const AmplitudePhaseShape& shape, int64_t channels) {
  const int rows = 1 << size_of(shape).log2_rows();
  return dim3(static_cast<unsigned>(checked_int(shape.batch * channels * (shape.height / rows), "x: rows")));
}

void launch_rows(const AmplitudePhaseShape& shape, int64_t channels, const void* image, const Tables& tables,
                 float2* spectrum, cudaStream_t stream) {
  const ImageSize size = size_of(shape);
  launch("rows_kernel", rows_kernel, blocks_of_rows(shape, channels), spectral_threads, row_bytes(size), stream, size,
         static_cast<int>(channels), static_cast<const float*>(image), static_cast<const float2*>(tables.rows),
         spectrum);
}

void launch_inverse_rows(const AmplitudePhaseShape& shape, int64_t channels, const float2* spectrum,
                         const Tables& tables, void* image, cudaStream_t stream) {
  const ImageSize size = size_of(shape);
  launch("inverse_rows_kernel", inverse_rows_kernel, blocks_of_rows(shape, channels), spectral_threads, row_bytes(size),
         stream, size, static_cast<int>(channels), spectrum, static_cast<const float2*>(tables.rows),
         static_cast<float*>(image));
}

}  // namespace

bool has_images_cuda(const AmplitudePhaseShape& shape) {
  const ImageSize size = size_of(shape);
  if (!size.log2_height || !size.log2_width) return false;
  if (!own_transforms_preferred[size.log2_height - log2_side_at_least][size.log2_width - log2_side_at_least]) {
    return false;
  }
  const int64_t widest = std::max<int64_t>(shape.channels, 32);
  if (widest > 4096 || shape.hidden_channels > widest || shape.out_channels > widest) return false;
  AmplitudePhaseShape most = shape;
  most.hidden_channels = most.out_channels = widest;
  most.phase = true;
  const SharedBins forward = forward_column(most, true), backward = backward_column(most, true);
  int device = 0, limit = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return forward.bins && backward.bins && std::max(forward.bytes, backward.bytes) <= static_cast<size_t>(limit);
}

int64_t amplitude_phase_images_forward_workspace_cuda(const AmplitudePhaseForward& call) {
  Workspace workspace(nullptr);
  pack(call.shape, call.map, false, workspace, false, nullptr);
  take_tables(call.shape, workspace);
  workspace.floats(spectrum_floats(call.shape, call.shape.channels));
  workspace.floats(spectrum_floats(call.shape, call.shape.out_channels));
  return workspace.bytes();
}

void amplitude_phase_images_forward_cuda(const AmplitudePhaseForward& call, void* memory, void* stream_pointer) {
  const auto& shape = call.shape;
  if (shape.batch == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ImageSize size = size_of(shape);
  Workspace workspace(memory);
  const PackedMap map = pack(shape, call.map, false, workspace, true, stream);
  const Tables tables = take_tables(shape, workspace);
  const auto x = reinterpret_cast<float2*>(workspace.floats(spectrum_floats(shape, shape.channels)));
  const auto y = reinterpret_cast<float2*>(workspace.floats(spectrum_floats(shape, shape.out_channels)));
  fill_tables(size, tables, stream);
  launch_rows(shape, shape.channels, call.x, tables, x, stream);
  const SharedBins column = forward_column(shape, call.map.output_weight);
  const int blocks = checked_int(shape.batch * shape.columns(), "x: columns");
  dispatch(shape, [&](auto phase, auto tf32) {
    launch("columns_kernel", columns_kernel<phase.value, tf32.value>, dim3(static_cast<unsigned>(blocks)),
           spectral_threads, column.bytes, stream, size, column.bins, map, static_cast<const float2*>(x),
           static_cast<const float2*>(tables.columns), y);
  });
  launch_inverse_rows(shape, shape.out_channels, y, tables, call.y, stream);
}

int64_t amplitude_phase_images_backward_workspace_cuda(const AmplitudePhaseBackward& call) {
  Workspace workspace(nullptr);
  pack(call.shape, call.map, true, workspace, false, nullptr);
  take_tables(call.shape, workspace);
  workspace.floats(spectrum_floats(call.shape, call.shape.channels));
  workspace.floats(spectrum_floats(call.shape, call.shape.out_channels));
  partial_sums(call, call.shape.batch * call.shape.columns(), workspace);
  return workspace.bytes();
}

void amplitude_phase_images_backward_cuda(const AmplitudePhaseBackward& call, void* memory, void* stream_pointer) {
  const auto& shape = call.shape;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ImageSize size = size_of(shape);
  Workspace workspace(memory);
  const PackedMap map = pack(shape, call.map, true, workspace, true, stream);
  const Tables tables = take_tables(shape, workspace);
  const auto x = reinterpret_cast<float2*>(workspace.floats(spectrum_floats(shape, shape.channels)));
  const auto grad = reinterpret_cast<float2*>(workspace.floats(spectrum_floats(shape, shape.out_channels)));
  const int64_t columns = shape.batch * shape.columns();
  const PartialSums partial = partial_sums(call, columns, workspace);
  if (partial.parts > 0) {
    fill_tables(size, tables, stream);
    launch_rows(shape, shape.channels, call.x, tables, x, stream);
    launch_rows(shape, shape.out_channels, call.grad, tables, grad, stream);
    const SharedBins column = backward_column(shape, call.map.output_weight);
    dispatch(shape, [&](auto phase, auto tf32) {
      launch("backward_columns_kernel", backward_columns_kernel<phase.value, tf32.value>,
             dim3(static_cast<unsigned>(partial.parts)), spectral_threads, column.bytes, stream, size, column.bins, map,
             static_cast<const float2*>(grad), static_cast<const float2*>(x),
             static_cast<const float2*>(tables.columns), call.grad_x ? x : nullptr, partial, columns);
    });
    if (call.grad_x) launch_inverse_rows(shape, shape.channels, x, tables, call.grad_x, stream);
  }
  add_up(call, partial, stream);
}

int64_t amplitude_phase_images_spectrum_workspace_cuda(const AmplitudePhaseShape& shape) {
  Workspace workspace(nullptr);
  take_tables(shape, workspace);
  workspace.floats(spectrum_floats(shape, shape.channels));
  return workspace.bytes();
}

void amplitude_phase_images_spectrum_cuda(const AmplitudePhaseShape& shape, const void* image, void* spectrum,
                                          void* memory, void* stream_pointer) {
  if (shape.batch == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ImageSize size = size_of(shape);
  Workspace workspace(memory);
  const Tables tables = take_tables(shape, workspace);
  const auto x = reinterpret_cast<float2*>(workspace.floats(spectrum_floats(shape, shape.channels)));
  fill_tables(size, tables, stream);
  launch_rows(shape, shape.channels, image, tables, x, stream);
  const int channels = static_cast<int>(shape.channels);
  launch("spectrum_kernel", spectrum_kernel,
         dim3(static_cast<unsigned>(checked_int(shape.batch * shape.columns(), "x"))), spectral_threads,
         spectrum_bytes(size, channels), stream, size, channels, static_cast<const float2*>(x),
         static_cast<const float2*>(tables.columns), static_cast<float2*>(spectrum));
}

}  // namespace mitnet_fast
