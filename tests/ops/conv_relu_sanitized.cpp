// Runs the CPU kernel of the conv-ReLU on random calls whose buffers and workspace are exactly as large as
// they may be, filled with NaN where they are written: for AddressSanitizer and UndefinedBehaviorSanitizer.
// Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "feature_mixing/conv_relu_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
bool random_calls() {
  const int64_t b = one_of({0, 1, 2}), c = one_of({1, 3, 16, 20, 40}), joined = one_of({0, 0, 1, 16, 33});
  const int64_t out = one_of({1, 5, 16, 32, 40, 130}), h = one_of({1, 4, 9, 24}), w = one_of({1, 5, 17, 32, 130});
  const ConvReluShape shape{data_type<S>, b, c, joined, out, h, w};
  const bool channels_last = coin();
  const auto strided = [&](auto view, auto* data, int64_t channels) {
    const int64_t sample = channels * h * w;
    return channels_last ? decltype(view){data, sample, 1, w * channels, channels}
                         : decltype(view){data, sample, h * w, w, 1};
  };
  const auto x = numbers<S>(b * c * h * w), other = numbers<S>(b * joined * h * w);
  const auto weight = numbers<S>(out * (c + joined) * 9), scale = numbers<S>(out), shift = numbers<S>(out);
  auto y = unwritten<S>(b * out * h * w);
  run(conv_relu_kernels.forward,
      {shape, strided(ConstMapView{}, x.data(), c),
       joined ? strided(ConstMapView{}, other.data(), joined) : ConstMapView{}, weight.data(), coin(), scale.data(),
       shift.data(), strided(MapView{}, y.data(), out)});
  return written(y);
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
