// Online softmax of a panel of queries, queries in the lanes: s [keys, width] becomes p in place.
// Everything is vertical: the maximum and the sum of a row are a lane of a vector, never a
// reduction across one. The exponential takes scores to 2^(unit s - m) in one multiply-add: the
// scale of a linear policy costs nothing.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/capped_products.h"
#include "csrc/cpu/mask.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// x: the raw scores of one query i with keys j, j + 1, ... (n exist). −inf where it does not
// attend.
template <class L, class Score>
ATX_HD typename L::Float logits(const Score& score, typename L::Float x, int i, int j, int n) {
  if constexpr (!Score::LINEAR) x = score.template score<L>(x, i, j, n);
  return L::select(score.template keep<L>(i, j, n), x, L::all(-INFINITY));
}

// Scores to logits, for keys [j0, j0 + keys) and `width` rows from `row` on.
// Policies want keys in the lanes: COUNT x COUNT blocks are transposed there and back. Blocks that
// lie in the window need less: nothing if the policy is linear, so that a causal tile pays for its
// diagonal only, and one transposition if a mask is all there is.
template <class A, class Score>
void apply_score(const Task& task, const Score* scores, int row, int width, int j0, int keys,
                 A* s) {
  using L = Lanes<A>;
  for (int lane = 0; lane < width; lane += L::COUNT) {
    const int first = row + lane,
              n_rows = task.rows() - first < L::COUNT ? task.rows() - first : L::COUNT;
    const int i0 = task.query(first), i1 = task.query(first + n_rows - 1) + 1;
    MaskBlock<A> mask;
    const bool has_mask = mask.find(task, scores, first);
    for (int j = 0; j < keys; j += L::COUNT) {
      const int n = keys - j < L::COUNT ? keys - j : L::COUNT;
      A* const block = s + j * width + lane;
      const bool in_window = full_without_mask(scores, task.group, i0, i1, j0 + j, j0 + j + n);
      if constexpr (Score::LINEAR) {
        if (in_window) continue;
      } else if (in_window && n == L::COUNT && has_mask) {
        mask.add(j0 + j, scores->scale, width, block);
        continue;
      }
      typename L::Float x[L::COUNT];
      for (int l = 0; l < L::COUNT; ++l) x[l] = l < n ? L::load(block + l * width) : L::all(0);
      transpose<L>(x);
      for (int l = 0, i = i0, g = first % task.group; l < n_rows; ++l) {
        x[l] = logits<L>(scores[g], x[l], i, j0 + j, n);
        if (++g == task.group) g = 0, ++i;
      }
      transpose<L>(x);
      for (int l = 0; l < n; ++l) L::store(block + l * width, x[l]);
    }
  }
}

// Independent maxima of a row, and half as many sums, to hide the latency of one.
constexpr int SOFTMAX_CHAINS = 4;

// The running maximum m of `unit s`, the running sum of p = 2^(unit s - m), and alpha, what the
// sums so far shrink by. A row without a kept key so far has m = −inf; it is measured from 0, for
// −inf - −inf is nan. tell_masked: no weight of a kept key may underflow to 0, because a weight of
// 0 is to mean masked out.
template <class A>
void update_softmax(int keys, int width, A unit, bool tell_masked, A* s, A* row_max, A* row_sum,
                    A* alpha) {
  using L = Lanes<A>;
  using Float = typename L::Float;
  constexpr int CHAINS = SOFTMAX_CHAINS;
  for (int lane = 0; lane < width; lane += L::COUNT) {
    A* const column = s + lane;
    const int whole = keys / CHAINS * CHAINS;
    Float top[CHAINS], sum[2] = {L::all(0), L::all(0)};
    for (int c = 0; c < CHAINS; ++c) top[c] = L::all(-INFINITY);
    for (int j = 0; j < whole; j += CHAINS)
      for (int c = 0; c < CHAINS; ++c) top[c] = L::max(top[c], L::load(column + (j + c) * width));
    for (int j = whole; j < keys; ++j) top[0] = L::max(top[0], L::load(column + j * width));

    const Float m_old = L::load(row_max + lane);
    const Float m = L::max(m_old, L::max(L::max(top[0], top[1]), L::max(top[2], top[3])) * unit);
    const Float origin = m == -A(INFINITY) ? L::all(0) : m;
    if (tell_masked) {
      const Float lowest = (origin - (Number<A>::BIAS - 2)) / unit;
      for (int j = 0; j < keys; ++j) {
        const Float x = L::load(column + j * width);
        L::store(column + j * width, (x > -A(INFINITY)) & (x < lowest) ? lowest : x);
      }
    }

    const auto weight = [&](int j) {
      const Float p = L::exp2(L::load(column + j * width) * unit - origin);
      L::store(column + j * width, p);
      return p;
    };
    for (int j = 0; j < whole; j += CHAINS)
      for (int c = 0; c < CHAINS; ++c) sum[c % 2] += weight(j + c);
    for (int j = whole; j < keys; ++j) sum[j % 2] += weight(j);

    const Float shrink = L::exp2(m_old - origin);
    L::store(alpha + lane, shrink);
    L::store(row_max + lane, m);
    L::store(row_sum + lane, L::load(row_sum + lane) * shrink + (sum[0] + sum[1]));
  }
}

}  // namespace atx::ATX_TARGET
