// P and dY of a tile: rows of a few queries against a block of keys, in panels of PANEL keys with
// one key per SIMD lane (gemm.h, with the sides exchanged).
//   S = Q Kᵀ,  dP = M ∘ (dO Vᵀ),  P = exp(Y(S) - lse),  dY = P ∘ (dP - delta)
// Score policies, masks and their gradient want keys in the lanes, so nothing is transposed but k
// and v, once per block.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/dropout_lanes.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/mask.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// Columns of a panel of a block of `keys`: the last is as narrow as its keys allow.
template <class A>
int panel_width(int keys, int panel) {
  constexpr int COUNT = Lanes<A>::COUNT, PANEL = PANEL_VECS * COUNT;
  const int rest = (keys - panel * PANEL + COUNT - 1) / COUNT * COUNT;
  return rest < PANEL ? rest : PANEL;
}

// A block of keys, as rows and as panels of columns.
template <class A>
struct KeyBlock {
  using L = Lanes<A>;
  static constexpr int PANEL = PANEL_VECS * L::COUNT;
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

  A *q, *d_o;           // [rows, D], [rows, Dv]
  A *log2_sum, *delta;  // [rows]; lse in powers of two
  bool* alive;          // [rows]; others attend to nothing, and are zeros here
  bool q_finite, d_o_finite;

  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    q = scratch.take<A>(int64_t(rows) * p.D);
    d_o = scratch.take<A>(int64_t(rows) * p.Dv);
    log2_sum = scratch.take<A>(rows);
    delta = scratch.take<A>(rows);
    alive = scratch.take<bool>(rows);
  }

  void load(const AttentionBwdParams& p, const Task& task) {
    const A* const lse = static_cast<const A*>(p.fwd.lse);
    const A* const deltas = static_cast<const A*>(p.delta);
    for (int r = 0; r < task.rows(); ++r) {
      const int64_t at = task.lse_offset(r);
      alive[r] = lse[at] != -A(INFINITY);
      log2_sum[r] = alive[r] ? lse[at] * A(LOG2_E) : 0;
      delta[r] = alive[r] ? deltas[at] : 0;
    }
    q_finite = load_rows(task, p.fwd.q, p.fwd.q_stride, p.fwd.D, q);
    d_o_finite = load_rows(task, p.d_o, p.d_o_stride, p.fwd.Dv, d_o);
  }

 private:
  bool load_rows(const Task& task, const void* tensor, const Strides& stride, int cols, A* to) {
    typename L::Float zero = {};
    with_dtype<A>(task.p.dtype, tensor, [&]<class T>(const T* from) {
      for (int r = 0; r < task.rows(); ++r, to += cols) {
        if (alive[r])
          zero += pack_row(from + task.row_offset(stride, r), cols, to);
        else
          memset(to, 0, sizeof(A) * cols);
      }
    });
    return L::sum(zero) == 0;
  }
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

  // Panels [first, last) hold every key of the block that `queries` queries from i on see.
  template <class Score>
  int first_panel(const Score* scores, int group, int i, int queries) const {
    return (next_key(scores, group, i, i + queries, keys.j0) - keys.j0) / PANEL;
  }
  template <class Score>
  int last_panel(const Score* scores, int group, int i, int queries) const {
    const int j = end_before(scores, group, i, i + queries, keys.j0 + keys.keys) - keys.j0;
    return (j + PANEL - 1) / PANEL;
  }
  // Rows [first, last) hold every row that sees a key of the panel.
  template <class Score>
  void rows_of_panel(const Task& task, const Score* scores, int panel, int* first,
                     int* last) const {
    const auto sees = [&](int i) {
      const int j0 = keys.j0 + panel * PANEL, j1 = j0 + keys.width(panel);
      return next_key(scores, task.group, i, i + 1, j0) < j1 &&
             j0 < end_before(scores, task.group, i, i + 1, j1);
    };
    int a = task.i0, b = task.i0 + task.queries;
    while (a < b && !sees(a)) ++a;
    while (a < b && !sees(b - 1)) --b;
    *first = (a - task.i0) * task.group, *last = (b - task.i0) * task.group;
  }

  // Rows [first, last) of s and dp, [rows, VECS vectors], become the products; then calls
  // emit(row, vector, M ∘ P, dY, dX) of every vector of keys. dX lacks the scale if the policy is
  // linear.
  template <int VECS, class Score, class Emit>
  void compute(const Task& task, const Score* scores, int panel, int first, int last, A* s, A* dp,
               Emit emit) {
    const AttentionParams& p = task.p;
    constexpr int WIDTH = VECS * L::COUNT;
    const int run_k = sum_run(p, p.D), run_v = sum_run(p, p.Dv);
    Gemm<A, VECS>::scores(last - first, p.D, run_k, rows.q + int64_t(first) * p.D,
                          keys.k_t + int64_t(panel) * PANEL * p.D, s + first * WIDTH);
    Gemm<A, VECS>::scores(last - first, p.Dv, run_v, rows.d_o + int64_t(first) * p.Dv,
                          keys.v_t + int64_t(panel) * PANEL * p.Dv, dp + first * WIDTH);
    const int j = keys.j0 + panel * PANEL;
    const int i0 = task.query(first), i1 = task.query(last - 1) + 1;
    if (full_without_mask(scores, task.group, i0, i1, j, j + WIDTH))
      each<VECS, true>(task, scores, panel, first, last, s, dp, emit);
    else
      each<VECS, false>(task, scores, panel, first, last, s, dp, emit);
  }

 private:
  // IN_WINDOW: only a mask can keep a row from a key.
  template <int VECS, bool IN_WINDOW, class Score, class Emit>
  void each(const Task& task, const Score* scores, int panel, int first, int last, const A* s,
            const A* dp, Emit emit) const {
    const A unit = log2_unit<A, Score>(task.p);
    const bool drop = task.p.dropout > 0;
    const A kept = drop ? Dropout<A>(task.p, task.b).kept : 1;
    const int j0 = keys.j0 + panel * PANEL, end = keys.j0 + keys.keys;
    const Float none = L::all(0);
    for (int r = first, i = task.query(first), g = first % task.group; r < last; ++r) {
      const Score score = scores[g];  // its own copy: no store below can change it
      const auto& window = without_mask(score);
      prefetch_mask(score, i + PREFETCH_QUERIES, j0);
      const Float log2_sum = L::all(rows.log2_sum[r]), delta = L::all(rows.delta[r]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        if (!rows.alive[r]) {
          emit(r, v, none, none, none);
          continue;
        }
        const int at = (r * VECS + v) * L::COUNT, j = j0 + v * L::COUNT;
        const int n = IN_WINDOW ? L::COUNT : end - j;
        const Float product = L::load(s + at);
        Float y = product, weight_gradient = L::load(dp + at);
        if constexpr (!Score::LINEAR) y = score.template score<L>(product, i, j, n);
        if (drop) weight_gradient = kept_.kept(r, j - keys.j0, weight_gradient * kept);
        const Float power = y * unit - log2_sum;
        Float weight = power < LOWEST_POWER ? none : L::exp2(power);
        Float dy = weight * (weight_gradient - delta), dx = dy;
        if constexpr (!Score::LINEAR) {
          dx *= score.template derivative<L>(product);
        }
        if (drop) weight = kept_.kept(r, j - keys.j0, weight * kept);
        const auto keep = [&](typename L::Bool kept) {
          weight = L::select(kept, weight, none);
          dy = L::select(kept, dy, none), dx = L::select(kept, dx, none);
        };
        if constexpr (!IN_WINDOW) keep(window.template keep<L>(i, j, n));
        if constexpr (!Score::LINEAR) {
          if (score.mask.data && score.mask.dtype != DType::boolean)
            keep({y != -A(INFINITY)});
          else if (score.mask.data)
            keep(L::load_bool(score.mask, i, j, n));
        }
        emit(r, v, weight, dy, dx);
      }
      if (++g == task.group) g = 0, ++i;
    }
  }

  // Rows of a mask lie so far apart that the hardware does not see the next one coming.
  static constexpr int PREFETCH_QUERIES = 8;
  template <class Score>
  static ATX_HD void prefetch_mask(const Score& score, int i, int j) {
    if constexpr (!Score::LINEAR) {
      if (!score.mask.data) return;
      const int64_t size = size_of(score.mask.dtype);
      const char* const row = static_cast<const char*>(score.mask.data) +
                              (i * score.mask.row + j * score.mask.col) * size;
      for (int n = 0; n < PANEL * size; n += 64) __builtin_prefetch(row + n);
    }
  }

  // Smaller weights count as 0: products with them would be subnormal, and slow (ALiBi of slope 0.1
  // on AVX2: 2.6x).
  static constexpr A LOWEST_POWER = 26 - Number<A>::BIAS;

  KeptBits<A, BWD_BLOCK_KV / DROPOUT_BLOCK> kept_;  // by dropout
};

}  // namespace atx::ATX_TARGET
