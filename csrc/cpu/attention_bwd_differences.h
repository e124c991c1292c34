// From products to differences, whatever multiplied:
//   P = exp(Y(S) - lse),  dP = M ∘ (dO Vᵀ),  dY = P ∘ (dP - delta),  dX = dY ∘ dY/dX
// A block of keys is cut into panels, with one key per SIMD lane; a row's numbers are the same in
// every lane. Score policies, masks and their gradient want it so.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/capped_products.h"
#include "csrc/cpu/dropout_lanes.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// Keys of a panel.
template <class A>
constexpr int BWD_PANEL = PANEL_VECS * Lanes<A>::COUNT;

// What the forward left of the rows of a tile.
template <class A>
struct RowStatistics {
  A *log2_sum, *delta;  // [rows]; lse in powers of two
  bool* alive;          // [rows]; others attend to nothing

  void take(Scratch& scratch, int rows) {
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
  }
};

// The panels of a block of `keys` keys from j0 on.
template <class A>
struct KeyPanels {
  static constexpr int PANEL = BWD_PANEL<A>;
  int j0, keys;

  // Panels [first, last) hold every key of the block that `queries` queries from i on see.
  template <class Score>
  int first(const Score* scores, int group, int i, int queries) const {
    return (next_key(scores, group, i, i + queries, j0) - j0) / PANEL;
  }
  template <class Score>
  int last(const Score* scores, int group, int i, int queries) const {
    const int j = end_before(scores, group, i, i + queries, j0 + keys) - j0;
    return (j + PANEL - 1) / PANEL;
  }
  // Rows [first, last) hold every row that sees a key of the panel.
  template <class Score>
  void rows_of(const Task& task, const Score* scores, int panel, int* first_row,
               int* last_row) const {
    const int from = j0 + panel * PANEL, to = from + PANEL < j0 + keys ? from + PANEL : j0 + keys;
    const auto sees = [&](int i) {
      return next_key(scores, task.group, i, i + 1, from) < to &&
             from < end_before(scores, task.group, i, i + 1, to);
    };
    int a = task.i0, b = task.i0 + task.queries;
    while (a < b && !sees(a)) ++a;
    while (a < b && !sees(b - 1)) --b;
    *first_row = (a - task.i0) * task.group, *last_row = (b - task.i0) * task.group;
  }
};

// What the sums of dX are still to be multiplied by. General multiplies dX by the scale, because it
// may have to by the soft-cap's slope.
template <class A, class Score>
A missing_scale(const AttentionParams& p) {
  return Score::LINEAR ? A(p.scale) : 1;
}

constexpr int CACHE_LINE = 64;

// Fetches the mask of `rows` rows from `row` on, which may lie beyond the task's, and of keys
// [j, j + keys). The hardware does not see them coming, rows being a page or more apart; asked for
// between the strips of a product, they come while it runs (asked for one by one while differences
// are formed, a profile showed about half of that time in the wait). Not a tile ahead, because rows
// that are a power of two apart share few sets of a cache: that was counted, not measured.
template <class Score>
ATX_HD void fetch_mask(const Task& task, const Score* scores, int row, int rows, int j, int keys) {
  if constexpr (!Score::LINEAR) {
    if (!scores->mask.data || scores->forgets()) return;
    const int64_t size = size_of(scores->mask.dtype);
    for (int r = 0, i = task.query(row), g = row % task.group; r < rows; ++r) {
      const Mask& mask = scores[g].mask;
      const char* const at =
          static_cast<const char*>(mask.data) + (i * mask.row + j * mask.col) * size;
      for (int n = 0; n < keys * size; n += CACHE_LINE) __builtin_prefetch(at + n, 0, 2);
      if (++g == task.group) g = 0, ++i;
    }
  }
}

// 2^x of a weight's logarithm. Smaller weights count as 0: products with them would be subnormal,
// and slow (ALiBi of slope 0.1 on AVX2: 2.6x).
template <class A>
struct Exponential {
  using L = Lanes<A>;
  static constexpr A LOWEST_POWER = 26 - Number<A>::BIAS;
  static ATX_HD typename L::Float of(typename L::Float x) {
    return x < LOWEST_POWER ? L::all(0) : L::exp2(x);
  }
};

// Rows [first, last) of a tile, and perhaps more that are not alive, against VECS vectors of keys
// from j on, of which those before `end` exist.
template <class A>
struct Cells {
  const Task& task;
  const RowStatistics<A>& rows;
  int first, last, j, end;
  int block;  // the first key of the block
};

