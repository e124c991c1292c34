// dmask = dY, summed over the dimensions that the mask has not; attention_bwd_cells.h has the cases
// that need no pass of their own. A task owns the cells of a tile of rows and a block of keys: it
// recomputes dY of every tile that they serve, in a fixed order, adds them up place by place, at
// the end folds the places of each cell, and writes it once.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_tile.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

template <class A>
class MaskGradient {
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int PANEL = KeyBlock<A>::PANEL;

 public:
  // How many tasks there are, and what one of them sums over: from ... to of each dimension.
  struct Range {
    int from, to;
  };
  static int64_t tasks(const AttentionBwdParams& p) {
    const AttentionParams& f = p.fwd;
    return int64_t(p.d_mask_batch ? f.B : 1) * (p.d_mask_head ? f.Hkv : 1) *
           (p.d_mask_row ? tiles(f) : 1) * (p.d_mask_col ? blocks(f) : 1);
  }

  void take(Scratch& scratch, const AttentionBwdParams& p) {
    group_ = p.fwd.Hq / p.fwd.Hkv;
    const int rows = queries_of_tile(p.fwd) * group_;
    differences_.take(scratch, p.fwd, rows);
    scores_ = scratch.take<General<A>>(group_);
    s_ = scratch.take<A>(int64_t(rows) * PANEL);
    dp_ = scratch.take<A>(int64_t(rows) * PANEL);
    sum_ = scratch.take<A>(int64_t(rows) * BWD_BLOCK_KV);
  }

  void compute(const AttentionBwdParams& p, int64_t task) {
    const AttentionParams& f = p.fwd;
    const auto range = [&](int64_t stride, int n) {
      if (stride == 0) return Range{0, n};
      const int at = int(task % n);
      task /= n;
      return Range{at, at + 1};
    };
    const Range block = range(p.d_mask_col, blocks(f)), tile = range(p.d_mask_row, tiles(f));
    const Range head = range(p.d_mask_head, f.Hkv), batch = range(p.d_mask_batch, f.B);
    memset(sum_, 0, sizeof(A) * queries_of_tile(f) * group_ * BWD_BLOCK_KV);
    for (int b = batch.from; b < batch.to; ++b)
      for (int hk = head.from; hk < head.to; ++hk)
        for (int n = block.from; n < block.to; ++n) add_block(p, b, hk, n, tile);
    fold(p);
    store(p, batch.from, head.from, tile.from, block.from);
  }

 private:
  static int tiles(const AttentionParams& f) {
    return (f.Sq + queries_of_tile(f) - 1) / queries_of_tile(f);
  }
  static int blocks(const AttentionParams& f) { return (f.Sk + BWD_BLOCK_KV - 1) / BWD_BLOCK_KV; }

  void add_block(const AttentionBwdParams& p, int b, int hk, int block, Range tiles) {
    const AttentionParams& f = p.fwd;
    const Sequence seq = sequence(f, b);
    for (int g = 0; g < group_; ++g) scores_[g] = General<A>(f, seq, b, hk * group_ + g);
    const int j0 = block * BWD_BLOCK_KV, queries = queries_of_tile(f);
    const int j1 = f.Sk - j0 < BWD_BLOCK_KV ? f.Sk : j0 + BWD_BLOCK_KV;
    differences_.keys.load({f, seq, b, hk, group_, 0, 0}, j0, j1);
    for (int t = tiles.from; t < tiles.to; ++t) {
      const int i = t * queries, rest = f.Sq - i;
      const Task task = {f, seq, b, hk, group_, i, rest < queries ? rest : queries};
      const int first = differences_.keys.panels().first(scores_, 1, i, task.queries);
      const int last = differences_.keys.panels().last(scores_, 1, i, task.queries);
      if (first >= last) continue;
      differences_.load_rows(p, task, first, last);
      for (int n = first; n < last; ++n) add_panel<PANEL_VECS>(task, n);
    }
  }
  template <int VECS>
  void add_panel(const Task& task, int n) {
    if constexpr (VECS > 1)
      if (differences_.keys.width(n) < VECS * L::COUNT) return add_panel<VECS - 1>(task, n);
    int first, last;
    differences_.keys.panels().rows_of(task, scores_, n, &first, &last);
    if (first >= last) return;
    differences_.template compute<VECS>(
        task, scores_, n, first, last, s_, dp_, [&](int r, int v, Float, Float dy, Float) {
          A* const at = sum_ + r * BWD_BLOCK_KV + n * PANEL + v * L::COUNT;
          L::store(at, L::load(at) + dy);
        });
  }

