// Runs the spectral step of the amplitude / phase convolution on random calls whose buffers and workspace
// are exactly as large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "amplitude_phase/amplitude_phase_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename T>
bool random_calls() {
  const int64_t channels = one_of({1, 3, 5, 20, 41}), hidden = one_of({1, 4, 7, 20}), out = one_of({1, 4, 6, 20});
  const bool projects = coin(), skip = projects && coin(), biased = projects && coin();
  const AmplitudePhaseShape shape{data_type<T>,
                                  1,
                                  channels,
                                  hidden,
                                  projects ? out : channels,
                                  one_of({1, 2, 7, 16, 40}),
                                  one_of({1, 2, 5, 16, 66}),
                                  coin(),
                                  0.2,
                                  false,
                                  skip};
  const auto weight1 = numbers<T>(hidden * channels), bias1 = numbers<T>(hidden);
  const auto weight2 = numbers<T>(channels * hidden), bias2 = numbers<T>(channels);
  const auto output_weight = numbers<T>(out * shape.output_inputs()), output_bias = numbers<T>(out);
  const SpectralMap map{weight1.data(),
                        bias1.data(),
                        weight2.data(),
                        bias2.data(),
                        projects ? output_weight.data() : nullptr,
                        biased ? output_bias.data() : nullptr};
  const int64_t values = 2 * shape.bins();
  auto x = numbers<T>(values * channels);
  const auto grad = numbers<T>(values * shape.out_channels);
  auto y = unwritten<T>(values * shape.out_channels);
  run(amplitude_phase_kernels.forward, {shape, map, x.data(), y.data()});
  if (!written(y)) return false;

  const int64_t pixels = shape.height * shape.width, step = coin() ? channels : 1;  // channels_last or contiguous
  const int64_t channel_step = step == 1 ? pixels : 1;
  const auto image = numbers<T>(pixels * channels);
  auto planes = unwritten<T>(values * channels), copy = unwritten<T>(pixels * channels);
  const ConstMapView from{image.data(), 0, channel_step, shape.width * step, step};
  const MapView to{copy.data(), 0, channel_step, shape.width * step, step};
  amplitude_phase_kernels.to_planes(shape, from, channels, planes.data(), 3);
  amplitude_phase_kernels.from_planes(shape, planes.data(), channels, to, 3);
  if (copy != image) return false;

  const auto gradient = [](int64_t count) { return coin() ? unwritten<T>(count) : std::vector<T>(); };
  auto grad_x = gradient(x.size()), grad_weight1 = gradient(weight1.size()), grad_bias1 = gradient(hidden);
  auto grad_weight2 = gradient(weight2.size()), grad_bias2 = gradient(channels);
  auto grad_output_weight = projects ? gradient(output_weight.size()) : std::vector<T>();
  auto grad_output_bias = biased ? gradient(out) : std::vector<T>();
  const auto data = [](auto& values) { return values.empty() ? nullptr : values.data(); };
  AmplitudePhaseSampleBackward sample{
      {shape, map, grad.data(), x.data(), data(grad_x), data(grad_weight1), data(grad_bias1), data(grad_weight2),
       data(grad_bias2), data(grad_output_weight), data(grad_output_bias)},
      nullptr};
  std::vector<char> sums(amplitude_phase_kernels.sums_bytes(sample));
  sample.sums = sums.data();
  for (int n = 0; n < 2; ++n) run(amplitude_phase_kernels.backward, sample);
  amplitude_phase_kernels.add_up(sample, static_cast<int>(one_of({1, 2, 5})));
  return written(grad_x) && written(grad_weight1) && written(grad_bias1) && written(grad_weight2) &&
         written(grad_bias2) && written(grad_output_weight) && written(grad_output_bias);
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>});
}
