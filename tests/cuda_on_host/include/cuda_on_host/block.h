// One block of CUDA threads on one thread of the operating system: a fiber per CUDA thread.
//
// Fibers run one at a time, each until it has to wait for others: at a barrier or at a warp-wide
// instruction. In which order they get their turn is up to Settings, so that a kernel that lacks a
// barrier computes something else in one order than in another. Every wait is checked: threads that
// wait for each other in vain, at different barriers or in different instructions, are an error that
// says where each of them stands.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host/fiber.h"
#include "cuda_on_host/vector_types.h"

namespace cuda_on_host {

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;  // of blocks, and of the threads of a block
  uint64_t seed = 0;             // of the random order
  int workers = 1;               // threads of the operating system, which share the blocks
};

// What a kernel did that it must not.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Site {
  const char* file;
  int line;
};

// Memory with guards behind it, filled with NaN (for integers: -1).
class Poisoned {
 public:
  Poisoned(size_t size, size_t alignment);
  ~Poisoned();
  Poisoned(Poisoned&& other) noexcept;
  void* data() const { return data_; }
  bool intact() const;  // whether nobody wrote behind its end

 private:
  void* data_;
  size_t size_;
};

// An asynchronous copy to shared memory; from nowhere it brings zeros.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

class Block;

struct Thread {
  enum class State { ready, at_barrier, in_warp, finished };

  Block* block;
  uint3 index;
  int number;  // in the block
  State state;
  // of the barrier or warp-wide instruction waited in
  const char* instruction;
  Site site;
  unsigned mask;
  const void* input;
  void* output;
  Fiber* fiber;
  // asynchronous copies that have not arrived, and how many of them each group that is closed ends behind
  std::vector<Copy> copies;
  std::vector<size_t> copy_groups;

  int lane() const { return number % 32; }

  // Lets all groups of copies but the last `pending` arrive.
  void finish_copies(size_t pending);
};

class Block {
 public:
  Block(dim3 grid, dim3 block, size_t dynamic_shared, const Settings& settings);

  // Runs body(argument) once per thread of the block with this index. Throws Fault.
  void run(uint3 index, void (*body)(void*), void* argument);

  // For use by its threads.

  // Waits for all threads of the block. Gives the number of them whose predicate holds.
  int barrier(const char* instruction, bool predicate, Site site);

  // Waits for all lanes of `mask`; then one of them calls compute(inputs, outputs), arrays of 32 by
  // lane whose entries outside of the mask are null.
  void warp(const char* instruction, unsigned mask, const void* input, void* output, Site site,
            void (*compute)(const void* const* inputs, void* const* outputs));

  // The block's own copy of the variable that `key` stands for.
  void* shared_variable(const void* key, size_t size, size_t alignment);
  void* dynamic_shared();

  [[noreturn]] void fail(const std::string& message);

  uint3 index{};
  const dim3 size;
  const dim3 grid;

 private:
  static void enter(void* thread);
  void run_all();
  void release_barrier();
  void check_guards();
  std::string places() const;  // where all threads stand, in words

  const Settings settings_;
  const size_t dynamic_size_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Thread> threads_;
  std::vector<int> turns_;
  std::map<const void*, Poisoned> shared_;
  std::unique_ptr<Poisoned> dynamic_shared_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  int finished_ = 0;
  int at_barrier_ = 0;
  int holding_ = 0;     // threads at the barrier whose predicate holds
  int last_count_ = 0;  // of the barrier released last
  std::string failure_;
};

// The thread that is running on this thread of the operating system.
extern thread_local Thread* current;

// All blocks of a grid, spread over the workers of the settings. Throws Fault.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(void*), void* argument);

Settings& settings();

}  // namespace cuda_on_host