  // Sums over heads of the group, rows and keys that share a cell, into the first of them.
  void fold(const AttentionBwdParams& p) {
    const int queries = queries_of_tile(p.fwd);
    if (p.d_mask_head == 0)
      for (int i = 0; i < queries; ++i)
        for (int g = 1; g < group_; ++g) add_row(i * group_ + g, i * group_);
    if (p.d_mask_row == 0)
      for (int i = 1; i < queries; ++i)
        for (int g = 0; g < group_; ++g) add_row(i * group_ + g, g);
    if (p.d_mask_col == 0)
      for (int r = 0; r < queries * group_; ++r) {
        Float sum = L::all(0);
        A* const row = sum_ + r * BWD_BLOCK_KV;
        for (int j = 0; j < BWD_BLOCK_KV; j += L::COUNT) sum += L::load(row + j);
        row[0] = L::sum(sum);
      }
  }
  void add_row(int from, int to) {
    for (int j = 0; j < BWD_BLOCK_KV; j += L::COUNT) {
      A* const at = sum_ + to * BWD_BLOCK_KV + j;
      L::store(at, L::load(at) + L::load(sum_ + from * BWD_BLOCK_KV + j));
    }
  }

  void store(const AttentionBwdParams& p, int b, int hk, int tile, int block) const {
    switch (p.d_mask_dtype) {
      case DType::f64:
        return store(p, b, hk, tile, block, static_cast<double*>(p.d_mask));
      case DType::f32:
        return store(p, b, hk, tile, block, static_cast<float*>(p.d_mask));
      case DType::f16:
        return store(p, b, hk, tile, block, static_cast<f16*>(p.d_mask));
      default:
        return store(p, b, hk, tile, block, static_cast<bf16*>(p.d_mask));
    }
  }
  template <class T>
  void store(const AttentionBwdParams& p, int b, int hk, int tile, int block, T* d_mask) const {
    const AttentionParams& f = p.fwd;
    const int i0 = tile * queries_of_tile(f), j0 = block * BWD_BLOCK_KV;
    const int queries = cells(p.d_mask_row, i0, f.Sq, queries_of_tile(f));
    const int keys = cells(p.d_mask_col, j0, f.Sk, BWD_BLOCK_KV);
    const int heads = p.d_mask_head ? group_ : 1;
    for (int i = 0; i < queries; ++i)
      for (int g = 0; g < heads; ++g) {
        const A* const from = sum_ + (i * group_ + g) * BWD_BLOCK_KV;
        T* const to = d_mask + b * p.d_mask_batch + int64_t(hk * group_ + g) * p.d_mask_head +
                      int64_t(i0 + i) * p.d_mask_row + j0 * p.d_mask_col;
        for (int j = 0; j < keys; ++j) to[j * p.d_mask_col] = rounded<T>(from[j]);
      }
  }
  // Of a dimension of the mask, from `at` on: at most `most`, and one if it is summed over.
  static int cells(int64_t stride, int at, int size, int most) {
    if (stride == 0) return 1;
    return size - at < most ? size - at : most;
  }
  template <class T>
  static ATX_HD T rounded(A x) {
    if constexpr (sizeof(T) == sizeof(double))
      return x;
    else
      return from_float<T>(float(x));
  }

  int group_;
  Differences<A> differences_;
  General<A>* scores_;
  A *s_, *dp_;  // of a panel: [rows of the tile, PANEL]
  A* sum_;      // [rows of the tile, BWD_BLOCK_KV]
};

}  // namespace atx::ATX_TARGET
