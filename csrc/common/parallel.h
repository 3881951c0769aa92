// PyTorch's threads for code that includes no PyTorch header.
#pragma once

#include <cstdint>

namespace mitnet_fast {

// Threads that PyTorch gives to one operator called from here (torch.set_num_threads).
int max_threads();

// Calls run(context, task, thread) once for every task in [0, count), thread in
// [0, min(threads, count)). Which thread gets which task is left to chance: results must depend on the task alone.
void run_tasks(int64_t count, int threads, void (*run)(void* context, int64_t task, int thread), void* context);

template <typename Function>
void parallel_tasks(int64_t count, int threads, Function function) {
  run_tasks(
      count, threads, [](void* context, int64_t task, int thread) { (*static_cast<Function*>(context))(task, thread); },
      &function);
}

}  // namespace mitnet_fast
