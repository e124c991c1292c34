// dmask = dY of a mask that has every query and key: the tasks that form dQ write it as they go,
// instead of recomputing dY as MaskGradient does. Where batch entries or heads share a cell, one
// task has all of them, one after another, and the cells themselves are the running sums.
// Forward and backward are seven products of S x S x D here, six in torch, which keeps the weights
// instead of recomputing them. At the rate of bare FMAs (AVX2, 112 Gflop/s) seven take 268 ms at D
// 64 and 537 ms at D 128 (B1 H8 S2048, f32, mask of every head); torch, 695 and 955 ms, is at most
// 2.6 and 1.8 times as slow as any kernel that recomputes. Ours: 419 and 705 ms, least of 9 runs.
#pragma once
#include "csrc/cpu/attention_bwd_tile.h"

namespace atx::ATX_TARGET {

template <class A>
class MaskCells {
  using L = Lanes<A>;

 public:
  static bool share_batch(const AttentionBwdParams& p) {
    return p.d_mask_batch == 0 && p.fwd.B > 1;
  }
  static bool share_heads(const AttentionBwdParams& p) {
    return p.d_mask_head == 0 && p.fwd.Hq > 1;
  }
  // Sums are not formed in a narrower type than the accumulation's. Without a head there is no task
  // that would write the zeros of a shared mask.
  static bool serve(const AttentionBwdParams& p) {
    if (p.fwd.B == 0 || p.fwd.Hq == 0) return false;
    const bool exact = p.d_mask_dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32);
    return p.d_mask && p.d_mask_row != 0 && p.d_mask_col == 1 &&
           (exact || !(share_batch(p) || share_heads(p)));
  }

  void take(Scratch& scratch, int rows) { rows_ = scratch.take<Row>(rows); }

  // Zeros in the rows of queries [i0, i1), for the keys that the tiles leave out.
  static void clear(const AttentionBwdParams& p, const Task& task) {
    for (int i = task.i0; i < task.i0 + task.queries; ++i)
      for (int g = 0; g < task.group; ++g) {
        const Row row = find(p, task, i, g);
        if (!row.sum) memset(row.cells, 0, size_of(p.d_mask_dtype) * p.fwd.Sk);
      }
  }

  void load(const AttentionBwdParams& p, const Task& task) {
    for (int r = 0, i = task.i0; r < task.rows(); ++i)
      for (int g = 0; g < task.group; ++g, ++r) rows_[r] = find(p, task, i, g);
    cell_ = size_of(p.d_mask_dtype);
  }
  // Ahead of add(), as fetch_mask does: cells of rows from `row` on, of keys [j, j + keys).
  ATX_HD void fetch(int row, int rows, int j, int keys) const {
    for (int r = row; r < row + rows; ++r)
      for (int n = 0; n < keys * cell_; n += CACHE_LINE)
        __builtin_prefetch(rows_[r].cells + int64_t(j) * cell_ + n, 1, 2);
  }
  // Adds the rows of a tile: panels [first, last) of dy, each [rows, width].
  void add(const AttentionBwdParams& p, const KeyBlock<A>& keys, int rows, int first, int last,
           const A* dy, int64_t panel_size) const {
    switch (p.d_mask_dtype) {
      case DType::f64:
        return add<double>(keys, rows, first, last, dy, panel_size);
      case DType::f32:
        return add<float>(keys, rows, first, last, dy, panel_size);
      case DType::f16:
        return add<f16>(keys, rows, first, last, dy, panel_size);
      default:
        return add<bf16>(keys, rows, first, last, dy, panel_size);
    }
  }

 private:
  struct Row {
    char* cells;
    bool sum;  // they hold one already
  };

  static Row find(const AttentionBwdParams& p, const Task& task, int i, int g) {
    const int h = task.hk * task.group + g;
    const int64_t at = task.b * p.d_mask_batch + h * p.d_mask_head + i * p.d_mask_row;
    const bool first = (task.b == 0 || p.d_mask_batch != 0) && (h == 0 || p.d_mask_head != 0);
    return {static_cast<char*>(p.d_mask) + at * size_of(p.d_mask_dtype), !first};
  }

  template <class T>
  void add(const KeyBlock<A>& keys, int rows, int first, int last, const A* dy,
           int64_t panel_size) const {
    for (int r = 0; r < rows; ++r)
      for (int n = first; n < last; ++n) {
        const int width = keys.width(n), at = n * KeyBlock<A>::PANEL;
        for (int c = 0; c < width; c += L::COUNT) {
          T* const to = reinterpret_cast<T*>(rows_[r].cells) + keys.j0 + at + c;
          const int exist = keys.keys - at - c;
          typename L::Float x = L::load(dy + n * panel_size + r * width + c);
          if (rows_[r].sum) x += L::load(to, exist);
          L::store(to, x, exist);
        }
      }
  }

  Row* rows_;  // of the tile
  int cell_;   // bytes
};

}  // namespace atx::ATX_TARGET
