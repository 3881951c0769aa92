#include "cuda_on_host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if !defined(__x86_64__)
#error "cuda_on_host switches between fibers in x86-64 assembly; there is none for this processor yet"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the System V calling convention lets a callee change only temporarily, stores the stack
// pointer in *from, and goes on where `to` was stored.
extern "C" void cuda_on_host_switch(void** from, void* to);
// Where a fiber begins: calls r12 with rbx.
extern "C" void cuda_on_host_begin();
asm(R"(
.text
.type cuda_on_host_switch, @function
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
.type cuda_on_host_begin, @function
.globl cuda_on_host_begin
.hidden cuda_on_host_begin
cuda_on_host_begin:
  movq %rbx, %rdi
  call *%r12
  ud2
.size cuda_on_host_begin, .-cuda_on_host_begin
)");

namespace cuda_on_host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_size = 512 * 1024;  // frames are several times larger there
#else
constexpr size_t stack_size = 128 * 1024;
#endif
constexpr size_t guard_size = 4096;

// What cuda_on_host_switch pops, from low to high addresses.
struct Frame {
  uint32_t mxcsr;
  uint16_t x87_control;
  uint16_t unused;
  void* r15;
  void* r14;
  void* r13;
  void* r12;
  void* rbx;
  void* rbp;
  void* return_address;
  void* end[2];  // keeps the stack aligned to 16 where cuda_on_host_begin calls
};

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, guard_size + stack_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_size, PROT_NONE);
  stack_ = static_cast<char*>(memory) + guard_size;
}

Fiber::~Fiber() { munmap(stack_ - guard_size, guard_size + stack_size); }

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, stack_size);
#endif
  own_ = {};
  auto* frame = reinterpret_cast<Frame*>(stack_ + stack_size - sizeof(Frame));
  std::memset(frame, 0, sizeof(Frame));
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(frame->mxcsr), "=m"(frame->x87_control));
  frame->r12 = reinterpret_cast<void*>(&Fiber::run);
  frame->rbx = this;
  frame->return_address = reinterpret_cast<void*>(&cuda_on_host_begin);
  own_.stack_pointer = frame;
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&resumer_.sanitizer_state, stack_, stack_size);
#endif
  cuda_on_host_switch(&resumer_.stack_pointer, own_.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(resumer_.sanitizer_state, nullptr, nullptr);
#endif
}

void Fiber::suspend(bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &own_.sanitizer_state, resumer_stack_, resumer_stack_size_);
#endif
  cuda_on_host_switch(&own_.stack_pointer, resumer_.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own_.sanitizer_state, &resumer_stack_, &resumer_stack_size_);
#endif
}

void Fiber::run(Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->resumer_stack_, &self->resumer_stack_size_);
#endif
  self->entry_(self->argument_);
  self->suspend(true);
  __builtin_unreachable();
}

}  // namespace cuda_on_host
