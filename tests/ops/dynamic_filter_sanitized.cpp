// Runs the CPU kernels of the dynamic filter on random calls whose buffers and workspace are exactly as
// large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "dynamic_filter/dynamic_filter_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
bool random_calls() {
  const int64_t batch = one_of({0, 1, 2, 3, 70});
  const bool small = batch == 70;
  const int64_t height = small ? one_of({1, 5, 17}) : one_of({1, 2, 5, 17, 33, 70});
  const int64_t width = small ? one_of({1, 7, 30}) : one_of({1, 3, 16, 31, 66, 130});
  const int64_t channels = one_of({1, 2, 3, 7, 16, 20}), features = one_of({1, 3, 4, 17, 20});
  const int size = static_cast<int>(one_of({1, 3, 5, 7}));
  const DynamicFilterShape shape{data_type<S>, size, batch, channels, height, width, coin()};
  const int64_t rows = channels * size * size, pixels = batch * height * width;
  const auto strided = [&](auto view, auto* data, int64_t c, bool channels_last) {
    return channels_last ? decltype(view){data, c * height * width, 1, width * c, c}
                         : decltype(view){data, c * height * width, height * width, width, 1};
  };
  const bool x_last = coin(), features_last = coin(), grad_last = coin(), filters_last = coin();
  const auto x = numbers<S>(pixels * channels), grad = numbers<S>(pixels * channels);
  const auto feature_map = numbers<S>(pixels * features), filters = numbers<S>(pixels * rows);
  const bool has_bias = coin(), per_sample = has_bias && coin();
  const auto weight = numbers<S>(rows * features), bias = numbers<S>(rows * (per_sample ? batch : 1));
  const ConstMapView x_view = strided(ConstMapView{}, x.data(), channels, x_last);
  const ConstMapView grad_view = strided(ConstMapView{}, grad.data(), channels, grad_last);
  const ConstMapView filters_view = strided(ConstMapView{}, filters.data(), rows, filters_last);
  const FilterPredictor predictor{strided(ConstMapView{}, feature_map.data(), features, features_last), features,
                                  weight.data(), has_bias ? bias.data() : nullptr, per_sample};

  auto y = unwritten<S>(x.size());
  const MapView y_view = strided(MapView{}, y.data(), channels, x_last);
  run(dynamic_filter_kernels.forward, {shape, x_view, filters_view, y_view});
  if (!written(y)) return false;
  y = unwritten<S>(x.size());
  const MapView y_again = strided(MapView{}, y.data(), channels, x_last);
  run(dynamic_filter_kernels.predicted_forward, {shape, x_view, predictor, y_again});
  if (!written(y)) return false;

  const bool needs_x = coin(), needs_map = coin(), needs_weight = coin(), needs_bias = has_bias && coin();
  auto grad_x = unwritten<S>(x.size());
  auto grad_filters = unwritten<S>(filters.size()), grad_features = unwritten<S>(feature_map.size());
  auto grad_weight = unwritten<S>(weight.size()), grad_bias = unwritten<S>(bias.size());
  const MapView none{};
  const MapView grad_x_view = needs_x ? strided(MapView{}, grad_x.data(), channels, x_last) : none;
  run(dynamic_filter_kernels.backward,
      {shape, grad_view, x_view, filters_view, grad_x_view,
       needs_map ? strided(MapView{}, grad_filters.data(), rows, filters_last) : none});
  if ((needs_x && !written(grad_x)) || (needs_map && !written(grad_filters))) return false;
  std::fill(grad_x.begin(), grad_x.end(), static_cast<S>(NAN));
  run(dynamic_filter_kernels.predicted_backward,
      {shape, grad_view, x_view, predictor, grad_x_view,
       needs_map ? strided(MapView{}, grad_features.data(), features, features_last) : none,
       needs_weight ? grad_weight.data() : nullptr, needs_bias ? grad_bias.data() : nullptr});
  return (!needs_x || written(grad_x)) && (!needs_map || written(grad_features)) &&
         (!needs_weight || written(grad_weight)) && (!needs_bias || written(grad_bias));
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments,
                   {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>, random_calls<c10::Half>});
}
