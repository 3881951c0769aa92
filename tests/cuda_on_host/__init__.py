"""The project's CUDA kernels compiled as plain C++ and run on a CPU.

A CUDA thread is a fiber; blocks are spread over threads of the operating system. Barriers, warp-wide
instructions, shared memory, atomics, asynchronous copies and matrix instructions are emulated, the
last with the tensor cores' rounding. The sources are those that nvcc compiles: only declarations of
shared memory are rewritten, and ``csrc/common/ptx.cuh``, which holds all inline assembly, is replaced.

What it finds, and how:

- races: threads and blocks run forward, in reverse or in random order, each thread as far as it can,
  so a missing barrier changes the result in one of the orders;
- divergence and deadlock: threads at different barriers or warp-wide instructions, or at one that
  others never reach, are an error that says where each of them stands;
- uninitialised memory: shared memory and results begin as NaN, local variables as a pattern;
- accesses out of bounds, misaligned vector accesses, integer overflow: AddressSanitizer and
  UndefinedBehaviorSanitizer, under which every buffer ends where its tensor ends.
"""

from .harness import Buffer, HostKernels, KernelFault, Order

__all__ = ["Buffer", "HostKernels", "KernelFault", "Order"]
