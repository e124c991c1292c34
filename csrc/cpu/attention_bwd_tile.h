// The products S = Q Kᵀ and dO Vᵀ of a tile in the accumulation type, and what becomes of them
// (attention_bwd_differences.h): rows of a few queries against a block of keys, in panels of keys
// (gemm.h, with the sides exchanged). Nothing is transposed but k and v, once per block.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_differences.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// Columns of a panel of a block of `keys`: the last is as narrow as its keys allow.
template <class A>
int panel_width(int keys, int panel) {
  constexpr int COUNT = Lanes<A>::COUNT, PANEL = BWD_PANEL<A>;
  const int rest = (keys - panel * PANEL + COUNT - 1) / COUNT * COUNT;
  return rest < PANEL ? rest : PANEL;
}

// A block of keys, as rows and as panels of columns.
template <class A>
struct KeyBlock {
  using L = Lanes<A>;
  static constexpr int PANEL = BWD_PANEL<A>;
  static constexpr int PANELS = (BWD_BLOCK_KV + PANEL - 1) / PANEL;

  A* k;          // [keys, D]
  A *k_t, *v_t;  // panels, each [D, width] and [Dv, width]
  int j0, keys;
  bool finite;  // every number of k (0 times another one is not 0)

  void take(Scratch& scratch, const AttentionParams& p) {
    // Vectors of the last key may run over the end of its row.
    k = scratch.take<A>(int64_t(BWD_BLOCK_KV) * p.D + PANEL);
    k_t = scratch.take<A>(int64_t(BWD_BLOCK_KV) * p.D);
    v_t = scratch.take<A>(int64_t(BWD_BLOCK_KV) * p.Dv);
  }

  KeyPanels<A> panels() const { return {j0, keys}; }
  int width(int panel) const { return panel_width<A>(keys, panel); }

  void load(const Task& task, int first, int last) {
    const AttentionParams& p = task.p;
    j0 = first, keys = last - first;
    with_dtype<A>(p.dtype, p.k, [&]<class T>(const T* from) {
      from += task.key_offset(p.k_stride, j0);
      finite = pack_rows(from, p.k_stride.row, keys, p.D, k);
      pack_panels(from, p.k_stride.row, p.D, k_t);
    });
    with_dtype<A>(p.dtype, p.v, [&]<class T>(const T* from) {
      pack_panels(from + task.key_offset(p.v_stride, j0), p.v_stride.row, p.Dv, v_t);
    });
  }

 private:
  template <class T>
  void pack_panels(const T* from, int64_t stride, int cols, A* to) const {
    for (int j = 0; j < keys; j += L::COUNT) {
      const int panel = j / PANEL, n = keys - j < L::COUNT ? keys - j : L::COUNT;
      const T* rows[L::COUNT];
      for (int l = 0; l < n; ++l) rows[l] = from + (j + l) * stride;
      pack_columns(rows, n, cols, to + int64_t(panel) * PANEL * cols + j % PANEL, width(panel));
    }
  }
};

// The rows of a tile, with all that the backward knows of them.
template <class A>
struct RowTile {
  using L = Lanes<A>;

