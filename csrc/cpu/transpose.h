// COUNT x COUNT transposition in registers: log2(COUNT) rounds that exchange the off-diagonal
// quarters of ever smaller squares, one two-operand shuffle per register and round.
#pragma once
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

// Lane l of the round's first (or second) result: from a where bit HALF of l is clear, else from b
// HALF lanes below (or: from a HALF lanes above, and from b).
template <class L, int HALF, bool SECOND>
ATX_HD typename L::Integer exchange_pattern() {
  typename L::Integer pattern;
  for (int l = 0; l < L::COUNT; ++l) {
    const bool from_b = (l & HALF) != 0;
    pattern[l] = SECOND ? (from_b ? L::COUNT + l : l + HALF) : (from_b ? L::COUNT + l - HALF : l);
  }
  return pattern;
}

template <class L, int HALF>
ATX_HD void exchange(typename L::Float (&x)[L::COUNT]) {
#pragma GCC unroll 16
  for (int r = 0; r < L::COUNT; ++r) {
    if (r & HALF) continue;
    const typename L::Float a = x[r], b = x[r + HALF];
    x[r] = __builtin_shuffle(a, b, (exchange_pattern<L, HALF, false>()));
    x[r + HALF] = __builtin_shuffle(a, b, (exchange_pattern<L, HALF, true>()));
  }
  if constexpr (HALF > 1) exchange<L, HALF / 2>(x);
}

// x[r] lane c  <->  x[c] lane r
template <class L>
ATX_HD void transpose(typename L::Float (&x)[L::COUNT]) {
  exchange<L, L::COUNT / 2>(x);
}

// Lane l of the result is the sum of x[l]'s lanes: the transposition's rounds, each halving the
// registers by adding.
template <class L, int HALF = L::COUNT / 2>
ATX_HD typename L::Float sum_each(typename L::Float (&x)[L::COUNT]) {
#pragma GCC unroll 16
  for (int r = 0; r < HALF; ++r)
    x[r] = __builtin_shuffle(x[r], x[r + HALF], (exchange_pattern<L, HALF, false>())) +
           __builtin_shuffle(x[r], x[r + HALF], (exchange_pattern<L, HALF, true>()));
  if constexpr (HALF > 1) return sum_each<L, HALF / 2>(x);
  return x[0];
}

}  // namespace atx::ATX_TARGET
