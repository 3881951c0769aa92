// What the programs share that run a family's CPU kernels for AddressSanitizer and
// UndefinedBehaviorSanitizer: random choices, buffers that are exactly as large as they may be and hold NaN
// where kernels write, and the loop over calls.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <type_traits>
#include <vector>

#include "common/cpu_kernel.h"
#include "common/parallel.h"
#include "common/tensor_view.h"
#include "common/vectors_cpu.h"

namespace mitnet_fast {

void run_tasks(int64_t count, int threads, void (*run)(void* context, int64_t task, int thread), void* context) {
  for (int64_t task = 0; task < count; ++task) run(context, task, static_cast<int>(task % smaller(threads, count)));
}

namespace {

std::mt19937 generator;

int64_t one_of(std::initializer_list<int64_t> values) { return *(values.begin() + generator() % values.size()); }
bool coin() { return generator() % 2; }

template <typename S>
constexpr DataType data_type = std::is_same_v<S, float>           ? DataType::float32
                               : std::is_same_v<S, double>        ? DataType::float64
                               : std::is_same_v<S, c10::BFloat16> ? DataType::bfloat16
                                                                  : DataType::float16;

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

// Seeds the choices by arguments[1], makes arguments[2] random calls, each of one of the kinds; 1 if one leaves an
// element unwritten, else 0.
int run_calls(char** arguments, const std::vector<bool (*)()>& kinds) {
  generator.seed(std::atoi(arguments[1]));
  for (int call = 0; call < std::atoi(arguments[2]); ++call) {
    if (!kinds[generator() % kinds.size()]()) {
      std::printf("call %d leaves an element unwritten\n", call);
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace mitnet_fast
