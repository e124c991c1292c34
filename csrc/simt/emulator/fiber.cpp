// Context switches: hand-written for x86-64 and aarch64 (3 ns), ucontext elsewhere (it saves the
// signal mask by a system call, 100 times slower). Only what the calling convention makes the
// callee save is kept.
#include "fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(ATX_SIMT_UCONTEXT)
asm(R"(
.text
.p2align 4
.globl atx_simt_switch
.hidden atx_simt_switch
.type atx_simt_switch, @function
atx_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size atx_simt_switch, .-atx_simt_switch
)");
#define ATX_SIMT_FRAME 1
#elif defined(__aarch64__) && !defined(ATX_SIMT_UCONTEXT)
asm(R"(
.text
.p2align 4
.globl atx_simt_switch
.hidden atx_simt_switch
.type atx_simt_switch, %function
atx_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size atx_simt_switch, .-atx_simt_switch
)");
#define ATX_SIMT_FRAME 1
#else
#include <ucontext.h>
#define ATX_SIMT_FRAME 0
#endif

#if ATX_SIMT_FRAME
extern "C" __attribute__((visibility("hidden"))) void atx_simt_switch(void** save, void* load);
#endif

namespace atx::ATX_TARGET::simt {
namespace {

char* first_frame(const Context& c, size_t offset) {
  return reinterpret_cast<char*>(
      reinterpret_cast<uintptr_t>(c.stack + c.stack_bytes - 64 - offset) & ~uintptr_t(63));
}

}  // namespace

void begin_at(Context& to, void (*entry)(), size_t offset) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(to.stack, to.stack_bytes);
  to.sanitizer = nullptr;
#endif
  char* top = first_frame(to, offset);
#if !ATX_SIMT_FRAME
  if (!to.stack_pointer) to.stack_pointer = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(to.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = to.stack;
  context->uc_stack.ss_size = size_t(top - to.stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#elif defined(__x86_64__)
  // Popped by the switch: six registers, the entry; then a null return address, so that entry()
  // finds rsp % 16 == 8.
  void** frame = reinterpret_cast<void**>(top) - 8;
  memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  to.stack_pointer = frame;
#else
  void** frame = reinterpret_cast<void**>(top - 160);
  memset(frame, 0, 160);
  frame[11] = reinterpret_cast<void*>(entry);  // x30, the link register
  to.stack_pointer = frame;
#endif
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#endif
#if ATX_SIMT_FRAME
  atx_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  if (!from.stack_pointer) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void arrived_on_fresh_stack() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace atx::ATX_TARGET::simt
