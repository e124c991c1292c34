// What attention_bwd_gradients.h multiplies, in the accumulation type: tiles as
// attention_bwd_tile.h lays them out, sums in SIMD registers (gemm.h).
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_cells.h"
#include "csrc/cpu/attention_bwd_tile.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

template <class A>
class Products {
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int PANEL = KeyBlock<A>::PANEL, PANELS = KeyBlock<A>::PANELS;

 public:
  using Accumulator = A;
  static constexpr int BLOCK_Q = BWD_TILE_ROWS, BLOCK_KV = BWD_BLOCK_KV;

  // Arrays for tasks of up to `queries` queries, tiles of up to `rows` rows.
  void take(Scratch& scratch, const AttentionBwdParams& p, int queries, int rows) {
    const int group = p.fwd.Hq / p.fwd.Hkv;
    differences_.take(scratch, p.fwd, rows);
    dq_stride_ = (p.fwd.D + L::COUNT - 1) / L::COUNT * L::COUNT;
    dq_ = scratch.take<A>(int64_t(queries) * group * dq_stride_);
    dk_t_ = scratch.take<A>(int64_t(BLOCK_KV) * p.fwd.D);
    dv_t_ = scratch.take<A>(int64_t(BLOCK_KV) * p.fwd.Dv);
    panel_size_ = int64_t(rows) * PANEL;
    weights_ = scratch.take<A>(panel_size_);
    dx_ = scratch.take<A>(panel_size_ * PANELS);
    cells_.take(scratch, rows);
    dy_ = scratch.take<A>(MaskCells<A>::serve(p) ? panel_size_ * PANELS : 0);
    ones_ = scratch.take<A>(PANEL);
  }

  template <class Score>
  void begin(const BwdTask& t, const Score* scores) {
    scale_ = missing_scale<A, Score>(t.p.fwd);
    for (int n = 0; n < PANEL; ++n) ones_[n] = 1;
    writes_mask_ = !Score::LINEAR && t.of_queries && MaskCells<A>::serve(t.p);
    if (t.of_queries) memset(dq_, 0, sizeof(A) * (dq(t, t.i1) - dq_));
    if (writes_mask_ && !without_mask(*scores).full(t.i0, t.i1, 0, t.seq.sk))
      MaskCells<A>::clear(t.p, t.rows(t.i0, t.i1 - t.i0));
  }
  void clear_keys(const BwdTask& t) {
    memset(dk_t_, 0, sizeof(A) * BLOCK_KV * t.p.fwd.D);
    memset(dv_t_, 0, sizeof(A) * BLOCK_KV * t.p.fwd.Dv);
  }
  void load_keys(const BwdTask& t, int j0, int j1) { keys().load(t.rows(t.i0, 0), j0, j1); }
  void load_rows(const BwdTask& t, const Task& task, int first, int last) {
    differences_.load_rows(t.p, task, first, last);
    if (writes_mask_) cells_.load(t.p, task);
  }

  // P and dX of rows [first, last) and panel n, and what they add to dK and dV; also(row, vector,
  // dY) of each. The last panel is as narrow as its keys allow.
  template <int VECS = PANEL_VECS, class Score, class Also>
  void panel(const BwdTask& t, const Score* scores, const Task& task, int n, int first, int last,
             Also also) {
    constexpr int WIDTH = VECS * L::COUNT;
    if constexpr (VECS > 1)
      if (keys().width(n) < WIDTH) return panel<VECS - 1>(t, scores, task, n, first, last, also);
    A* const dx = dx_ + n * panel_size_;
    A* const dy = dy_ + n * panel_size_;
    // Strips of dQ and rows of the mask may not see the panel.
    const auto clear_rest = [&](A* x) {
      memset(x, 0, sizeof(A) * first * WIDTH);
      memset(x + last * WIDTH, 0, sizeof(A) * (task.rows() - last) * WIDTH);
    };
    clear_rest(dx);
    if (writes_mask_) clear_rest(dy);
    if (first >= last) return;

    // By value: no store can change what it holds.
    const auto emit = [also, dx, weights = weights_, cells = writes_mask_ ? dy : nullptr](
                          int r, int v, Float weight, Float y, Float x) {
      const int at = (r * VECS + v) * L::COUNT;
      L::store(weights + at, weight);
      L::store(dx + at, x);
      if constexpr (!Score::LINEAR)
        if (cells) L::store(cells + at, y);
      also(r, v, y);
    };
    differences_.template compute<VECS>(task, scores, n, first, last, weights_, dx, emit);
    if (!t.of_keys) return;
    const AttentionParams& p = t.p.fwd;
    const int64_t at = int64_t(n) * PANEL;
    if (t.p.d_v)
      multiply_rows<VECS>(first, last, p.Dv, rows().d_o, rows().d_o_finite, weights_,
                          dv_t_ + at * p.Dv);
    if (t.p.d_k)
      multiply_rows<VECS>(first, last, p.D, rows().q, rows().q_finite, dx, dk_t_ + at * p.D);
  }

