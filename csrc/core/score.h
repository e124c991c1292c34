// Score policies: what happens between q·k and the softmax, and which keys a query sees.
// Built once per (batch, query head); the same code on every target. Positions: i query, j key.
//
// - kv_begin(i0, i1), kv_end(i0, i1): a range that holds every key kept by a query in [i0, i1)
// - full(i0, i1, j0, j1): true if every query of [i0, i1) keeps every key of [j0, j1)
// - next_key(i0, i1, j), end_before(i0, i1, j): the first key from j on that one of them may keep,
//   and one past the last such key before j; SPARSE: there may be others in between that none keeps
// - keep<L>(i, j, n): which of the keys j ... j + L::COUNT - 1 query i attends to (n of them exist)
// - score<L>(s, i, j, n): the logit, in natural units, of the raw products s = q_i · k_j ...
// - derivative<L>(s): of that logit by s
// - cap(): the soft-cap of a policy that has one; 0 without. A GPU's kernels apply it by themselves
//   (cuda/grid_logits.cuh), so GeneralBlocks, which is theirs alone, has no score and derivative
// - LINEAR: score is scale * s, so a kernel may fold the scale into its exponential
//
// A is the accumulation type, float or double. L is a vector of lanes of it (lanes.h; cpu/simd.h):
// one key per call on a GPU, a SIMD register of keys on a CPU.
#pragma once
#include "params.h"
#include "sequence.h"
#include "target.h"

namespace atx::ATX_TARGET {

ATX_HD int clamp_position(int64_t x) {
  return int(x < -MAX_LENGTH ? -MAX_LENGTH : x > MAX_LENGTH ? MAX_LENGTH : x);
}

// What linear policies share: keys of the sequence, and a factor.
template <class A>
struct Linear {
  static constexpr bool LINEAR = true, SPARSE = false;
  int sk;
  A scale;

  ATX_HD Linear(const AttentionParams& p, const Sequence& s) : sk(s.sk), scale(A(p.scale)) {}
  template <class L>
  ATX_HD typename L::Float score(typename L::Float s, int, int, int) const {
    return s * scale;
  }
  template <class L>
  ATX_HD typename L::Float derivative(typename L::Float) const {
    return L::all(scale);
  }
};

// Keys within a distance of the diagonal, i + lo <= j <= i + hi. Causal is hi = offset, lo = -inf;
// without a window, the distances are longer than any sequence. Kernels look at the bounds once per
// tile, and treat alike all tiles that are kept whole, so there is no policy for all keys.
template <class A>
struct Window : Linear<A> {
  using Linear<A>::sk;
  int offset;  // diagonal: query i is level with key i + offset
  int lo, hi;

  ATX_HD Window(const AttentionParams& p, const Sequence& s, int, int)
      : Linear<A>(p, s),
        offset(p.bottom_right ? s.sk - s.sq : 0),
        lo(p.window_left == NO_WINDOW ? -MAX_LENGTH
                                      : clamp_position(int64_t(offset) - p.window_left)),
        hi(p.window_right == NO_WINDOW ? MAX_LENGTH
                                       : clamp_position(int64_t(offset) + p.window_right)) {}
  ATX_HD int kv_begin(int i0, int) const {
    const int j = i0 + lo;
    return j < 0 ? 0 : j < sk ? j : sk;
  }
  ATX_HD int kv_end(int, int i1) const {
    const int j = i1 + hi;  // last query i1 - 1 sees key i1 - 1 + hi
    return j < 0 ? 0 : j < sk ? j : sk;
  }
  ATX_HD int next_key(int i0, int i1, int j) const {
    const int begin = kv_begin(i0, i1);
    return j > begin ? j : begin;
  }
  ATX_HD int end_before(int i0, int i1, int j) const {
    const int end = kv_end(i0, i1);
    return j < end ? j : end;
  }
  ATX_HD bool full(int i0, int i1, int j0, int j1) const {
    return j1 <= sk && j0 >= full_from(i1) && j1 - 1 <= i0 + hi;
  }
  // The first key that no query before i1 has behind its window.
  ATX_HD int full_from(int i1) const { return i1 - 1 + lo; }
  template <class L>
  ATX_HD typename L::Bool keep(int i, int j, int) const {
    const typename L::Position at = L::positions(j);
    return L::less(at, sk) & ~L::less(at, i + lo) & L::less(at, i + hi + 1);
  }
};

ATX_HD int size_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::boolean ? 1 : 2;
}