  const A *q, *d_o;  // [rows, D], [rows, Dv]; zeros where a row attends to nothing
  RowStatistics<A> statistics;
  bool q_finite, d_o_finite;

  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    q_copy_ = scratch.take<A>(int64_t(rows) * p.D);
    d_o_copy_ = scratch.take<A>(int64_t(rows) * p.Dv);
    statistics.take(scratch, rows);
  }

  void load(const AttentionBwdParams& p, const Task& task) {
    statistics.load(p, task);
    bool all_alive = true;
    for (int r = 0; r < task.rows(); ++r) all_alive &= statistics.alive[r];
    q = load_rows(task, p.fwd.q, p.fwd.q_stride, p.fwd.D, all_alive, q_copy_, &q_finite);
    d_o = load_rows(task, p.d_o, p.d_o_stride, p.fwd.Dv, all_alive, d_o_copy_, &d_o_finite);
  }

 private:
  // Rows that lie as they are wanted are used where they lie: copying a tile for every block was
  // 2.5 % of forward and backward (f32, S 2048, D 64 on AVX2).
  const A* load_rows(const Task& task, const void* tensor, const Strides& stride, int cols,
                     bool all_alive, A* copy, bool* finite) {
    if (size_of(task.p.dtype) == sizeof(A) && task.group == 1 && stride.row == cols && all_alive) {
      const A* const rows = static_cast<const A*>(tensor) + task.row_offset(stride, 0);
      *finite = all_finite(rows, int64_t(task.rows()) * cols);
      return rows;
    }
    *finite = copy_rows(task, tensor, stride, cols, copy);
    return copy;
  }
  bool copy_rows(const Task& task, const void* tensor, const Strides& stride, int cols, A* to) {
    typename L::Float zero = {};
    with_dtype<A>(task.p.dtype, tensor, [&]<class T>(const T* from) {
      for (int r = 0; r < task.rows(); ++r, to += cols) {
        if (statistics.alive[r])
          zero += pack_row(from + task.row_offset(stride, r), cols, to);
        else
          memset(to, 0, sizeof(A) * cols);
      }
    });
    return L::sum(zero) == 0;
  }

  A *q_copy_, *d_o_copy_;
};

// The products of a tile and what becomes of them, panel by panel.
template <class A>
class Differences {
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int PANEL = KeyBlock<A>::PANEL;

 public:
  KeyBlock<A> keys;
  RowTile<A> rows;

  void take(Scratch& scratch, const AttentionParams& p, int n_rows) {
    keys.take(scratch, p);
    rows.take(scratch, p, n_rows);
    if (p.dropout > 0) kept_.take(scratch, n_rows);
  }

  // The rows of a tile, which see the panels [first, last) of the block.
  void load_rows(const AttentionBwdParams& p, const Task& task, int first, int last) {
    rows.load(p, task);
    if (p.fwd.dropout > 0)
      kept_.draw(task, 0, task.rows(), keys.j0, keys.j0 + first * PANEL, keys.j0 + last * PANEL);
  }

  // Rows [first, last) of s and dp, [rows, VECS vectors], become the products; then calls
  // emit(row, vector, M ∘ P, dY, dX) of every vector of keys. dX lacks the scale if the policy is
  // linear.
  template <int VECS, class Score, class Emit>
  void compute(const Task& task, const Score* scores, int panel, int first, int last, A* s, A* dp,
               Emit emit) {
    const AttentionParams& p = task.p;
    constexpr int WIDTH = VECS * L::COUNT;
    const int run_k = sum_run(p.dtype, p.D), run_v = sum_run(p.dtype, p.Dv),
              j = keys.j0 + panel * PANEL;
    // Inline, for g++ takes a function that only prefetches for one that does nothing.
    const auto fetch = [&](int r, int n) __attribute__((always_inline)) {
      fetch_mask(task, scores, first + r, n, j, WIDTH);
    };
    Gemm<A, VECS>::scores(last - first, p.D, run_k, rows.q + int64_t(first) * p.D,
                          keys.k_t + int64_t(panel) * PANEL * p.D, s + first * WIDTH, fetch);
    Gemm<A, VECS>::scores(last - first, p.Dv, run_v, rows.d_o + int64_t(first) * p.Dv,
                          keys.v_t + int64_t(panel) * PANEL * p.Dv, dp + first * WIDTH);
    const Cells<A> cells = {task, rows.statistics, first, last, j, keys.j0 + keys.keys, keys.j0};
    differences<A, VECS, Exponential<A>>(cells, scores, s + first * WIDTH, dp + first * WIDTH,
                                         kept_, emit);
  }

 private:
  KeptBits<A, BWD_BLOCK_KV / DROPOUT_BLOCK> kept_;  // by dropout
};

}  // namespace atx::ATX_TARGET
