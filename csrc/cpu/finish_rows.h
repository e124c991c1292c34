// The end of a row: its log-sum-exp, and what its weighted values are to be multiplied with.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

// Ends rows [row, row + n), one per lane, whose weights are 2^(x - m), with sum l: adds the sink, a
// key without a value, writes the log-sum-exp and returns the factors. Nothing attended to: l = 0,
// a row of zeros.
template <class L, class A = typename L::Scalar>
typename L::Float finish_rows(const Task& task, int row, int n, typename L::Float m,
                              typename L::Float l) {
  using Float = typename L::Float;
  const AttentionParams& p = task.p;
  const Float none = L::all(-INFINITY);
  Float shrink = L::all(1);
  if (p.sinks.data) {
    Float sink = none;
    for (int r = 0; r < n; ++r)
      sink[r] =
          A(LOG2_E) * static_cast<const A*>(
                          p.sinks.data)[task.b * p.sinks.batch + task.head(row + r) * p.sinks.head];
    const Float top = sink <= m ? m : sink;
    shrink = m == top ? shrink : m == none ? L::all(0) : L::exp2(m - top);
    l = top == none ? l : l * shrink + L::exp2(sink - top);
    m = top;
  }
  if (p.lse) {
    const Float lse = l == 0 ? none : (m + L::log2(l)) * A(LN_2);
    for (int r = 0; r < n; ++r) static_cast<A*>(p.lse)[task.lse_offset(row + r)] = lse[r];
  }
  return l == 0 ? L::all(0) : shrink / l;
}

// Ends the rows of a task without keys.
template <class A>
void store_zeros(const Task& task) {
  using L = Lanes<A>;
  const AttentionParams& p = task.p;
  const int size = size_of(p.dtype);
  for (int row = 0; row < task.rows(); row += L::COUNT) {
    const int n = task.rows() - row < L::COUNT ? task.rows() - row : L::COUNT;
    finish_rows<L>(task, row, n, L::all(-INFINITY), L::all(0));
    for (int r = row; r < row + n; ++r)
      memset(static_cast<char*>(p.o) + task.row_offset(p.o_stride, r) * size, 0, p.Dv * size);
  }
}

}  // namespace atx::ATX_TARGET
