// How much each of two partial results counts: what merge_states and its backward ask of a row.
#pragma once
#include <cmath>

#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

template <class A>
struct MergeWeights {
  A a, b, lse;  // a + b = 1; or both 0, where neither part has a key

  ATX_HD MergeWeights(A lse_a, A lse_b) {
    const A top = lse_a > lse_b ? lse_a : lse_b;
    const A origin = top == -A(INFINITY) ? A(0) : top;
    a = ::exp(lse_a - origin), b = ::exp(lse_b - origin);
    const A sum = a + b;
    lse = origin + ::log(sum);
    if (sum == 0) return;
    a /= sum, b /= sum;
  }
};

// Row r of a [B, H, S] tensor, or of a [B, H, S, D] one.
ATX_HD int64_t merge_row(const MergeStatesParams& p, const Strides& s, int64_t r) {
  return r / p.S / p.H * s.batch + r / p.S % p.H * s.head + r % p.S * s.row;
}

}  // namespace atx::ATX_TARGET