// A window with everything that changes a score: soft-cap, ALiBi or forgetting, boolean or additive
// mask, in that order.
template <class A>
struct General : Window<A> {
  using Linear<A>::scale;
  static constexpr bool LINEAR = false;
  A softcap, slope;
  int level;  // ALiBi's distance is |i + level - j|, always from the bottom-right corner (as
              // FlashAttention)
  Mask mask;  // data: the [Sq, Sk] plane of this batch and head. Of forgetting, the two rows of its
              // sums: a GPU has no registers for more
  const AttentionParams* p;

  ATX_HD General(const AttentionParams& p, const Sequence& s, int b, int h)
      : Window<A>(p, s, b, h),
        softcap(A(p.softcap)),
        slope(0),
        level(s.sk - s.sq),
        mask(p.mask),
        p(&p) {
    const int64_t at = int64_t(b) * p.alibi_slopes.batch + int64_t(h) * p.alibi_slopes.head;
    if (p.alibi_slopes.data) slope = static_cast<const A*>(p.alibi_slopes.data)[at];
    if (forgets()) {
      mask.data = static_cast<const A*>(p.forgetting.sums) + int64_t(b) * p.forgetting.batch +
                  int64_t(h) * p.forgetting.head;
    } else if (mask.data) {
      mask.data = static_cast<const char*>(mask.data) +
                  (int64_t(b) * mask.batch + int64_t(h) * mask.head) * size_of(mask.dtype);
    }
  }
  ATX_HD A cap() const { return softcap; }
  ATX_HD bool forgets() const { return p->forgetting.sums; }
  ATX_HD bool full(int i0, int i1, int j0, int j1) const {
    return (!mask.data || forgets()) && Window<A>::full(i0, i1, j0, j1);
  }
  template <class L>
  ATX_HD typename L::Bool keep(int i, int j, int n) const {
    const typename L::Bool in_window = Window<A>::template keep<L>(i, j, n);
    if (!mask.data || mask.dtype != DType::boolean) return in_window;
    return in_window & L::load_bool(mask, i, j, n);
  }
  template <class L>
  ATX_HD typename L::Float score(typename L::Float s, int i, int j, int n) const {
    typename L::Float x = s * scale;
    if (softcap != 0) x = L::tanh(x * (1 / softcap)) * softcap;
    if (forgets()) return forget<L>(x, level_with(i), j, n);
    if (slope != 0) x = x - L::distance(i + level, j) * slope;
    if (mask.data && mask.dtype != DType::boolean) x = L::add_bias(x, L::load_float(mask, i, j, n));
    return x;
  }
  template <class L>
  ATX_HD typename L::Bool in_window(int i, int j, int n) const {
    return Window<A>::template keep<L>(i, j, n);
  }
  ATX_HD bool window_holds(int i0, int i1, int j0, int j1) const {
    return Window<A>::full(i0, i1, j0, j1);
  }
  // The sums where query i is level, and the difference of these and those at keys from j on, added
  // to x.
  struct Level {
    A sum, rest;
  };
  ATX_HD Level level_with(int i) const {
    int at = i + (p->bottom_right ? p->Sk - p->Sq : 0);  // Window's offset, without its register
    at = at < 0 ? 0 : at < p->Sk ? at : p->Sk - 1;
    const A* const sums = static_cast<const A*>(mask.data);
    return {sums[at], sums[at + p->Sk]};
  }
  template <class L>
  ATX_HD typename L::Float forget(typename L::Float x, const Level& from, int j, int n) const {
    const A *const sums = static_cast<const A*>(mask.data), *const rest = sums + p->Sk;
    x = x + (from.sum - L::load(sums + j, n));
    return x + (from.rest - L::load(rest + j, n));
  }
  // What the gradient of a pair's logit counts for in row_shares (params.h).
  template <class L>
  ATX_HD typename L::Float share(int i, int j) const {
    return forgets() ? L::all(-1) : L::distance(i + level, j);
  }
  template <class L>
  ATX_HD typename L::Float derivative(typename L::Float s) const {
    if (softcap == 0) return L::all(scale);
    const typename L::Float t = L::tanh(s * (scale * (1 / softcap)));
    return (1 - t * t) * scale;
  }
};

// The narrowest policy that says what the params say: the fewer hooks, the faster the kernel.
// Blocks: blocks.h.
enum class ScoreId { Window, General, Blocks };
ATX_HD ScoreId score_id(const AttentionParams& p) {
  if (p.blocks.visited) return ScoreId::Blocks;
  return p.softcap != 0 || p.alibi_slopes.data || p.forgetting.sums || p.mask.data
             ? ScoreId::General
             : ScoreId::Window;
}

}  // namespace atx::ATX_TARGET
