// dQ, dK and dV of a task (attention_bwd.h). Blocks of keys outside, tiles of rows inside; for each
// panel of a block P and dX are formed once (attention_bwd_differences.h) and used three times:
//   dVᵀ += dOᵀ (M ∘ P),  dKᵀ += Qᵀ dX   [Dv, keys] and [D, keys], depth: the rows of the tile
//   dQ  += dX K                         [rows, D], depth: the keys of the block
// dQ waits in memory, in the accumulation type, until the last block. What a row or a key gets, and
// in which order, does not depend on the task's extent. How numbers lie and who multiplies them is
// up to Products: attention_bwd_products.h, amx/attention_bwd_products.h. They
//   begin a task, clear_keys, load_keys of a block, load_rows of a tile
//   form P and dX of a panel, and add to dKᵀ and dVᵀ; finish_tile: dQ, from all panels of a block
//   store_keys of a block, store_queries of the task
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_differences.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

template <class Products>
class Gradients {
  using A = typename Products::Accumulator;
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int PANEL = BWD_PANEL<A>;

 public:
  using Accumulator = A;
  static constexpr int BLOCK_Q = Products::BLOCK_Q, BLOCK_KV = Products::BLOCK_KV;

  // Arrays for tasks of up to `queries` queries.
  void take(Scratch& scratch, const AttentionBwdParams& p, int queries) {
    const int rows = queries_of_tile(p.fwd, BLOCK_Q) * (p.fwd.Hq / p.fwd.Hkv);
    products_.take(scratch, p, queries, rows);
    shares_ = scratch.take<A>(rows * L::COUNT);
  }

  template <class Score>
  void compute(const BwdTask& t, const Score* scores) {
    products_.begin(t, scores);
    if (has_shares(t)) clear_shares(t);
    for (int j = t.j0; j < t.j1; j += BLOCK_KV)
      block(t, scores, j, t.j1 - j < BLOCK_KV ? t.j1 : j + BLOCK_KV);
    if (t.of_queries && t.p.d_q) products_.store_queries(t);
  }

 private:
  static bool has_shares(const BwdTask& t) { return t.of_queries && t.p.row_shares; }
  static A* row_share(const BwdTask& t, const Task& task, int row) {
    return static_cast<A*>(t.p.row_shares) + task.lse_offset(row);
  }
  static void clear_shares(const BwdTask& t) {
    for (int i = t.i0; i < t.i1; ++i)
      for (int g = 0; g < t.group; ++g) *row_share(t, t.rows(i, 1), g) = 0;
  }

  template <class Score>
  void block(const BwdTask& t, const Score* scores, int j0, int j1) {
    products_.clear_keys(t);
    const int queries = queries_of_tile(t.p.fwd, BLOCK_Q);
    if (t.i0 < t.i1 && next_key(scores, t.group, t.i0, t.i1, j0) < j1 &&
        j0 < end_before(scores, t.group, t.i0, t.i1, j1)) {
      panels_ = {j0, j1 - j0};
      products_.load_keys(t, j0, j1);
      for (int i = t.i0; i < t.i1; i += queries)
        tile(t, scores, t.rows(i, t.i1 - i < queries ? t.i1 - i : queries));
    }
    if (t.of_keys) products_.store_keys(t, j0, j1);
  }

  template <class Score>
  void tile(const BwdTask& t, const Score* scores, const Task& task) {
    const int first = panels_.first(scores, task.group, task.i0, task.queries);
    const int last = panels_.last(scores, task.group, task.i0, task.queries);
    if (first >= last) return;
    products_.load_rows(t, task, first, last);
    if (has_shares(t)) memset(shares_, 0, sizeof(A) * task.rows() * L::COUNT);
    for (int n = first; n < last; ++n) {
      int first_row, last_row;
      panels_.rows_of(task, scores, n, &first_row, &last_row);
      const int j = panels_.j0 + n * PANEL;
      const auto add_share = [&task, scores, j, shares = has_shares(t) ? shares_ : nullptr](
                                 int r, int v, Float dy) {
        if constexpr (!Score::LINEAR) {
          if (!shares) return;
          A* const sum = shares + r * L::COUNT;
          const Float share = scores->template share<L>(task.query(r), j + v * L::COUNT);
          L::store(sum, L::load(sum) + dy * share);
        }
      };
      products_.panel(t, scores, task, n, first_row, last_row, add_share);
    }
    products_.finish_tile(t, scores, task, first, last);
    if (has_shares(t))
      for (int r = 0; r < task.rows(); ++r)
        *row_share(t, task, r) -= L::sum(L::load(shares_ + r * L::COUNT));
  }

  Products products_;
  KeyPanels<A> panels_;  // of the block
  A* shares_;            // [rows of the tile, COUNT], Σ dY times its share
};

}  // namespace atx::ATX_TARGET
