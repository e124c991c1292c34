// The products under a block mask as a soft-cap leaves them: s becomes what times the scale is
// c tanh(scale s / c), so that the policy stays linear and needs no second set of kernels.
#pragma once
#include "csrc/core/params.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

template <class A>
struct CappedProducts {
  using L = Lanes<A>;
  A inner, outer;  // outer tanh(inner s); 0: no soft-cap

  explicit CappedProducts(const AttentionParams& p)
      : inner(p.softcap == 0 ? 0 : A(p.scale / p.softcap)),
        outer(p.softcap == 0 ? 0 : A(p.softcap / p.scale)) {}
  // n: a multiple of COUNT, as the arrays of products have them. One function for all callers: the
  // build would be longer.
  [[gnu::noinline]] void cap(int n, A* s) const {
    if (outer == 0) return;
    for (int at = 0; at < n; at += L::COUNT)
      L::store(s + at, L::tanh(L::load(s + at) * inner) * outer);
  }
  // Of the logit by the product before, by the one after.
  ATX_HD typename L::Float slope(typename L::Float capped) const {
    const typename L::Float t = capped * inner;
    return 1 - t * t;
  }
};

}  // namespace atx::ATX_TARGET