// General where a logit is scale * s + mask, of the accumulation's type and contiguous, in the
// window: what biases are. Every test of another option is one per vector.
template <class A>
struct Biased : General<A> {
  using General<A>::mask;
  using General<A>::scale;
  explicit ATX_HD Biased(const General<A>& score) : General<A>(score) {}
  static bool serves(const AttentionParams& p) {
    return p.mask.data && p.mask.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) &&
           p.mask.col == 1 && p.softcap == 0 && !p.alibi_slopes.data && !p.forgetting.sums;
  }
  template <class L>
  ATX_HD typename L::Float score(typename L::Float s, int i, int j, int) const {
    return L::add_bias(s * scale, L::load(static_cast<const A*>(mask.data) + i * mask.row + j));
  }
  template <class L>
  ATX_HD typename L::Float derivative(typename L::Float) const {
    return L::all(scale);
  }
};

// IN_WINDOW: only a mask can keep a row from a key. Policy: scores as what is to be read of them.
template <class A, int VECS, class Exp, bool IN_WINDOW, class Policy, class Score, class Kept,
          class Emit>
void differences_in(const Cells<A>& c, const Score* scores, const A* s, const A* dp,
                    const Kept kept_bits, Emit emit) {
  using L = Lanes<A>;
  using Float = typename L::Float;
  constexpr bool BIASED = __is_same(Policy, Biased<A>);
  const Task& task = c.task;
  const A unit = log2_unit<A, Score>(task.p);
  const A kept = kept_factor<A>(task.p);
  const CappedProducts<A> capped(task.p);
  const Float none = L::all(0);
  const RowStatistics<A> rows = c.rows;  // its own copy, too
  for (int r = c.first, i = task.query(r), g = r % task.group; r < c.last; ++r) {
    const Policy score(scores[g]);  // its own copy: no store below can change it
    const auto& window = without_mask(score);
    const Float log2_sum = L::all(rows.log2_sum[r]), delta = L::all(rows.delta[r]);
    const bool alive = rows.alive[r];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      if (!alive) {
        emit(r, v, none, none, none);
        continue;
      }
      const int at = ((r - c.first) * VECS + v) * L::COUNT, j = c.j + v * L::COUNT;
      const int n = IN_WINDOW ? L::COUNT : c.end - j;
      const Float product = L::load(s + at);
      Float y = product, weight_gradient = L::load(dp + at);
      if constexpr (!Policy::LINEAR) y = score.template score<L>(product, i, j, n);
      if constexpr (Kept::SOME)
        weight_gradient = kept_bits.kept(r, j - c.block, weight_gradient * kept);
      Float weight = Exp::of(y * unit - log2_sum);
      Float dy = weight * (weight_gradient - delta), dx = dy;
      if constexpr (!Policy::LINEAR) dx *= score.template derivative<L>(product);
      if constexpr (Score::SPARSE)
        if (capped.outer != 0) dx *= capped.slope(product);
      if constexpr (Kept::SOME) weight = kept_bits.kept(r, j - c.block, weight * kept);
      const auto keep = [&](typename L::Bool seen) {
        weight = L::select(seen, weight, none);
        dy = L::select(seen, dy, none), dx = L::select(seen, dx, none);
      };
      if constexpr (!IN_WINDOW) keep(window.template keep<L>(i, j, n));
      if constexpr (!Policy::LINEAR) {
        if (BIASED || (score.mask.data && score.mask.dtype != DType::boolean))
          keep({y != -A(INFINITY)});
        else if (score.mask.data)
          keep(L::load_bool(score.mask, i, j, n));
      }
      emit(r, v, weight, dy, dx);
    }
    if (++g == task.group) g = 0, ++i;
  }
}

// s and dp [last - first, VECS vectors]: S and dO Vᵀ of the cells. Calls emit(row, vector, M ∘ P,
// dY, dX) of every vector of keys. dX lacks the scale if the policy is linear. kept: by dropout, of
// the rows of the tile and the keys of the block.
template <class A, int VECS, class Exp, class Score, class Kept, class Emit>
void differences(const Cells<A>& c, const Score* scores, A* s, const A* dp, const Kept& kept,
                 Emit emit) {
  const Task& task = c.task;
  if constexpr (Score::SPARSE)
    CappedProducts<A>(task.p).cap((c.last - c.first) * VECS * Lanes<A>::COUNT, s);
  const int rows = c.last < task.rows() ? c.last : task.rows();
  const int i0 = task.query(c.first), i1 = task.query(rows - 1) + 1;
  const bool full =
      full_without_mask(scores, task.group, i0, i1, c.j, c.j + VECS * Lanes<A>::COUNT);
  const auto compute = [&](auto kept) __attribute__((always_inline)) {
    if (!full) return differences_in<A, VECS, Exp, false, Score>(c, scores, s, dp, kept, emit);
    if constexpr (!Score::LINEAR)
      if (Biased<A>::serves(task.p))
        return differences_in<A, VECS, Exp, true, Biased<A>>(c, scores, s, dp, kept, emit);
    differences_in<A, VECS, Exp, true, Score>(c, scores, s, dp, kept, emit);
  };
  task.p.dropout > 0 ? compute(kept) : compute(AllKept());
}

}  // namespace atx::ATX_TARGET
