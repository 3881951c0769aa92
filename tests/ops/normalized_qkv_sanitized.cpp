// Runs the CPU kernels of the normalised projections on random calls whose buffers and workspace are exactly as
// large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "feature_mixing/normalized_qkv_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
bool random_calls() {
  const int64_t b = one_of({0, 1, 2}), c = one_of({1, 3, 16, 20, 24, 48});
  const int64_t h = one_of({1, 4, 9, 33}), w = one_of({1, 5, 17, 70});
  const FeatureMixingShape shape{data_type<S>, b, c, 0, h, w};
  const bool channels_last = coin();
  const auto strided = [&](auto view, auto* data, int64_t channels) {
    return channels_last ? decltype(view){data, channels * h * w, 1, w * channels, channels}
                         : decltype(view){data, channels * h * w, h * w, w, 1};
  };
  const auto x = numbers<S>(b * c * h * w), projected = numbers<S>(2 * b * c * h * w), of_samples = numbers<S>(b);
  const auto norm = numbers<S>(c), matrix = numbers<S>(2 * c * c), bias = numbers<S>(2 * c);
  const NormalizedQkvWeights weights{norm.data(), norm.data(), matrix.data(), norm.data(), matrix.data(), bias.data()};
  const ConstMapView x_view = strided(ConstMapView{}, x.data(), c);
  auto value = unwritten<S>(x.size()), query_key = unwritten<S>(projected.size());
  auto mean = unwritten<S>(b), deviation = unwritten<S>(b);
  run(normalized_qkv_kernels.forward, {shape, x_view, weights, strided(MapView{}, value.data(), c),
                                       strided(MapView{}, query_key.data(), 2 * c), mean.data(), deviation.data()});
  auto grad_x = unwritten<S>(x.size()), grad_norm_weight = unwritten<S>(c), grad_norm_bias = unwritten<S>(c);
  auto grad_value_weight = unwritten<S>(c * c), grad_value_bias = unwritten<S>(c);
  auto grad_query_key_weight = unwritten<S>(2 * c * c), grad_query_key_bias = unwritten<S>(2 * c);
  const bool needs_x = coin(), needs_norm_weight = coin(), needs_products = coin();
  run(normalized_qkv_kernels.backward,
      {shape, x_view, strided(ConstMapView{}, projected.data(), 2 * c), of_samples.data(), of_samples.data(), x_view,
       weights, needs_x ? strided(MapView{}, grad_x.data(), c) : MapView{},
       needs_norm_weight ? grad_norm_weight.data() : nullptr, grad_norm_bias.data(),
       needs_products ? grad_value_weight.data() : nullptr, grad_value_bias.data(),
       needs_products ? grad_query_key_weight.data() : nullptr, grad_query_key_bias.data()});
  return written(value) && written(query_key) && written(mean) && written(deviation) && (!needs_x || written(grad_x)) &&
         (!needs_norm_weight || written(grad_norm_weight)) && written(grad_norm_bias) &&
         (!needs_products || written(grad_value_weight)) && written(grad_value_bias) &&
         (!needs_products || written(grad_query_key_weight)) && written(grad_query_key_bias);
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
