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

// a, b  ->  the first and the second half of a0 b0 a1 b1 ...
template <class L>
ATX_HD void interleave(typename L::Float& a, typename L::Float& b) {
  typename L::Integer first, second;
  for (int l = 0; l < L::COUNT; ++l) {
    first[l] = l / 2 + (l % 2) * L::COUNT;
    second[l] = first[l] + L::COUNT / 2;
  }
  const typename L::Float low = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = low;
}
// x0, x1, x2, x3  ->  the quarters of x0[0] x1[0] x2[0] x3[0] x0[1] ...
template <class L>
ATX_HD void interleave(typename L::Float (&x)[4]) {
  interleave<L>(x[0], x[2]), interleave<L>(x[1], x[3]);  // halves of 0 2 0 2 ... and of 1 3 1 3 ...
  interleave<L>(x[0], x[1]), interleave<L>(x[2], x[3]);
}

}  // namespace atx::ATX_TARGET