  // What all panels [first, last) of the block add.
  template <class Score>
  void finish_tile(const BwdTask& t, const Score* scores, const Task& task, int first, int last) {
    if (t.of_queries && t.p.d_q) multiply_keys<PANEL_VECS>(t, scores, task, 0);
    if (writes_mask_) cells_.add(t.p, keys(), task.rows(), first, last, dy_, panel_size_);
  }

  void store_queries(const BwdTask& t) const {
    with_dtype<A>(t.p.fwd.dtype, t.p.d_q, [&]<class T>(T* d_q) {
      for (int i = t.i0; i < t.i1; ++i)
        for (int g = 0; g < t.group; ++g) {
          T* const to = d_q + t.rows(i, 1).row_offset(t.p.d_q_stride, g);
          const A* const from = dq(t, i) + g * dq_stride_;
          for (int d = 0; d < t.p.fwd.D; d += L::COUNT)
            L::store(to + d, L::load(from + d) * scale_, t.p.fwd.D - d);
        }
    });
  }
  void store_keys(const BwdTask& t, int j0, int j1) const {
    const AttentionBwdParams& p = t.p;
    if (p.d_k) store_keys(t, j0, j1, p.d_k, p.d_k_stride, p.fwd.D, dk_t_, scale_);
    if (p.d_v) store_keys(t, j0, j1, p.d_v, p.d_v_stride, p.fwd.Dv, dv_t_, A(1));
  }

 private:
  KeyBlock<A>& keys() { return differences_.keys; }
  RowTile<A>& rows() { return differences_.rows; }
  A* dq(const BwdTask& t, int i) const { return dq_ + int64_t(i - t.i0) * t.group * dq_stride_; }

  // to [cols, WIDTH] += rows [last - first, cols]ᵀ weights [last - first, WIDTH]
  template <int VECS>
  void multiply_rows(int first, int last, int cols, const A* row, bool finite, const A* weights,
                     A* to) const {
    constexpr int WIDTH = VECS * L::COUNT;
    row += int64_t(first) * cols, weights += first * WIDTH;
    if (finite) return Gemm<A, VECS>::accumulate(last - first, cols, row, weights, ones_, to);
    for (int r = first; r < last; ++r, row += cols, weights += WIDTH)
      for (int d = 0; d < cols; ++d)
        for (int v = 0; v < WIDTH; v += L::COUNT) {
          A* const at = to + int64_t(d) * WIDTH + v;
          L::store(at, L::load(at) + attended(L::load(weights + v), L::all(row[d])));
        }
  }
  // Where 0 stands for "does not attend", x may be inf or nan.
  static ATX_HD Float attended(Float weight, Float x) {
    return weight != 0 ? weight * x : L::all(0);
  }

