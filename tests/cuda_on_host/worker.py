"""The process that calls compiled kernels: reads calls from standard input, writes results to standard output.

Every pointer argument gets memory of its own that ends where the tensor ends, so that AddressSanitizer
reports the first byte beyond; without it, guards on both sides show what was written there, and hold
NaN for who reads there.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from pathlib import Path

import numpy as np

# the class that calls are pickled with, without its package's dependencies
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cuda_on_host.harness import Buffer

ALIGNMENT = 256
GUARD = 0xFF

libc = ctypes.CDLL(None)
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
guard_bytes = 0 if sanitized else 4096


class Memory:
    """A copy of a buffer at an address of the wanted alignment."""

    def __init__(self, buffer: Buffer) -> None:
        self.before = guard_bytes + buffer.offset
        self.size = buffer.memory.nbytes
        self.base = ctypes.c_void_p()
        total = self.before + self.size + guard_bytes
        if libc.posix_memalign(ctypes.byref(self.base), ALIGNMENT, total):
            raise MemoryError
        ctypes.memset(self.base, GUARD, total)
        self.address = self.base.value + self.before
        ctypes.memmove(self.address, buffer.memory.ctypes.data, self.size)
        self.dtype = buffer.memory.dtype

    def finish(self) -> tuple[np.ndarray, bool]:
        """The content, and whether the guards are as they were; frees the memory."""
        content = np.frombuffer(ctypes.string_at(self.address, self.size), self.dtype)
        around = ctypes.string_at(self.base.value, self.before) + ctypes.string_at(
            self.address + self.size, guard_bytes
        )
        libc.free(self.base)
        return content, around == bytes([GUARD]) * len(around)


def call(library: ctypes.CDLL, function: str, arguments: list) -> tuple[str | None, list[np.ndarray | None]]:
    """Error message and the buffers' contents after the call."""
    target = getattr(library, function)
    target.restype = ctypes.c_char_p
    memories = [Memory(argument) if isinstance(argument, Buffer) else None for argument in arguments]
    values = []
    for argument, memory in zip(arguments, memories, strict=True):
        if memory is not None:
            values.append(ctypes.c_void_p(memory.address))
        elif argument is None:
            values.append(ctypes.c_void_p(0))
        elif isinstance(argument, float):
            values.append(ctypes.c_double(argument))
        else:
            values.append(ctypes.c_int64(argument))
    message = target(*values)
    error = None if message is None else message.decode()
    contents: list[np.ndarray | None] = []
    for index, memory in enumerate(memories):
        content, intact = memory.finish() if memory is not None else (None, True)
        contents.append(content)
        if not intact and error is None:
            error = f"{function}: something was written outside the memory of argument {index}"
    return error, contents


def main() -> None:
    """Serve calls until standard input ends."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not end up between the results
    library = ctypes.CDLL(sys.argv[1])
    library.cuda_on_host_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    while True:
        try:
            function, arguments, order, seed, workers = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        library.cuda_on_host_configure(order, seed, workers)
        pickle.dump(call(library, function, arguments), results)
        results.flush()


if __name__ == "__main__":
    main()
