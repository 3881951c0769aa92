// Launchers of window attention, for one way of multiplying.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/launch.cuh"
#include "window_attention/window_attention_cuda.h"
#include "window_attention/window_attention_kernels.cuh"

namespace mitnet_fast {

inline Windows windows_of(const WindowAttentionShape& shape) {
  if (shape.window_size > 16) throw std::invalid_argument("window_size: CUDA kernels take at most 16");
  if (shape.head_size() > 64) throw std::invalid_argument("num_heads: CUDA kernels take at most 64 channels per head");
  const auto after = [&](int64_t windows, int64_t size) { return windows * shape.window_size - shape.shift - size; };
  const auto band = [&](int64_t end) {
    return (shape.shift > 0 ? 2 * shape.shift + 1 : 0) + (end > 0 ? 2 * end + 1 : 0);
  };
  Windows windows;
  windows.height = checked_int(shape.height, "height");
  windows.width = checked_int(shape.width, "width");
  windows.window = static_cast<int>(shape.window_size);
  windows.tokens = windows.window * windows.window;
  windows.chunks = (windows.tokens + chunk - 1) / chunk;
  windows.shift = static_cast<int>(shape.shift);
  windows.rows = checked_int(shape.window_rows(), "height");
  windows.columns = checked_int(shape.window_columns(), "width");
  windows.bottom = static_cast<int>(after(windows.rows, shape.height));
  windows.right = static_cast<int>(after(windows.columns, shape.width));
  windows.band_rows = static_cast<int>(std::min(windows.rows * shape.window_size, band(windows.bottom)));
  windows.band_columns = static_cast<int>(std::min(windows.columns * shape.window_size, band(windows.right)));
  return windows;
}

inline int64_t count_of(const WindowAttentionShape& shape) {
  return shape.batch * shape.window_rows() * shape.window_columns();
}

inline int64_t band_places(const Windows& windows) {
  return int64_t{windows.window} *
         (int64_t{windows.band_rows} * windows.columns + int64_t{windows.rows} * windows.band_columns);
}

// Windows that one block of the backward works on: sizes alone decide, since a sum has one order.
inline int64_t run_of(const WindowAttentionShape& shape) {
  constexpr int64_t enough_blocks = 1056, longest_run = 256;
  const int64_t run = blocks_of(count_of(shape) * shape.heads, enough_blocks);
  return std::clamp<int64_t>(run, 1, longest_run);
}

// What the workspace of a backward holds, and where: offsets in bytes.
struct AttentionWorkspace {
  int64_t value_band;
  int64_t table_sums;
  int64_t bytes;
};

inline AttentionWorkspace workspace_of(const WindowAttentionBackward& call) {
  const WindowAttentionShape& shape = call.shape;
  const int64_t band = shape.batch * shape.channels * band_places(windows_of(shape)) * sizeof(float);
  const int64_t runs = blocks_of(count_of(shape), run_of(shape));
  AttentionWorkspace workspace;
  workspace.value_band = call.grad_qk.data ? blocks_of(band, 256) * 256 : 0;
  workspace.table_sums = workspace.value_band + (call.grad_v.data ? blocks_of(band, 256) * 256 : 0);
  workspace.bytes = workspace.table_sums +
                    (call.grad_bias_table ? runs * shape.heads * shape.table_rows() * int64_t{sizeof(float)} : 0);
  return workspace;
}

// Dynamic shared memory of the kernels, in bytes. What depends on the window: `tables` of the bias or of its
// gradient, `rows` of numbers for every query, and the positions of tokens.
inline size_t bytes_of_window(int64_t window_size, int tables, int rows) {
  const int64_t table = (2 * window_size - 1) * (2 * window_size - 1);
  const int64_t tokens = blocks_of(window_size * window_size, chunk) * chunk;
  return (tables * table + rows * tokens) * sizeof(float) + tokens * sizeof(Position);
}

template <typename Products, int D>
size_t forward_bytes(int64_t window_size) {
  return AttentionTiles<Products, D>::forward_bytes + bytes_of_window(window_size, 1, 0);
}

template <typename Products, int D>
size_t backward_bytes(int64_t window_size) {
  return AttentionTiles<Products, D>::backward_bytes + bytes_of_window(window_size, 1, 0);
}

template <typename Products, int D>
size_t large_backward_bytes(int64_t window_size) {
  return AttentionTiles<Products, D>::backward_bytes + bytes_of_window(window_size, 2, 3);
}

template <typename T, typename View>
AttentionMap<T> map_of(const View& view, int64_t channel = 0) {
  T* data = static_cast<T*>(view.data);
  return {data ? data + channel * view.stride_c : nullptr, view.stride_n, view.stride_c, view.stride_h, view.stride_w};
}

inline dim3 grid_of(int64_t blocks) {
  return dim3(static_cast<unsigned>(checked_int(blocks, "windows of all samples")));
}

template <typename Products>
void attention_forward(const WindowAttentionForward& call, cudaStream_t stream) {
  using Element = typename Products::Element;
  const WindowAttentionShape& shape = call.shape;
  AttentionForwardArguments<Element> arguments;
  arguments.q = map_of<const Element>(call.qk);
  arguments.k = map_of<const Element>(call.qk, shape.channels);
  arguments.v = map_of<const Element>(call.v);
  arguments.bias_table = static_cast<const Element*>(call.bias_table);
  arguments.y = map_of<Element>(call.y);
  arguments.windows = windows_of(shape);
  arguments.heads = checked_int(shape.heads, "num_heads");
  arguments.head_size = static_cast<int>(shape.head_size());
  arguments.count = checked_int(count_of(shape), "windows of all samples");
  arguments.run = 4;
  arguments.scale = 1 / std::sqrt(static_cast<float>(shape.head_size()));
  if (arguments.count == 0) return;
  const dim3 grid = grid_of(blocks_of(arguments.count, arguments.run) * arguments.windows.chunks * shape.heads);
  if (shape.head_size() <= 16) {
    launch("window_attention_forward_kernel", window_attention_forward_kernel<Products, 16>, grid, attention_threads,
           forward_bytes<Products, 16>(shape.window_size), stream, arguments);
  } else {
    launch("window_attention_forward_kernel", window_attention_forward_kernel<Products, 64>, grid, attention_threads,
           forward_bytes<Products, 64>(shape.window_size), stream, arguments);
  }
}

template <typename Products>
void attention_backward(const WindowAttentionBackward& call, void* workspace, cudaStream_t stream) {
  using Element = typename Products::Element;
  const WindowAttentionShape& shape = call.shape;
  const AttentionWorkspace layout = workspace_of(call);
  const auto at = [&](int64_t offset) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + offset); };
  AttentionBackwardArguments<Element> arguments;
  arguments.grad = map_of<const Element>(call.grad);
  arguments.q = map_of<const Element>(call.qk);
  arguments.k = map_of<const Element>(call.qk, shape.channels);
  arguments.v = map_of<const Element>(call.v);
  arguments.bias_table = static_cast<const Element*>(call.bias_table);
  arguments.grad_q = map_of<Element>(call.grad_qk);
  arguments.grad_k = map_of<Element>(call.grad_qk, shape.channels);
  arguments.grad_v = map_of<Element>(call.grad_v);
  arguments.windows = windows_of(shape);
  const int64_t places = band_places(arguments.windows);
  arguments.key_band = call.grad_qk.data && places > 0 ? at(0) : nullptr;
  arguments.value_band = call.grad_v.data && places > 0 ? at(layout.value_band) : nullptr;
  arguments.table_sums = call.grad_bias_table ? at(layout.table_sums) : nullptr;
  arguments.heads = checked_int(shape.heads, "num_heads");
  arguments.head_size = static_cast<int>(shape.head_size());
  arguments.channels = shape.channels;
  arguments.count = checked_int(count_of(shape), "windows of all samples");
  arguments.run = static_cast<int>(run_of(shape));
  arguments.scale = 1 / std::sqrt(static_cast<float>(shape.head_size()));
  const int64_t runs = blocks_of(arguments.count, arguments.run);
  if (runs > 0) {
    const dim3 grid = grid_of(runs * shape.heads);
    if (arguments.windows.chunks > 1) {
      launch("large_window_attention_backward_kernel", large_window_attention_backward_kernel<Products, 64>, grid,
             attention_threads, large_backward_bytes<Products, 64>(shape.window_size), stream, arguments);
    } else if (shape.head_size() <= 16) {
      launch("window_attention_backward_kernel", window_attention_backward_kernel<Products, 16>, grid,
             attention_threads, backward_bytes<Products, 16>(shape.window_size), stream, arguments);
    } else {
      launch("window_attention_backward_kernel", window_attention_backward_kernel<Products, 64>, grid,
             attention_threads, backward_bytes<Products, 64>(shape.window_size), stream, arguments);
    }
  }
  const auto gather = [&](const float* band, const AttentionMap<Element>& grad) {
    const int64_t blocks = blocks_of(places, gather_threads) * shape.batch * shape.channels;
    if (band == nullptr || blocks == 0) return;
    launch("gather_bands_kernel", gather_bands_kernel<Element>, grid_of(blocks), gather_threads, 0, stream, band, grad,
           arguments.windows, shape.channels);
  };
  gather(arguments.key_band, arguments.grad_k);
  gather(arguments.value_band, arguments.grad_v);
  if (call.grad_bias_table) {
    const int rows = static_cast<int>(shape.table_rows());
    launch("sum_table_kernel", sum_table_kernel<Element>, grid_of(blocks_of(shape.heads * rows, 32)), 32 * table_lanes,
           0, stream, arguments.table_sums, static_cast<Element*>(call.grad_bias_table), runs, rows, arguments.heads);
  }
}

}  // namespace mitnet_fast
