// Gives every block of posix_memalign, from which PyTorch's CPU allocator takes its memory, pages of its own between
// pages that nobody may touch: who reads or writes beyond a tensor, or one that is gone, ends with a segmentation
// fault.
//
// To be loaded with LD_PRELOAD. Blocks end where their last page does, up to the alignment; with GUARD_PAGES=before
// they begin where their first page does.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* block);

enum { page = 4096 };
static const size_t arena_size = (size_t)1 << 40;  // of addresses, none of which is given out twice

static char* arena;
static uint32_t* pages;  // of the block whose first page this is
static atomic_size_t used = page;
static int before;

__attribute__((constructor)) static void reserve(void) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  const char* side = getenv("GUARD_PAGES");
  before = side && !strcmp(side, "before");
  pages = mmap(NULL, arena_size / page * sizeof *pages, PROT_READ | PROT_WRITE, flags, -1, 0);
  void* const addresses = mmap(NULL, arena_size, PROT_NONE, flags, -1, 0);
  if (pages == MAP_FAILED || addresses == MAP_FAILED) abort();
  arena = addresses;
}

int posix_memalign(void** block, size_t alignment, size_t size) {
  const size_t count = (size + page - 1) / page;
  size_t begin = 0;
  if (arena && size && alignment <= page) begin = atomic_fetch_add(&used, (count + 1) * page);
  if (!begin || begin + count * page >= arena_size) {
    *block = __libc_memalign(alignment, size);
    return *block ? 0 : ENOMEM;
  }
  if (mprotect(arena + begin, count * page, PROT_READ | PROT_WRITE)) return ENOMEM;
  pages[begin / page] = (uint32_t)count;
  *block = arena + begin + (before ? 0 : (count * page - size) / alignment * alignment);
  return 0;
}

void free(void* block) {
  const size_t place = (size_t)((char*)block - arena);
  if (!arena || (char*)block < arena || place >= arena_size) {
    __libc_free(block);
    return;
  }
  char* const begin = arena + place / page * page;
  mmap(begin, pages[place / page] * (size_t)page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
}
