// What the compiler calls before every load and store of a kernel built with -fsanitize=thread.
// ThreadSanitizer's own library is not linked: these definitions are.
#include "analysis.h"

namespace atx::ATX_TARGET::simt {
namespace {

inline __attribute__((always_inline)) void observe(const void* pointer, size_t bytes,
                                                   Analysis::Kind kind, const void* code) {
  if (!thread || reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(block->stacks) <
                     block->stacks_bytes)
    return;
  const Inside inside;
  analyzer().access(pointer, unsigned(bytes), kind, code, nullptr);
}

}  // namespace
}  // namespace atx::ATX_TARGET::simt

using atx::ATX_TARGET::simt::Analysis;
using atx::ATX_TARGET::simt::observe;

#define ATX_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define ATX_HOOK_SIZE(bytes)                                         \
  ATX_HOOK __tsan_read##bytes(void* p) {                             \
    observe(p, bytes, Analysis::READ, __builtin_return_address(0));  \
  }                                                                  \
  ATX_HOOK __tsan_write##bytes(void* p) {                            \
    observe(p, bytes, Analysis::WRITE, __builtin_return_address(0)); \
  }                                                                  \
  ATX_HOOK __tsan_volatile_read##bytes(void* p) {                    \
    observe(p, bytes, Analysis::READ, __builtin_return_address(0));  \
  }                                                                  \
  ATX_HOOK __tsan_volatile_write##bytes(void* p) {                   \
    observe(p, bytes, Analysis::WRITE, __builtin_return_address(0)); \
  }                                                                  \
  ATX_HOOK __tsan_unaligned_read##bytes(void* p) {                   \
    observe(p, bytes, Analysis::READ, __builtin_return_address(0));  \
  }                                                                  \
  ATX_HOOK __tsan_unaligned_write##bytes(void* p) {                  \
    observe(p, bytes, Analysis::WRITE, __builtin_return_address(0)); \
  }

ATX_HOOK_SIZE(1)
ATX_HOOK_SIZE(2)
ATX_HOOK_SIZE(4)
ATX_HOOK_SIZE(8)
ATX_HOOK_SIZE(16)

ATX_HOOK __tsan_read_range(void* p, size_t bytes) {
  observe(p, bytes, Analysis::READ, __builtin_return_address(0));
}
ATX_HOOK __tsan_write_range(void* p, size_t bytes) {
  observe(p, bytes, Analysis::WRITE, __builtin_return_address(0));
}
ATX_HOOK __tsan_init() {}
ATX_HOOK __tsan_func_entry(void*) {}
ATX_HOOK __tsan_func_exit() {}
ATX_HOOK __tsan_vptr_read(void**) {}
ATX_HOOK __tsan_vptr_update(void**, void*) {}
// The guard of a static variable inside a function; nothing else in a kernel file is atomic.
extern "C" __attribute__((visibility("hidden"))) uint8_t
__tsan_atomic8_load(const volatile uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
