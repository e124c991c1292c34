// The block's shared memory and its 32-bit addresses.
#include "shared_memory.h"

#include <cstring>

namespace atx::ATX_TARGET::simt {

void* shared_memory(size_t bytes, size_t alignment, Site site) {
  const Inside inside;
  const Block& b = *block;
  if (bytes > b.shared_bytes)
    fail("shared at " + where(site) + " needs " + std::to_string(bytes) +
         " bytes, but the launch asked for " + std::to_string(b.shared_bytes));
  if (reinterpret_cast<uintptr_t>(b.shared) % alignment)
    fail("shared at " + where(site) + ": alignment " + std::to_string(alignment) +
         " is more than a GPU guarantees");
  return b.shared;
}

uint32_t smem_address(const void* pointer, Site site) {
  const Block& b = *block;
  const ptrdiff_t offset = static_cast<const char*>(pointer) - b.shared;
  if (__builtin_expect(offset < 0 || size_t(offset) > b.shared_bytes, 0)) {
    const Inside inside;
    fail("smem_address at " + where(site) + ": the pointer is not in shared memory");
  }
  return SHARED_ORIGIN + uint32_t(offset);
}

char* shared_pointer(uint32_t address, unsigned bytes, const char* what, Site site) {
  const Block& b = *block;
  const int64_t offset = int64_t(address) - SHARED_ORIGIN;
  if (__builtin_expect(offset < 0 || size_t(offset) + bytes > b.shared_bytes, 0))
    fail(std::string(what) + " at " + where(site) + " by " + name(*thread) + ": out of bounds, " +
         std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
         std::to_string(b.shared_bytes) + " bytes of shared memory");
  if (__builtin_expect(offset % bytes != 0, 0))
    fail(std::string(what) + " at " + where(site) + " by " + name(*thread) +
         ": misaligned shared address, offset " + std::to_string(offset) +
         " is not a multiple of " + std::to_string(bytes));
  return b.shared + offset;
}

void load_words(uint32_t* r, uint32_t smem, Site site) {
  const Inside inside;
  const char* const from = shared_pointer(smem, 16, "load_words", site);
  if (analysis) analysis->access(from, 16, Analysis::READ, nullptr, &site);
  memcpy(r, from, 16);
}

}  // namespace atx::ATX_TARGET::simt
