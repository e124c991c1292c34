// Attention of a task with many rows. The rows form panels of PANEL queries, one query per SIMD
// lane (gemm.h); tile by tile of keys, for each panel:
//   Sᵀ = K Qᵀ;  m' = max(m, S);  P = exp(S - m')
//   l = l·exp(m - m') + sum P;  Oᵀ = Oᵀ·exp(m - m') + Vᵀ Pᵀ
// A panel skips the keys that none of its queries sees, so the causal triangle costs half a square
// but for PANEL keys. Tiles start at multiples of BLOCK_KV whatever the task, and a lane knows
// nothing of its neighbors: a row's result is the same in every task that it could be part of.
// Against torch's SDPA, one AVX2 thread, B1 H8 S2048, D 64 and 128, median of 20 interleaved
// rounds: f32 1.05x and 1.07x, causal 1.30x and 1.32x; bf16 1.21x and 1.16x, causal 1.46x
// and 1.43x; f16 1.16x and 1.15x, causal 1.42x and 1.36x.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/dropout_lanes.h"
#include "csrc/cpu/finish_rows.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/next_tile.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/softmax.h"

namespace atx::ATX_TARGET {

template <class A>
class Panels {
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int PANEL = PANEL_VECS * L::COUNT;

 public:
  using Accumulator = A;
  static constexpr int TASK_ROWS = BLOCK_ROWS;
  static constexpr bool LOOKS_AHEAD = true;

  // Arrays for tasks of up to `rows` rows.
  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    const int64_t padded = pad(rows);
    q_ = scratch.take<A>(padded * p.D);
    o_ = scratch.take<A>(padded * p.Dv);
    max_ = scratch.take<A>(padded);
    sum_ = scratch.take<A>(padded);
    const int64_t keys = p.Sk < BLOCK_KV ? p.Sk : BLOCK_KV;
    k_ = scratch.take<A>(keys * p.D);
    v_ = scratch.take<A>(keys * p.Dv);
    s_ = scratch.take<A>(keys * PANEL);
    alpha_ = scratch.take<A>(PANEL);
    odd_row_ = scratch.take<A>(p.Dv);
  }

  // `after`, if there is one, is the task to come.
  template <class Score>
  void attend(const Task& task, const Score* scores, const Task* after = nullptr,
              const Score* after_scores = nullptr) {
    const int i1 = task.i0 + task.queries;
    const auto next = [&](int j) { return next_key(scores, task.group, task.i0, i1, j); };
    const auto end = [&](int j) { return end_before(scores, task.group, task.i0, i1, j); };
    const int last = end(task.seq.sk);
    if (last == 0) return store_zeros<A>(task);
    load_queries(task);
    for (int j = next(0), then; j < last; j = then) {
      const int j0 = align_key(j), j1 = end(tile_end(j0));
      then = next(j1);
      load_tile(task, j0, j1);
      const int strips = (task.rows() / PANEL + 1) * ((j1 - j0) / STRIP_ROWS + 1);
      if (then < last) {
        next_tile_.expect(task, align_key(then), end(tile_end(then)), strips);
      } else {
        next_tile_.expect_output(task, strips);
        if (after) expect_start(*after, after_scores, strips);
      }
      for (int row = 0; row < task.rows(); row += PANEL)
        panel<PANEL_VECS>(task, scores, row, j0, j1);
    }
    store_rows(task);
  }

 private:
  // update_softmax deals keys to its sums by position; where a panel starts must not change a row's
  // share.
  static int align_key(int j) { return j / SOFTMAX_CHAINS * SOFTMAX_CHAINS; }
  static int tile_end(int j) { return j / BLOCK_KV * BLOCK_KV + BLOCK_KV; }
  static int pad(int rows) { return (rows + L::COUNT - 1) / L::COUNT * L::COUNT; }

