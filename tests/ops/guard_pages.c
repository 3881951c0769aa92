// Gives every block of posix_memalign, from which PyTorch's CPU allocator takes its memory, pages of its own between
// pages that nobody may touch: who reads or writes beyond a tensor, or one that is gone, ends with a segmentation
// fault. What lies between a tensor's end and its alignment, less than 64 bytes, goes unnoticed.
//
// To be loaded with LD_PRELOAD. Blocks end where their last page does, up to the alignment; with GUARD_PAGES=before
// they begin where their first page does. They are no blocks of the C library: realloc must not meet them.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* block);

static const size_t arena_size = (size_t)1 << 40;  // of addresses, none of which is given out twice

static char* arena;
static uint32_t* pages;  // of the block whose first page this is
static atomic_size_t used;
static size_t page;
static int before;

static void* reserve(size_t size, int protection, void* at) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* const addresses = mmap(at, size, protection, flags, -1, 0);
  if (addresses == MAP_FAILED) abort();
  return addresses;
}

__attribute__((constructor)) static void begin(void) {
  const char* side = getenv("GUARD_PAGES");
  before = side && !strcmp(side, "before");
  page = (size_t)sysconf(_SC_PAGESIZE);
  used = page;
  pages = reserve(arena_size / page * sizeof *pages, PROT_READ | PROT_WRITE, NULL);
  arena = reserve(arena_size, PROT_NONE, NULL);
}

int posix_memalign(void** block, size_t alignment, size_t size) {
  if (!arena || !size || alignment > page) {
    *block = __libc_memalign(alignment, size);
    return *block ? 0 : ENOMEM;
  }
  if (size >= arena_size / 2) return ENOMEM;
  const size_t count = (size + page - 1) / page;
  const size_t first = atomic_fetch_add(&used, (count + 1) * page);
  if (first + count * page >= arena_size) abort();  // rather than guard nothing from here on
  if (mprotect(arena + first, count * page, PROT_READ | PROT_WRITE)) return ENOMEM;
  pages[first / page] = (uint32_t)count;
  *block = arena + first + (before ? 0 : (count * page - size) / alignment * alignment);
  return 0;
}

void free(void* block) {
  const uintptr_t place = (uintptr_t)block - (uintptr_t)arena;
  if (!arena || (uintptr_t)block < (uintptr_t)arena || place >= arena_size) {
    __libc_free(block);
    return;
  }
  const size_t count = pages[place / page];
  if (!count) abort();  // freed before
  pages[place / page] = 0;
  reserve(count * page, PROT_NONE, arena + place / page * page);
}
