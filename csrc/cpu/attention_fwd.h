// What the files of the CPU attention forward share: tile sizes and the task.
#pragma once
#include <cmath>
#include <cstring>

#include "csrc/core/blocks.h"
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/core/sequence.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

Status attention_fwd(const AttentionParams& p, const Exec& exec);

// Rows of a task (queries times heads of the group) and keys of a tile. A task converts each tile
// of k and v once, so more rows make that cheaper, until q and o leave the L2 cache; longer tiles
// add to o less often. 192 rows and 64 keys to 384 and 128: 1.04x at D 64, 1.03x at D 128.
constexpr int BLOCK_ROWS = 384, BLOCK_KV = 128;
// Where there are too few tasks for the threads, blocks are halved down to this.
constexpr int SMALLEST_BLOCK_ROWS = 96;

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// Queries [i0, i0 + queries) of every query head of key head hk. Row r is query i0 + r / group of
// head r % group: neighbors in position, so that a window or the causal diagonal cuts through few
// panels.
struct Task {
  const AttentionParams& p;
  Sequence seq;
  int b, hk, group, i0, queries;

  int rows() const { return queries * group; }
  // A group of one is asked for: a division takes as long as ending a row.
  int query(int row) const { return group == 1 ? i0 + row : i0 + row / group; }
  int head(int row) const { return group == 1 ? hk : hk * group + row % group; }
  // The row's place in a [B, Hq, Sq, D] tensor, the key's in a [B, Hkv, Sk, D] tensor.
  int64_t row_offset(const Strides& s, int row) const {
    return row0(s, b, head(row), seq.q_row + query(row));
  }
  int64_t key_offset(const Strides& s, int j) const { return row0(s, b, hk, seq.k_row + j); }
  // ... and in lse and what is laid out as it.
  int64_t lse_offset(int row) const {
    return b * p.lse_batch + head(row) * p.lse_head + seq.q_row + query(row);
  }
};

// The first key from j on that queries [i0, i1) of any head of a group may see, and one past the
// last one before j. Without a block mask all heads see the same range.
template <class Score>
int next_key(const Score* scores, int group, int i0, int i1, int j) {
  int next = scores->next_key(i0, i1, j);
  for (int g = 1; Score::SPARSE && g < group; ++g) {
    const int other = scores[g].next_key(i0, i1, j);
    if (other < next) next = other;
  }
  return next;
}
template <class Score>
int end_before(const Score* scores, int group, int i0, int i1, int j) {
  int end = scores->end_before(i0, i1, j);
  for (int g = 1; Score::SPARSE && g < group; ++g) {
    const int other = scores[g].end_before(i0, i1, j);
    if (other > end) end = other;
  }
  return end;
}

// Whether queries [i0, i1) of all of them keep all of the keys [j0, j1).
template <class Score>
bool full(const Score* scores, int group, int i0, int i1, int j0, int j1) {
  bool kept = scores->full(i0, i1, j0, j1);
  for (int g = 1; Score::SPARSE && g < group; ++g) kept &= scores[g].full(i0, i1, j0, j1);
  return kept;
}

// The part of a policy that depends on positions alone.
template <class Score>
ATX_HD const Score& without_mask(const Score& score) {
  return score;
}
template <class A>
ATX_HD const Window<A>& without_mask(const General<A>& score) {
  return score;
}
// Whether all heads of a group keep all of these pairs by position.
template <class Score>
bool full_without_mask(const Score* scores, int group, int i0, int i1, int j0, int j1) {
  if constexpr (Score::SPARSE) return full(scores, group, i0, i1, j0, j1);
  return without_mask(*scores).full(i0, i1, j0, j1);
}

// Keys [begin, end), multiplied at once.
struct Stretch {
  int begin, end;
};
// The first stretch of the keys [j0, j1) that queries [i0, i1) may see; empty: they see none. With
// a block mask it ends with a block, so that what a query's keys are multiplied with at once does
// not depend on other queries.
template <class Score>
Stretch next_stretch(const Score* scores, int group, int i0, int i1, int j0, int j1) {
  const int begin = next_key(scores, group, i0, i1, j0);
  if constexpr (Score::SPARSE) {
    const int end = scores->block_end(begin);
    return {begin, end < j1 ? end : j1};
  } else {
    return {begin, scores->end_before(i0, i1, j1)};
  }
}

// What powers of two measure the logits in: of the raw products where the policy is linear.
template <class A, class Score>
A log2_unit(const AttentionParams& p) {
  return A(Score::LINEAR ? p.scale * LOG2_E : LOG2_E);
}

}  // namespace atx::ATX_TARGET
