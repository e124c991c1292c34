// Fibers: stacks of their own, switched by hand. One fiber runs one CUDA thread; `main` is the OS
// thread's own stack.
#pragma once
#include <cstddef>

namespace atx::ATX_TARGET::simt {

// Where a stack was left. The stack grows down from `stack + stack_bytes`; the page below `stack`
// faults.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // AddressSanitizer's fake stack while the context is left
};

// Makes `to`, which must own a stack, begin at entry() when it is next switched to. `offset` moves
// its first frame down: stacks of equal size would otherwise share cache sets.
void begin_at(Context& to, void (*entry)(), size_t offset);
void switch_context(Context& from, Context& to);
// To be called first on a fresh stack.
void arrived_on_fresh_stack();

}  // namespace atx::ATX_TARGET::simt
