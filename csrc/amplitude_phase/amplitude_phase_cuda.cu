#include <stdexcept>
#include <string>

#include "amplitude_phase/amplitude_phase_cuda.h"
#include "amplitude_phase/packed_map_cuda.cuh"
#include "amplitude_phase/spectral_kernels.cuh"
#include "common/launch.cuh"

namespace mitnet_fast {
namespace {

void check_channels(const AmplitudePhaseShape& shape) {
  for (const int64_t channels : {shape.channels, shape.hidden_channels, shape.out_channels}) {
    if (channels > channels_at_most) {
      throw std::invalid_argument("x: CUDA kernels take at most " + std::to_string(channels_at_most) +
                                  " channels, hidden and output channels, got " + std::to_string(channels));
    }
  }
}

BinTiles tiles_of(const AmplitudePhaseShape& shape, int bins) {
  checked_int(shape.bins(), "x: pixels of an image");
  return {static_cast<int>(shape.height), static_cast<int>(shape.width), bins};
}

}  // namespace

int64_t amplitude_phase_forward_workspace_cuda(const AmplitudePhaseForward& call) {
  Workspace workspace(nullptr);
  pack(call.shape, call.map, false, workspace, false, nullptr);
  return workspace.bytes();
}

void amplitude_phase_forward_cuda(const AmplitudePhaseForward& call, void* memory, void* stream_pointer) {
  const auto& shape = call.shape;
  check_channels(shape);
  if (shape.batch == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  Workspace workspace(memory);
  const PackedMap map = pack(shape, call.map, false, workspace, true, stream);
  const SharedBins tile = bins_of_forward(shape);
  const BinTiles tiles = tiles_of(shape, tile.bins);
  const int blocks = checked_int(shape.batch * tiles.tiles(), "x: tiles of the batch");
  dispatch(shape, [&](auto phase, auto tf32) {
    launch("spectral_forward_kernel", spectral_forward_kernel<phase.value, tf32.value>,
           dim3(static_cast<unsigned>(blocks)), spectral_threads, tile.bytes, stream, tiles, map,
           static_cast<const float2*>(call.x), static_cast<float2*>(call.y));
  });
}

int64_t amplitude_phase_backward_workspace_cuda(const AmplitudePhaseBackward& call) {
  check_channels(call.shape);
  Workspace workspace(nullptr);
  pack(call.shape, call.map, true, workspace, false, nullptr);
  const BinTiles tiles = tiles_of(call.shape, bins_of_backward(call.shape, call.map.output_weight).bins);
  partial_sums(call, call.shape.batch * tiles.tiles(), workspace);
  return workspace.bytes();
}

void amplitude_phase_backward_cuda(const AmplitudePhaseBackward& call, void* memory, void* stream_pointer) {
  const auto& shape = call.shape;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const SharedBins tile = bins_of_backward(shape, call.map.output_weight);
  const BinTiles tiles = tiles_of(shape, tile.bins);
  const int64_t all_tiles = shape.batch * tiles.tiles();
  Workspace workspace(memory);
  const PackedMap map = pack(shape, call.map, true, workspace, true, stream);
  const PartialSums partial = partial_sums(call, all_tiles, workspace);
  if (partial.parts > 0) {
    dispatch(shape, [&](auto phase, auto tf32) {
      launch("spectral_backward_kernel", spectral_backward_kernel<phase.value, tf32.value>,
             dim3(static_cast<unsigned>(partial.parts)), spectral_threads, tile.bytes, stream, tiles, map,
             static_cast<const float2*>(call.grad), static_cast<const float2*>(call.x),
             static_cast<float2*>(call.grad_x), partial, all_tiles);
    });
  }
  add_up(call, partial, stream);
}

}  // namespace mitnet_fast
