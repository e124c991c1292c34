// The parts of attention_stats.cpp: a block of keys, a tile of rows, the logarithms of its weights,
// and what rows and columns keep of them. Keys are in the SIMD lanes (gemm.h with the sides
// exchanged): score policies then need no transposition, a sum over queries is vertical, and one
// over keys needs its lanes only at its end.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/attention_stats.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// Keys [first, end) as panels of columns, each [D, width]; the last is as narrow as its keys allow.
template <class A>
struct StatsKeys {
  using L = Lanes<A>;
  static constexpr int PANEL = PANEL_VECS * L::COUNT;

  A* columns;
  int first, end;

  void take(Scratch& scratch, const AttentionParams& p) {
    columns = scratch.take<A>(int64_t(STATS_BLOCK_KV) * p.D);
  }
  static int pad(int keys) { return (keys + L::COUNT - 1) / L::COUNT * L::COUNT; }
  // Of the panel that starts with key j.
  int width(int j) const {
    const int rest = pad(end - j);
    return rest < PANEL ? rest : PANEL;
  }
  const A* panel(int j, int D) const { return columns + int64_t(j - first) * D; }

  void load(const Task& task, int j0, int j1) {
    const AttentionParams& p = task.p;
    first = j0, end = j1;
    with_dtype<A>(p.dtype, p.k, [&]<class T>(const T* k) {
      for (int j = first; j < end; j += L::COUNT) {
        const int start = j - (j - first) % PANEL, n = end - j < L::COUNT ? end - j : L::COUNT;
        const T* rows[L::COUNT];
        for (int l = 0; l < n; ++l) rows[l] = k + task.key_offset(p.k_stride, j + l);
        pack_columns(rows, n, p.D, columns + int64_t(start - first) * p.D + (j - start),
                     width(start));
      }
    });
  }
};

template <class A>
struct StatsRows {
  A* q;         // [rows, D]
  A* log2_sum;  // [rows], lse in powers of two; -inf: the row attends to nothing

  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    q = scratch.take<A>(int64_t(rows) * p.D);
    log2_sum = scratch.take<A>(rows);
  }
  void load(const Task& task) const {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.q, [&]<class T>(const T* from) {
      for (int r = 0; r < task.rows(); ++r) {
        pack_rows(from + task.row_offset(p.q_stride, r), 0, 1, p.D, q + int64_t(r) * p.D);
        log2_sum[r] = A(LOG2_E) * static_cast<const A*>(p.lse)[task.lse_offset(r)];
      }
    });
  }
};

// s, the products of a tile's rows with `width` keys from j on, becomes log2 P: -inf where a row
// does not attend, even if the product or the row's lse is nan. FULL: every row keeps every key.
template <bool FULL, class A, class Score>
void log2_weights(const Task& task, const Score* scores, const A* log2_sum, int j, int end,
                  int width, A* s) {
  using L = Lanes<A>;
  using Float = typename L::Float;
  const A unit = log2_unit<A, Score>(task.p);
  const Float none = L::all(-INFINITY);
  for (int r = 0, i = task.i0, g = 0; r < task.rows(); ++r, s += width) {
    const bool dead = log2_sum[r] == -A(INFINITY);
    for (int lane = 0; lane < width; lane += L::COUNT) {
      const int n = end - j - lane;
      Float y = L::load(s + lane);
      if constexpr (!Score::LINEAR) y = scores[g].template score<L>(y, i, j + lane, n);
      Float x = y * unit - log2_sum[r];
      if constexpr (!FULL) {
        typename L::Bool kept = scores[g].template keep<L>(i, j + lane, n);
        if constexpr (!Score::LINEAR) kept = kept & typename L::Bool{y != -A(INFINITY)};
        x = L::select(kept, x, none);
      }
      L::store(s + lane, dead ? none : x);
    }
    if (++g == task.group) g = 0, ++i;
  }
}

// The running statistics of rows: a vector each, of what every lane has seen.
template <class A>
class RowStats {
  using L = Lanes<A>;
  using Float = typename L::Float;
  using Integer = typename L::Integer;

