// The workspace of a call on the CPU, cut into parts, and the tasks that each thread takes with a part of its own.
//
// To be included by sources that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/vectors_cpu.h"

namespace mitnet_fast {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t cache = 1 << 20;    // bytes: most of a core's second-level cache
constexpr int64_t enough_tasks = 64;  // for the threads of any processor that this is meant for

// Parts of a workspace, each aligned to a cache line. With no memory behind it, it only counts bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }

  int64_t bytes() const { return bytes_; }
  char* rest() const { return memory_ + bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Kernels below have `tasks` and a scratch for every thread, which scratch(arena) takes from an arena.
template <typename Kernel>
int64_t scratch_bytes(const Kernel& kernel, int64_t threads) {
  Arena arena(nullptr);
  kernel.scratch(arena);
  return smaller(threads, kernel.tasks) * arena.bytes();
}

// Calls function(task, scratch) for every task; scratch_bytes(kernel, threads) bytes lie at `memory`.
template <typename Kernel, typename Function>
void for_each_task(const Kernel& kernel, char* memory, int threads, Function function) {
  const int64_t bytes = scratch_bytes(kernel, 1);
  parallel_tasks(kernel.tasks, threads, [&](int64_t task, int thread) {
    Arena own(memory + thread * bytes);
    function(task, kernel.scratch(own));
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace mitnet_fast
