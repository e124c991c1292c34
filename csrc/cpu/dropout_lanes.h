// Dropout's factors (core/dropout.h) in the two ways in which the kernels lay out weights.
#pragma once
#include "csrc/core/dropout.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// Keys that share a call of the hash.
constexpr int DROPOUT_KEYS = 4;

// Keys in the lanes: to [rows, WIDTH] = the factors of rows [first, last) and of keys [j, j +
// WIDTH), j a multiple of DROPOUT_KEYS. Writes one row more if a vector of calls serves two.
template <class A, int WIDTH>
void row_factors(const Task& task, int j, int first, int last, A* to) {
  using L = Lanes<A>;
  using Word = typename L::Word;
  constexpr int CALLS = WIDTH / DROPOUT_KEYS;  // of a row
  constexpr int ROWS = CALLS < L::COUNT ? L::COUNT / CALLS : 1;
  static_assert(WIDTH % DROPOUT_KEYS == 0 && (CALLS % L::COUNT == 0 || L::COUNT % CALLS == 0));
  const Dropout<A> dropout(task.p, task.b);
  for (int r = first; r < last; r += ROWS)
    for (int call = 0; call < CALLS; call += L::COUNT) {
      Word block, i, h;
      for (int l = 0; l < L::COUNT; ++l) {
        block[l] = j / DROPOUT_KEYS + call + l % CALLS;
        i[l] = task.query(r + l / CALLS), h[l] = task.head(r + l / CALLS);
      }
      typename L::Float factor[DROPOUT_KEYS];
      dropout.template factors<L>(block, i, h, factor);
      interleave<L>(factor);
      for (int n = 0; n < DROPOUT_KEYS; ++n, to += L::COUNT) L::store(to, factor[n]);
    }
}

}  // namespace atx::ATX_TARGET