  // dQ of the tile, in columns of VECS vectors; a strip of rows takes the panels that it sees.
  template <int VECS, class Score>
  void multiply_keys(const BwdTask& t, const Score* scores, const Task& task, int column) {
    constexpr int WIDTH = VECS * L::COUNT;
    if constexpr (VECS > 1)
      if (dq_stride_ - column < WIDTH) return multiply_keys<VECS - 1>(t, scores, task, column);
    for (; column + WIDTH <= dq_stride_; column += WIDTH)
      by_strips(task.rows(), [&]<int ROWS>(int r) {
        const int i = task.query(r), n = task.query(r + ROWS - 1) + 1 - i;
        const int first = keys().panels().first(scores, task.group, i, n);
        const int last = keys().panels().last(scores, task.group, i, n);
        if (first >= last) return;
        if (!Score::LINEAR && writes_mask_) fetch_cells(r, ROWS, first, last, column, WIDTH);
        A* const to = dq(t, task.i0) + r * dq_stride_ + column;
        keys().finite ? add_strip<ROWS, VECS>(r, first, last, t.p.fwd.D, column, to)
                      : add_attended<ROWS, VECS>(r, first, last, t.p.fwd.D, column, to);
      });
    if constexpr (VECS > 1)
      if (column < dq_stride_) multiply_keys<VECS - 1>(t, scores, task, column);
  }
  // The cells that finish_tile adds to next: each column of strips fetches its share of the keys.
  ATX_HD void fetch_cells(int row, int rows, int first, int last, int column, int width) {
    const int seen = (last - first) * PANEL, from = seen * column / dq_stride_;
    const int to = seen * (column + width) / dq_stride_;
    cells_.fetch(row, rows, keys().j0 + first * PANEL + from, to - from);
  }
  template <int ROWS, int VECS>
  void add_strip(int row, int first, int last, int D, int column, A* to) {
    Float acc[ROWS][VECS] = {};
    for (int n = first; n < last; ++n) {
      const int width = keys().width(n), exist = keys().keys - n * PANEL;
      multiply_add<L>(acc, exist < PANEL ? exist : PANEL, dx_ + n * panel_size_ + row * width,
                      width, 1, keys().k + int64_t(n) * PANEL * D + column, D);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        A* const at = to + r * dq_stride_ + v * L::COUNT;
        L::store(at, L::load(at) + acc[r][v]);
      }
  }
  template <int ROWS, int VECS>
  void add_attended(int row, int first, int last, int D, int column, A* to) {
    for (int r = 0; r < ROWS; ++r)
      for (int j = first * PANEL; j < last * PANEL && j < keys().keys; ++j) {
        const int n = j / PANEL, width = keys().width(n);
        const Float weight = L::all(dx_[n * panel_size_ + (row + r) * width + j % PANEL]);
        for (int v = 0; v < VECS; ++v) {
          A* const at = to + r * dq_stride_ + v * L::COUNT;
          const Float k = L::load(keys().k + int64_t(j) * D + column + v * L::COUNT);
          L::store(at, L::load(at) + attended(weight, k));
        }
      }
  }

  void store_keys(const BwdTask& t, int j0, int j1, void* tensor, const Strides& stride, int cols,
                  const A* from, A factor) const {
    with_dtype<A>(t.p.fwd.dtype, tensor, [&]<class T>(T* to) {
      for (int j = j0; j < j1; j += L::COUNT) {
        const int n = j1 - j < L::COUNT ? j1 - j : L::COUNT, panel = (j - j0) / PANEL;
        T* rows[L::COUNT];
        for (int l = 0; l < n; ++l) rows[l] = to + t.rows(t.i0, 0).key_offset(stride, j + l);
        unpack_columns<A>(from + int64_t(panel) * PANEL * cols + (j - j0) % PANEL,
                          panel_width<A>(j1 - j0, panel), L::all(factor), n, cols, rows);
      }
    });
  }

  Differences<A> differences_;
  int dq_stride_;       // D up to whole vectors; what lies beyond D is never read
  int64_t panel_size_;  // of weights_ and of dx_
  A* dq_;               // [rows of the task, dq_stride]
  A *dk_t_, *dv_t_;     // of the block, in panels: [D, PANEL], [Dv, PANEL]
  A *weights_, *dx_;    // of one panel, of every panel of the block: [rows of the tile, PANEL]
  bool writes_mask_;
  MaskCells<A> cells_;
  A* dy_;    // as dx_, for the mask
  A* ones_;  // [PANEL]
  A scale_;  // what dQ and dK lack
};

}  // namespace atx::ATX_TARGET
