// Runs the CPU kernels of the residual convolutions on random calls whose buffers and workspace are exactly as
// large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "feature_mixing/residual_conv_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
bool random_calls() {
  const int64_t b = one_of({0, 1, 2, 5}), c = one_of({1, 3, 16, 20}), joined = one_of({0, 0, 1, 20});
  const int64_t out = one_of({1, 5, 20, 41}), h = one_of({1, 4, 9, 33, 130}), w = one_of({1, 5, 17, 32, 64});
  const ResidualConvShape shape{data_type<S>, b, c, joined, out, h, w, 2.0, 0.2};
  const bool channels_last = coin();
  const auto strided = [&](auto view, auto* data, int64_t channels) {
    const int64_t sample = channels * h * w;
    return channels_last ? decltype(view){data, sample, 1, w * channels, channels}
                         : decltype(view){data, sample, h * w, w, 1};
  };
  const auto x = numbers<S>(b * c * h * w), other = numbers<S>(b * joined * h * w), grad = numbers<S>(b * out * h * w);
  const auto weight1 = numbers<S>(out * (c + joined) * 9), weight2 = numbers<S>(out * out * 9);
  const auto identity_weight = numbers<S>(out * (c + joined)), bias = numbers<S>(out);
  const ResidualConvWeights weights{weight1.data(),         bias.data(), weight2.data(), bias.data(),
                                    identity_weight.data(), bias.data()};
  const ConstMapView x_view = strided(ConstMapView{}, x.data(), c);
  const ConstMapView joined_view = joined ? strided(ConstMapView{}, other.data(), joined) : ConstMapView{};
  auto y = unwritten<S>(grad.size()), hidden = unwritten<S>(grad.size());
  const bool keeps_hidden = coin();
  run(residual_conv_kernels.forward, {shape, x_view, joined_view, weights, strided(MapView{}, y.data(), out),
                                      keeps_hidden ? strided(MapView{}, hidden.data(), out) : MapView{}});
  auto grad_x = unwritten<S>(x.size()), grad_joined = unwritten<S>(other.size());
  auto grad_weight1 = unwritten<S>(weight1.size()), grad_bias1 = unwritten<S>(out);
  auto grad_weight2 = unwritten<S>(weight2.size()), grad_bias2 = unwritten<S>(out);
  auto grad_identity_weight = unwritten<S>(identity_weight.size()), grad_identity_bias = unwritten<S>(out);
  const bool needs_x = coin(), needs_joined = joined && coin(), needs_weight1 = coin(), needs_weight2 = coin();
  run(residual_conv_kernels.backward,
      {shape, strided(ConstMapView{}, grad.data(), out), strided(ConstMapView{}, y.data(), out),
       keeps_hidden ? strided(ConstMapView{}, hidden.data(), out) : ConstMapView{}, x_view, joined_view, weights,
       needs_x ? strided(MapView{}, grad_x.data(), c) : MapView{},
       needs_joined ? strided(MapView{}, grad_joined.data(), joined) : MapView{},
       needs_weight1 ? grad_weight1.data() : nullptr, grad_bias1.data(), needs_weight2 ? grad_weight2.data() : nullptr,
       grad_bias2.data(), grad_identity_weight.data(), grad_identity_bias.data()});
  return written(y) && (!keeps_hidden || written(hidden)) && (!needs_x || written(grad_x)) &&
         (!needs_joined || written(grad_joined)) && (!needs_weight1 || written(grad_weight1)) && written(grad_bias1) &&
         (!needs_weight2 || written(grad_weight2)) && written(grad_bias2) && written(grad_identity_weight) &&
         written(grad_identity_bias);
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
