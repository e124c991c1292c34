// Exec::parallel_for over a lambda.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

// f(first, last) over a partition of [0, n).
template <class F>
void for_tasks(const Exec& exec, int64_t n, const F& f) {
  if (n == 0) return;
  exec.parallel_for(
      n,
      [](const void* f, int64_t first, int64_t last) { (*static_cast<const F*>(f))(first, last); },
      &f);
}

}  // namespace atx::ATX_TARGET
