// Runs the CPU kernels of the dynamic filter on random calls whose buffers and workspace are exactly as
// large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dynamic_filter/dynamic_filter_cpu_kernels.cpp"

namespace mitnet_fast {

void run_tasks(int64_t count, int threads, void (*run)(void* context, int64_t task, int thread), void* context) {
  for (int64_t task = 0; task < count; ++task) run(context, task, static_cast<int>(task % smaller(threads, count)));
}

namespace {

std::mt19937 generator;

int64_t one_of(std::initializer_list<int64_t> values) { return *(values.begin() + generator() % values.size()); }
bool coin() { return generator() % 2; }

template <typename S>
std::vector<S> numbers(int64_t count) {
  std::vector<S> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<S>(0.1 * static_cast<double>(i * 7919 % 13 - 6));
  return values;
}

template <typename S>
std::vector<S> unwritten(int64_t count) {
  return std::vector<S>(count, static_cast<S>(NAN));
}

template <typename S>
bool written(const std::vector<S>& values) {
  for (const S& value : values)
    if (std::isnan(static_cast<float>(value))) return false;
  return true;
}

template <typename Call>
void run(const CpuKernel<Call>& kernel, const Call& call) {
  const int threads = static_cast<int>(one_of({1, 2, 5}));
  const int64_t bytes = kernel.workspace_bytes(call, threads);
  void* workspace = std::aligned_alloc(64, bytes > 0 ? bytes : 64);
  std::memset(workspace, 0xff, bytes);
  kernel.launch(call, workspace, threads);
  std::free(workspace);
}

template <typename S>
bool random_calls(DataType dtype) {
  const int64_t batch = one_of({0, 1, 2, 3, 70});
  const bool small = batch == 70;
  const int64_t height = small ? one_of({1, 5, 17}) : one_of({1, 2, 5, 17, 33, 70});
  const int64_t width = small ? one_of({1, 7, 30}) : one_of({1, 3, 16, 31, 66, 130});
  const int64_t channels = one_of({1, 2, 3, 7, 16, 20}), features = one_of({1, 3, 4, 17, 20});
  const int size = static_cast<int>(one_of({1, 3, 5, 7}));
  const DynamicFilterShape shape{dtype, size, batch, channels, height, width, coin()};
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
  generator.seed(std::atoi(arguments[1]));
  for (int call = 0; call < std::atoi(arguments[2]); ++call) {
    const int64_t kind = one_of({0, 1, 2, 3});
    const bool good = kind == 0   ? random_calls<float>(DataType::float32)
                      : kind == 1 ? random_calls<double>(DataType::float64)
                      : kind == 2 ? random_calls<c10::BFloat16>(DataType::bfloat16)
                                  : random_calls<c10::Half>(DataType::float16);
    if (!good) {
      std::printf("call %d leaves an element unwritten\n", call);
      return 1;
    }
  }
}