  // Where the COUNT rows from `row` on live in an array of panels, each [depth, width]: a column
  // block of one of them.
  static A* column_block(const Task& task, A* panels, int depth, int row, int* width) {
    const int first = row / PANEL * PANEL, rest = pad(task.rows() - first);
    *width = rest < PANEL ? rest : PANEL;
    return panels + int64_t(first) * depth + (row - first);
  }
  // Pointers to the same rows in a tensor; returns how many exist.
  template <class T>
  static int row_pointers(const Task& task, T* tensor, const Strides& stride, int row, T** rows) {
    const int n = task.rows() - row < L::COUNT ? task.rows() - row : L::COUNT;
    for (int l = 0; l < n; ++l) rows[l] = tensor + task.row_offset(stride, row + l);
    return n;
  }

  template <class Score>
  void expect_start(const Task& task, const Score* scores, int turns) {
    const int i1 = task.i0 + task.queries, j = next_key(scores, task.group, task.i0, i1, 0);
    next_tile_.expect(task, align_key(j), end_before(scores, task.group, task.i0, i1, tile_end(j)),
                      turns);
    next_tile_.expect_queries(task, turns);
  }

  void load_queries(const Task& task) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.q, [&]<class T>(const T* q) {
      for (int row = 0; row < task.rows(); row += L::COUNT) {
        const T* rows[L::COUNT];
        const int n = row_pointers(task, q, p.q_stride, row, rows);
        int width;
        A* const to = column_block(task, q_, p.D, row, &width);
        pack_columns(rows, n, p.D, to, width);
      }
    });
    for (int r = 0; r < pad(task.rows()); ++r) max_[r] = -A(INFINITY), sum_[r] = 0;
    memset(o_, 0, sizeof(A) * pad(task.rows()) * p.Dv);
  }

  // A tile is used where it lies if it needs no packing. Rows of values with an inf or a nan in
  // them are taken out: a weight of 0 times such a value is nan.
  void load_tile(const Task& task, int j0, int j1) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.k, [&]<class T>(const T* k) {
      const T* const from = k + task.key_offset(p.k_stride, j0);
      keys_ = as_packed<A>(from, p.k_stride.row, p.D);
      if (keys_) return;
      pack_rows(from, p.k_stride.row, j1 - j0, p.D, k_);
      keys_ = k_;
    });
    odd_count_ = 0;
    with_dtype<A>(p.dtype, p.v, [&]<class T>(const T* v) {
      values_ = as_packed<A>(v + task.key_offset(p.v_stride, j0), p.v_stride.row, p.Dv);
    });
    if (values_ && all_finite(values_, int64_t(j1 - j0) * p.Dv)) return;
    values_ = v_;
    if (load_values(task, j0, j1 - j0, v_)) return;
    for (int j = j0; j < j1; ++j) {
      if (load_values(task, j, 1, v_ + int64_t(j - j0) * p.Dv)) continue;
      odd_[odd_count_++] = j;
      memset(v_ + int64_t(j - j0) * p.Dv, 0, sizeof(A) * p.Dv);
    }
  }
  bool load_values(const Task& task, int j, int n, A* to) const {
    const AttentionParams& p = task.p;
    bool finite = true;
    with_dtype<A>(p.dtype, p.v, [&]<class T>(const T* v) {
      finite = pack_rows(v + task.key_offset(p.v_stride, j), p.v_stride.row, n, p.Dv, to);
    });
    return finite;
  }

  // Of the tile's keys [j0, j1) those that the panel's queries see. The last panel is as narrow as
  // its rows allow.
  template <int VECS, class Score>
  void panel(const Task& task, const Score* scores, int row, int j0, int j1) {
    constexpr int WIDTH = VECS * L::COUNT;
    if constexpr (VECS > 1)
      if (task.rows() - row <= WIDTH - L::COUNT) return panel<VECS - 1>(task, scores, row, j0, j1);
    const int last = row + WIDTH < task.rows() ? row + WIDTH - 1 : task.rows() - 1;
    const int i0 = task.query(row), i1 = task.query(last) + 1;
    for (int j = j0; j < j1;) {
      const Stretch s = next_stretch(scores, task.group, i0, i1, j, j1);
      if (s.begin >= s.end) return;
      const int from = align_key(s.begin);
      attend_stretch<VECS>(task, scores, row, i0, i1, j0, from, s.end - from);
      j = s.end;
    }
  }

  // The same of the keys from `from` on, in a tile that begins with key j0.
  template <int VECS, class Score>
  void attend_stretch(const Task& task, const Score* scores, int row, int i0, int i1, int j0,
                      int from, int keys) {
    constexpr int WIDTH = VECS * L::COUNT;
    const AttentionParams& p = task.p;
    A* const o = o_ + int64_t(row) * p.Dv;
    // Inline, for g++ takes a function that only prefetches for one that does nothing.
    const auto fetch = [this](int, int) __attribute__((always_inline)) { next_tile_.fetch(); };
    Gemm<A, VECS>::scores(keys, p.D, sum_run(p.dtype, p.D), keys_ + int64_t(from - j0) * p.D,
                          q_ + int64_t(row) * p.D, s_, fetch);
    if constexpr (Score::SPARSE) CappedProducts<A>(p).cap(keys * WIDTH, s_);
    if (!Score::LINEAR || !full(scores, task.group, i0, i1, from, from + keys))
      apply_score(task, scores, row, WIDTH, from, keys, s_);
    update_softmax(keys, WIDTH, log2_unit<A, Score>(p), odd_count_ > 0, s_, max_ + row, sum_ + row,
                   alpha_);
    if (p.dropout > 0) drop_columns(task, row, WIDTH, from, keys, s_);
    Gemm<A, VECS>::accumulate(keys, p.Dv, values_ + int64_t(from - j0) * p.Dv, s_, alpha_, o);
    for (int n = 0; n < odd_count_; ++n)
      if (odd_[n] >= from && odd_[n] < from + keys)
        add_odd_value(task, odd_[n], s_ + (odd_[n] - from) * WIDTH, WIDTH, o);
  }

  // o += p v for a row of values that is not finite, and the queries that attend to it: those with
  // p != 0.
  void add_odd_value(const Task& task, int j, const A* pt, int width, A* o) {
    load_values(task, j, 1, odd_row_);
    for (int d = 0; d < task.p.Dv; ++d)
      for (int lane = 0; lane < width; lane += L::COUNT) {
        A* const at = o + int64_t(d) * width + lane;
        const Float weight = L::load(pt + lane);
        L::store(at, L::load(at) + (weight != 0 ? weight * odd_row_[d] : L::all(0)));
      }
  }

  void store_rows(const Task& task) {
    const AttentionParams& p = task.p;
    const A kept = kept_factor<A>(p);
    with_dtype<A>(p.dtype, p.o, [&]<class T>(T* o) {
      for (int row = 0; row < task.rows(); row += L::COUNT) {
        T* rows[L::COUNT];
        const int n = row_pointers(task, o, p.o_stride, row, rows);
        int width;
        const A* const from = column_block(task, o_, p.Dv, row, &width);
        const Float factor = finish_rows<L>(task, row, n, L::load(max_ + row), L::load(sum_ + row));
        unpack_columns<A>(from, width, factor * kept, n, p.Dv, rows);
      }
    });
  }

  A *q_, *o_;                // panels of rows: [D, PANEL] and [Dv, PANEL]
  A *max_, *sum_;            // [rows]
  A *k_, *v_;                // tile of keys: [BLOCK_KV, D] and [BLOCK_KV, Dv]
  const A *keys_, *values_;  // the tile: there, or where it lies
  NextTile next_tile_;
  A *s_, *alpha_;                  // of one panel: [BLOCK_KV, PANEL] and [PANEL]
  A* odd_row_;                     // [Dv]
  int odd_[BLOCK_KV], odd_count_;  // keys of the tile whose values are not all finite
};

}  // namespace atx::ATX_TARGET
