// Turns faults and endless loops of a kernel into fail().
#pragma once
#include <signal.h>
#include <time.h>

#include "machine.h"

namespace atx::ATX_TARGET::simt {

// While it lives, this OS thread runs kernels: a fault inside one ends its block, and so does a
// block that runs for longer than the watchdog allows.
class FaultGuard {
 public:
  explicit FaultGuard(Block&);
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  stack_t old_stack_{};
  timer_t timer_{};
  bool watched_ = false;
};

}  // namespace atx::ATX_TARGET::simt
