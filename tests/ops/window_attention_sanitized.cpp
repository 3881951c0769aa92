// Runs the CPU kernels of window attention on random calls whose buffers and workspace are exactly as
// large as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "sanitized.h"
#include "window_attention/window_attention_cpu_kernels.cpp"

namespace mitnet_fast {
namespace {

// A side that reflection can pad to whole windows.
int64_t side(int64_t window_size, int64_t shift, int64_t most) {
  while (true) {
    const int64_t size = 1 + generator() % most, after = round_up(shift + size, window_size) - shift - size;
    if (larger(shift, after) < size) return size;
  }
}

template <typename S>
bool random_calls() {
  const int64_t window_size = one_of({1, 2, 3, 4, 7, 8, 16}), shift = generator() % window_size;
  const int64_t heads = one_of({1, 2, 3}), channels = heads * one_of({1, 3, 5, 8, 12, 16, 20});
  const int64_t batch = one_of({0, 1, 2});
  const int64_t height = side(window_size, shift, 40), width = side(window_size, shift, coin() ? 40 : 160);
  const WindowAttentionShape shape{data_type<S>, batch, channels, height, width, heads, window_size, shift};
  const int64_t pixels = batch * height * width;
  const auto strided = [&](auto view, auto* data, int64_t c, bool channels_last) {
    return channels_last ? decltype(view){data, c * height * width, 1, width * c, c}
                         : decltype(view){data, c * height * width, height * width, width, 1};
  };
  const bool qk_last = coin(), v_last = coin(), grad_last = coin();
  const auto qk = numbers<S>(2 * pixels * channels), v = numbers<S>(pixels * channels), grad = v;
  const auto table = numbers<S>(shape.table_rows() * heads);
  const ConstMapView qk_view = strided(ConstMapView{}, qk.data(), 2 * channels, qk_last);
  const ConstMapView v_view = strided(ConstMapView{}, v.data(), channels, v_last);
  const ConstMapView grad_view = strided(ConstMapView{}, grad.data(), channels, grad_last);

  auto y = unwritten<S>(v.size());
  run(window_attention_kernels.forward,
      {shape, qk_view, v_view, table.data(), strided(MapView{}, y.data(), channels, v_last)});
  if (!written(y)) return false;

  const bool needs_qk = coin(), needs_v = coin(), needs_table = coin();
  auto grad_qk = unwritten<S>(qk.size()), grad_v = unwritten<S>(v.size()), grad_table = unwritten<S>(table.size());
  run(window_attention_kernels.backward,
      {shape, grad_view, qk_view, v_view, table.data(),
       needs_qk ? strided(MapView{}, grad_qk.data(), 2 * channels, qk_last) : MapView{},
       needs_v ? strided(MapView{}, grad_v.data(), channels, v_last) : MapView{},
       needs_table ? grad_table.data() : nullptr});
  return (!needs_qk || written(grad_qk)) && (!needs_v || written(grad_v)) && (!needs_table || written(grad_table));
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
