// Runs the CPU kernels of feature mixing on random calls whose buffers and workspace are exactly as large
// as they may be, filled with NaN where they are written: for AddressSanitizer and
// UndefinedBehaviorSanitizer. Arguments: seed, number of calls. Exits with 1 if an element is not written.
#include "feature_mixing/feature_mixing_cpu_kernels.cpp"
#include "sanitized.h"

namespace mitnet_fast {
namespace {

template <typename S>
struct RandomCall {
  FeatureMixingShape shape;
  bool channels_last = coin();

  RandomCall()
      : shape{data_type<S>,       one_of({0, 1, 2}),     one_of({1, 3, 16, 20, 24, 48}),
              one_of({1, 6, 40}), one_of({3, 4, 9, 33}), one_of({3, 5, 17, 70})} {}

  int64_t size() const { return shape.batch * shape.channels * shape.height * shape.width; }

  template <typename View, typename Data>
  View view(Data* data) const {
    const int64_t c = shape.channels, h = shape.height, w = shape.width;
    return channels_last ? View{data, c * h * w, 1, w * c, c} : View{data, c * h * w, h * w, w, 1};
  }

  bool mlp() const {
    const int64_t c = shape.channels, hidden = shape.hidden;
    const auto x = numbers<S>(size()), weight = numbers<S>(c * hidden), bias1 = numbers<S>(hidden),
               bias2 = numbers<S>(c);
    const auto x_view = view<ConstMapView>(x.data());
    auto y = unwritten<S>(size());
    run(feature_mixing_kernels.mlp_forward,
        {shape, x_view, weight.data(), bias1.data(), weight.data(), bias2.data(), view<MapView>(y.data())});
    auto grad_x = unwritten<S>(size()), grad_weight1 = unwritten<S>(c * hidden), grad_weight2 = grad_weight1;
    auto grad_bias1 = unwritten<S>(hidden), grad_bias2 = unwritten<S>(c);
    const bool needs_x = coin(), needs_weight1 = coin(), needs_bias2 = coin();
    run(feature_mixing_kernels.mlp_backward,
        {shape, x_view, x_view, weight.data(), bias1.data(), weight.data(),
         needs_x ? view<MapView>(grad_x.data()) : MapView{}, needs_weight1 ? grad_weight1.data() : nullptr,
         grad_bias1.data(), grad_weight2.data(), needs_bias2 ? grad_bias2.data() : nullptr});
    return written(y) && (!needs_x || written(grad_x)) && (!needs_weight1 || written(grad_weight1)) &&
           written(grad_bias1) && written(grad_weight2) && (!needs_bias2 || written(grad_bias2));
  }

  bool mixing() const {
    const bool attends = coin();
    const int64_t c = shape.channels;
    const auto x = numbers<S>(size()), matrix = numbers<S>(c * c), local = numbers<S>(c * 25), vector = numbers<S>(c);
    const auto per_sample = numbers<S>(shape.batch * c);
    const auto x_view = view<ConstMapView>(x.data());
    const ConstMapView second = attends ? x_view : ConstMapView{};
    const bool scales = attends && shape.batch > 0;  // no pointer without elements
    const S zero = 0;
    const void* scale = attends ? (scales ? per_sample.data() : &zero) : nullptr;
    const MixingWeights weights{attends ? nullptr : matrix.data(),
                                attends ? nullptr : vector.data(),
                                local.data(),
                                vector.data(),
                                matrix.data(),
                                vector.data(),
                                scale,
                                scale};
    auto y = unwritten<S>(size());
    run(feature_mixing_kernels.local_forward, {shape, x_view, second, second, weights, view<MapView>(y.data())});
    auto grad_map = unwritten<S>(size()), grad_attended = grad_map;
    auto grad_value_weight = unwritten<S>(c * c), grad_proj_weight = grad_value_weight;
    auto grad_local_weight = unwritten<S>(c * 25), grad_proj_bias = unwritten<S>(c);
    auto grad_rescale = unwritten<S>(shape.batch * c), grad_rebias = grad_rescale;
    LocalMixingBackward call{shape, x_view, x_view, second, second, weights};
    const bool needs_map = coin(), needs_weights = coin();
    if (needs_map) (attends ? call.grad_value : call.grad_x) = view<MapView>(grad_map.data());
    if (attends) call.grad_attended = view<MapView>(grad_attended.data());
    if (needs_weights) {
      call.grad_local_weight = grad_local_weight.data();
      call.grad_proj_weight = grad_proj_weight.data();
      call.grad_proj_bias = grad_proj_bias.data();
      if (!attends) call.grad_value_weight = grad_value_weight.data();
      if (scales) call.grad_rescale = grad_rescale.data(), call.grad_rebias = grad_rebias.data();
    }
    run(feature_mixing_kernels.local_backward, call);
    return written(y) && (!needs_map || written(grad_map)) && (!attends || written(grad_attended)) &&
           (!needs_weights ||
            (written(grad_local_weight) && written(grad_proj_weight) && written(grad_proj_bias) &&
             (attends || written(grad_value_weight)) && (!scales || (written(grad_rescale) && written(grad_rebias)))));
  }
};

template <typename S>
bool random_calls() {
  const RandomCall<S> call;
  return call.mlp() && call.mixing();
}

}  // namespace
}  // namespace mitnet_fast

int main(int, char** arguments) {
  using namespace mitnet_fast;
  return run_calls(arguments, {random_calls<float>, random_calls<double>, random_calls<c10::BFloat16>});
}
