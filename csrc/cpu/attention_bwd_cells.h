// dmask = dY of a mask that has every query and key: the tasks that form dQ write it as they go,
// instead of recomputing dY as MaskGradient does. Where batch entries or heads share a cell, one
// task has all of them, one after another, and the cells themselves are the running sums.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

template <class A>
struct MaskCells {
  using L = Lanes<A>;

  static bool share_batch(const AttentionBwdParams& p) {
    return p.d_mask_batch == 0 && p.fwd.B > 1;
  }
  static bool share_heads(const AttentionBwdParams& p) {
    return p.d_mask_head == 0 && p.fwd.Hq > 1;
  }
  // Sums are not formed in a narrower type than the accumulation's.
  static bool serve(const AttentionBwdParams& p) {
    const bool exact = p.fwd.mask.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32);
    return p.d_mask && p.d_mask_row != 0 && p.d_mask_col == 1 &&
           (exact || !(share_batch(p) || share_heads(p)));
  }

  // Zeros in the rows of a task, for the keys that its tiles leave out.
  static void clear(const AttentionBwdParams& p, const Task& task) {
    with_type(p, [&]<class T>(T* d_mask) {
      for (int r = 0; r < task.rows(); ++r)
        if (first(p, task, r)) memset(row(p, task, r, d_mask), 0, sizeof(T) * p.fwd.Sk);
    });
  }
  // Adds dy [rows, width] of rows [from, to) and keys [j, j + keys).
  static void add(const AttentionBwdParams& p, const Task& task, int from, int to, int j, int keys,
                  int width, const A* dy) {
    with_type(p, [&]<class T>(T* d_mask) {
      for (int r = from; r < to; ++r) {
        T* const cells = row(p, task, r, d_mask) + j;
        const bool sum = !first(p, task, r);
        for (int n = 0; n < keys; n += L::COUNT) {
          typename L::Float x = L::load(dy + r * width + n);
          if (sum) x += L::load(cells + n, keys - n);
          L::store(cells + n, x, keys - n);
        }
      }
    });
  }

 private:
  // Whether nothing was added to the row's cells before.
  static bool first(const AttentionBwdParams& p, const Task& task, int row) {
    return (task.b == 0 || p.d_mask_batch != 0) && (task.head(row) == 0 || p.d_mask_head != 0);
  }
  template <class T>
  static T* row(const AttentionBwdParams& p, const Task& task, int row, T* d_mask) {
    return d_mask + task.b * p.d_mask_batch + task.head(row) * p.d_mask_head +
           task.query(row) * p.d_mask_row;
  }
  template <class F>
  static void with_type(const AttentionBwdParams& p, F f) {
    switch (p.fwd.mask.dtype) {
      case DType::f64:
        return f(static_cast<double*>(p.d_mask));
      case DType::f32:
        return f(static_cast<float*>(p.d_mask));
      case DType::f16:
        return f(static_cast<f16*>(p.d_mask));
      default:
        return f(static_cast<bf16*>(p.d_mask));
    }
  }
};

}  // namespace atx::ATX_TARGET
