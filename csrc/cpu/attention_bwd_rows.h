// What belongs to rows and heads rather than to tiles, by parallel passes over heads:
//   before the tiles  delta = rowsum(dO ∘ O) - dlse
//   after them        dsink_h = -Σ_i exp(sink_h - lse_i) delta_i,  dalibi_h = Σ_i its rows' shares
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/pack.h"

namespace atx::ATX_TARGET {

// delta of `queries` queries of one head from i0 on, as far as they exist.
template <class A>
void sum_rows(const AttentionBwdParams& p, int b, int h, int i0, int queries) {
  using L = Lanes<A>;
  const AttentionParams& f = p.fwd;
  const Sequence seq = sequence(f, b);
  const int i1 = seq.sq - i0 < queries ? seq.sq : i0 + queries;
  const int64_t rows = b * f.lse_batch + h * f.lse_head + seq.q_row;
  A* const delta = static_cast<A*>(p.delta) + rows;
  const A* const d_lse = p.d_lse ? static_cast<const A*>(p.d_lse) + rows : nullptr;
  with_dtype<A>(f.dtype, p.d_o, [&]<class T>(const T* d_o) {
    const T* const o = static_cast<const T*>(f.o) + row0(f.o_stride, b, h, seq.q_row);
    d_o += row0(p.d_o_stride, b, h, seq.q_row);
    for (int i = i0; i < i1; ++i) {
      const T *const x = o + i * f.o_stride.row, *const y = d_o + i * p.d_o_stride.row;
      typename L::Float sum = L::all(0);
      for (int d = 0; d < f.Dv; d += L::COUNT)
        sum += L::load(x + d, f.Dv - d) * L::load(y + d, f.Dv - d);
      delta[i] = L::sum(sum) - (d_lse ? d_lse[i] : 0);
    }
  });
}

// Σ_i f(i, n) over [0, rows), n of them from i on.
template <class A, class F>
A sum_over(int rows, F f) {
  using L = Lanes<A>;
  typename L::Float sum = L::all(0);
  for (int i = 0; i < rows; i += L::COUNT) sum += f(i, rows - i);
  return L::sum(sum);
}

template <class A>
void sum_head(const AttentionBwdParams& p, int b, int h) {
  using L = Lanes<A>;
  const AttentionParams& f = p.fwd;
  const Sequence seq = sequence(f, b);
  const int64_t rows = b * f.lse_batch + h * f.lse_head + seq.q_row;
  const int64_t head = int64_t(b) * f.Hq + h;
  if (p.d_alibi) {
    const A* const share = static_cast<const A*>(p.row_shares) + rows;
    static_cast<A*>(p.d_alibi)[head] =
        sum_over<A>(seq.sq, [&](int i, int n) { return L::load(share + i, n); });
  }
  if (p.d_sinks) {
    const A sink = static_cast<const A*>(f.sinks.data)[b * f.sinks.batch + h * f.sinks.head];
    const A* const lse = static_cast<const A*>(f.lse) + rows;
    const A* const delta = static_cast<const A*>(p.delta) + rows;
    static_cast<A*>(p.d_sinks)[head] = -sum_over<A>(seq.sq, [&](int i, int n) {
      const typename L::Float sum = L::load(lse + i, n);
      const typename L::Float weight = L::exp2((sink - sum) * A(LOG2_E));
      const typename L::Bool alive =
          L::less(L::positions(0), n) & typename L::Bool{sum != -A(INFINITY)};
      return L::select(alive, weight * L::load(delta + i, n), L::all(0));
    });
  }
}

}  // namespace atx::ATX_TARGET
