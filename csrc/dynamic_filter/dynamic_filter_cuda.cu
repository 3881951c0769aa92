#include <stdexcept>
#include <type_traits>

#include "common/launch.cuh"
#include "dynamic_filter/dynamic_filter_cuda.h"
#include "dynamic_filter/dynamic_filter_kernels.cuh"
#include "dynamic_filter/predicted_dynamic_filter_cuda.h"
#include "dynamic_filter/products_cuda.cuh"

namespace mitnet_fast {
namespace {

template <int K>
GivenGrid grid_of(const DynamicFilterShape& shape) {
  using Sizes = GivenSizes<K>;
  return {checked_int(blocks_of(shape.channels, Sizes::channels), "channels"),
          checked_int(blocks_of(shape.width, Sizes::columns), "width"),
          checked_int(blocks_of(shape.height, Sizes::rows), "height"),
          checked_int(shape.channels * Sizes::taps, "filters") / Sizes::taps,
          checked_int(shape.height, "height"),
          checked_int(shape.width, "width")};
}

dim3 blocks_for(const DynamicFilterShape& shape, const GivenGrid& grid) {
  const int64_t tiles = shape.batch * grid.tile_columns * grid.tile_rows;
  return dim3(static_cast<unsigned>(checked_int(tiles * grid.channel_groups, "tiles of x")));
}

template <int K, typename T>
void forward(const DynamicFilterForward& call, cudaStream_t stream) {
  using Sizes = GivenSizes<K>;
  const DynamicFilterShape& shape = call.shape;
  if (shape.batch == 0) return;
  const GivenGrid grid = grid_of<K>(shape);
  launch("filter_kernel", filter_kernel<K, T>, blocks_for(shape, grid), Sizes::threads, Sizes::shared * sizeof(T),
         stream, map_of<const T>(call.x, shape.channels), map_of<const T>(call.filters, shape.channels * Sizes::taps),
         map_of<T>(call.y, shape.channels), grid, shape.residual);
}

template <int K, typename T>
void backward(const DynamicFilterBackward& call, cudaStream_t stream) {
  using Sizes = GivenSizes<K>;
  const DynamicFilterShape& shape = call.shape;
  if (shape.batch == 0) return;
  const GivenGrid grid = grid_of<K>(shape);
  const auto grad = map_of<const T>(call.grad, shape.channels);
  if (call.grad_x.data) {
    launch("grad_x_kernel", grad_x_kernel<K, T>, blocks_for(shape, grid), Sizes::threads, 0, stream, grad,
           map_of<const T>(call.filters, shape.channels * Sizes::taps), map_of<T>(call.grad_x, shape.channels), grid,
           shape.residual);
  }
  if (call.grad_filters.data) {
    launch("grad_filters_kernel", grad_filters_kernel<K, T>, blocks_for(shape, grid), Sizes::threads,
           Sizes::shared * sizeof(T), stream, grad, map_of<const T>(call.x, shape.channels),
           map_of<T>(call.grad_filters, shape.channels * Sizes::taps), grid);
  }
}

// Calls visitor(integral_constant of K).
template <typename Visitor>
void with_kernel_size(int kernel_size, Visitor&& visitor) {
  switch (kernel_size) {
    case 1:
      return visitor(std::integral_constant<int, 1>());
    case 3:
      return visitor(std::integral_constant<int, 3>());
    case 5:
      return visitor(std::integral_constant<int, 5>());
    case 7:
      return visitor(std::integral_constant<int, 7>());
    default:
      throw std::invalid_argument("kernel_size: allowed are 1, 3, 5 and 7");
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls visitor(Type of the elements).
template <typename Visitor>
auto with_type(DataType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DataType::float32:
      return visitor(Type<float>());
    case DataType::bfloat16:
      return visitor(Type<__nv_bfloat16>());
    case DataType::float16:
      return visitor(Type<__half>());
    default:
      throw std::invalid_argument("dtype: allowed are float32, bfloat16 and float16");
  }
}

// Calls visitor(Type of the products).
template <typename Visitor>
auto with_products(DataType dtype, bool tf32, Visitor&& visitor) {
  switch (dtype) {
    case DataType::float32:
      return tf32 ? visitor(Type<Tf32Products>()) : visitor(Type<IeeeProducts>());
    case DataType::bfloat16:
      return visitor(Type<HalfProducts<__nv_bfloat16>>());
    case DataType::float16:
      return visitor(Type<HalfProducts<__half>>());
    default:
      throw std::invalid_argument("dtype: allowed are float32, bfloat16 and float16");
  }
}

}  // namespace

void dynamic_filter_forward_cuda(const DynamicFilterForward& call, void* stream) {
  with_type(call.shape.dtype, [&](auto type) {
    with_kernel_size(call.shape.kernel_size, [&](auto size) {
      forward<decltype(size)::value, typename decltype(type)::type>(call, static_cast<cudaStream_t>(stream));
    });
  });
}

void dynamic_filter_backward_cuda(const DynamicFilterBackward& call, void* stream) {
  with_type(call.shape.dtype, [&](auto type) {
    with_kernel_size(call.shape.kernel_size, [&](auto size) {
      backward<decltype(size)::value, typename decltype(type)::type>(call, static_cast<cudaStream_t>(stream));
    });
  });
}

int64_t predicted_dynamic_filter_forward_workspace_cuda(const PredictedDynamicFilterForward& call, bool tf32) {
  return with_products(call.shape.dtype, tf32, [&](auto products) {
    return predicted_forward_workspace<typename decltype(products)::type>(call);
  });
}

void predicted_dynamic_filter_forward_cuda(const PredictedDynamicFilterForward& call, bool tf32, void* workspace,
                                           void* stream) {
  with_products(call.shape.dtype, tf32, [&](auto products) {
    predicted_forward<typename decltype(products)::type>(call, workspace, static_cast<cudaStream_t>(stream));
  });
}

int64_t predicted_dynamic_filter_backward_workspace_cuda(const PredictedDynamicFilterBackward& call, bool tf32) {
  return with_products(call.shape.dtype, tf32, [&](auto products) {
    return predicted_backward_workspace<typename decltype(products)::type>(call);
  });
}

void predicted_dynamic_filter_backward_cuda(const PredictedDynamicFilterBackward& call, bool tf32, void* workspace,
                                            void* stream) {
  with_products(call.shape.dtype, tf32, [&](auto products) {
    predicted_backward<typename decltype(products)::type>(call, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mitnet_fast
