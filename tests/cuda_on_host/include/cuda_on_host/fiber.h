// Fibers: stacks of their own that are switched between without a system call.
#pragma once

#include <cstddef>

namespace cuda_on_host {

// Where a suspended flow of control goes on. Empty for one that is running.
struct Context {
  void* stack_pointer = nullptr;
  void* sanitizer_state = nullptr;  // AddressSanitizer's, for this flow of control
};

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry(argument) on this fiber's stack. What ran there before is forgotten.
  void start(void (*entry)(void*), void* argument);

  // Runs the fiber until it suspends itself. To be called from outside of all fibers.
  void resume();

  // Goes back to who resumed this fiber. To be called from inside; `forever` if it is never resumed.
  void suspend(bool forever = false);

 private:
  static void run(Fiber* self);

  char* stack_;  // behind a page that may not be touched
  Context own_;
  Context resumer_;
  const void* resumer_stack_ = nullptr;
  size_t resumer_stack_size_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace cuda_on_host
