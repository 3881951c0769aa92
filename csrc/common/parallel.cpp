#include "common/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace mitnet_fast {

int max_threads() { return at::get_num_threads(); }

void run_tasks(int64_t count, int threads, void (*run)(void* context, int64_t task, int thread), void* context) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next++; task < count; task = next++) run(context, task, static_cast<int>(thread));
    }
  });
}

}  // namespace mitnet_fast
