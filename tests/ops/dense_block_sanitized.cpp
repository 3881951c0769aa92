// Runs the CPU kernels of the dense block on random calls whose buffers and workspace are exactly as large
// as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "feature_mixing/dense_block_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
bool random_calls() {
  const int64_t b = one_of({0, 1, 2}), c = one_of({1, 3, 16, 20}), g = one_of({1, 5, 32});
  const int64_t h = one_of({1, 4, 9, 33}), w = one_of({1, 5, 17, 40});
  const DenseBlockShape shape{data_type<S>, b, c, g, h, w};
  const bool channels_last = coin();
  const auto strided = [&](auto view, auto* data) {
    return channels_last ? decltype(view){data, c * h * w, 1, w * c, c} : decltype(view){data, c * h * w, h * w, w, 1};
  };
  const auto x = numbers<S>(b * c * h * w), dense_weight = numbers<S>(45 * g * (c + 2 * g));
  const auto dense_bias = numbers<S>(5 * g), fuse_weight = numbers<S>(c * (c + 5 * g)), fuse_bias = numbers<S>(c);
  const DenseWeights weights{dense_weight.data(), dense_bias.data(), fuse_weight.data(), fuse_bias.data()};
  const ConstMapView x_view = strided(ConstMapView{}, x.data());
  auto y = unwritten<S>(x.size());
  run(dense_block_kernels.forward, {shape, x_view, weights, strided(MapView{}, y.data())});
  auto grad_x = unwritten<S>(x.size()), grad_dense_weight = unwritten<S>(dense_weight.size());
  auto grad_dense_bias = unwritten<S>(5 * g), grad_fuse_weight = unwritten<S>(fuse_weight.size());
  auto grad_fuse_bias = unwritten<S>(c);
  const bool needs_x = coin(), needs_dense_weight = coin(), needs_fuse_bias = coin();
  run(dense_block_kernels.backward,
      {shape, x_view, x_view, weights, needs_x ? strided(MapView{}, grad_x.data()) : MapView{},
       needs_dense_weight ? grad_dense_weight.data() : nullptr, grad_dense_bias.data(), grad_fuse_weight.data(),
       needs_fuse_bias ? grad_fuse_bias.data() : nullptr});
  return written(y) && (!needs_x || written(grad_x)) && (!needs_dense_weight || written(grad_dense_weight)) &&
         written(grad_dense_bias) && written(grad_fuse_weight) && (!needs_fuse_bias || written(grad_fuse_bias));
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