 public:
  void take(Scratch& scratch, int rows) {
    entropy_ = scratch.take<Float>(rows);
    top_ = scratch.take<Float>(rows);
    index_ = scratch.take<Integer>(rows);
  }
  void clear(int rows) {
    for (int r = 0; r < rows; ++r)
      entropy_[r] = L::all(0), top_[r] = L::all(-INFINITY), index_[r] = Integer{} - 1;
  }

  // x [rows, width]: log2 P of the rows from `first` on with the keys from j on.
  void add(int first, int rows, int j, int width, const A* x) {
    for (int r = first; r < first + rows; ++r, x += width) {
      Float entropy = entropy_[r], top = top_[r];
      Integer index = index_[r];
      for (int lane = 0; lane < width; lane += L::COUNT) {
        const Float log2_p = L::load(x + lane);
        // A weight of 0 has a logarithm that is a number, for 0 times inf is nan.
        const Float finite = L::larger(L::all(-Number<A>::BIAS), log2_p);
        entropy -= L::exp2(finite) * finite;
        const Integer better = log2_p > top;
        top = better ? log2_p : top;
        index = better ? L::positions(j + lane) : index;
      }
      entropy_[r] = entropy, top_[r] = top, index_[r] = index;
    }
  }

  void store(const AttentionStatsParams& p, const Task& task) const {
    for (int r = 0; r < task.rows(); ++r) {
      const int64_t at = task.lse_offset(r);
      const A lse = static_cast<const A*>(p.fwd.lse)[at];
      const A top = L::max(top_[r]);
      A entropy = L::sum(entropy_[r]) * A(LN_2), weight = L::exp2(L::all(top))[0];
      int index = -1;
      for (int l = 0; l < L::COUNT; ++l)
        if (top_[r][l] == top && (index < 0 || index_[r][l] < index)) index = int(index_[r][l]);
      // A nan in lse makes every weight a nan, and none of them the largest.
      if (lse != lse) entropy = weight = lse;
      if (p.entropy) static_cast<A*>(p.entropy)[at] = entropy;
      if (p.top_weight) static_cast<A*>(p.top_weight)[at] = weight;
      if (p.top_index) p.top_index[at] = index;
    }
  }

 private:
  Float *entropy_, *top_;  // Σ P log2 P, negated; max log2 P
  Integer* index_;         // the first key that has it; -1: none
};

// Sums over queries, of a block of keys, for each head of the group.
template <class A>
class ColumnSums {
  using L = Lanes<A>;
  using Float = typename L::Float;

 public:
  void take(Scratch& scratch, int group) {
    sums_ = scratch.take<A>(int64_t(group) * STATS_BLOCK_KV);
  }
  void clear(int group) { memset(sums_, 0, sizeof(A) * group * STATS_BLOCK_KV); }

  // x [task.rows(), width]: log2 P, with the keys from `first` of the block on. A tile's sum is
  // formed on its own and then added, for the error of a long sum.
  void add(const Task& task, int first, int width, const A* x) {
    for (int g = 0; g < task.group; ++g)
      for (int lane = 0; lane < width; lane += L::COUNT) {
        Float sum = L::all(0);
        for (int r = g; r < task.rows(); r += task.group)
          sum += L::exp2(L::load(x + r * width + lane));
        A* const at = sums_ + int64_t(g) * STATS_BLOCK_KV + first + lane;
        L::store(at, L::load(at) + sum);
      }
  }

  void store(const AttentionStatsParams& p, const Task& task, int j0, int j1) const {
    A* const to = static_cast<A*>(p.column_sum) + task.b * p.column_batch + task.seq.k_row + j0;
    for (int g = 0; g < task.group; ++g)
      memcpy(to + (task.hk * task.group + g) * p.column_head, sums_ + int64_t(g) * STATS_BLOCK_KV,
             sizeof(A) * (j1 - j0));
  }

 private:
  A* sums_;  // [group, STATS_BLOCK_KV]
};

}  // namespace atx::ATX_TARGET
