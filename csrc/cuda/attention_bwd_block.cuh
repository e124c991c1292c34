// What every pass of the backward settles outside its products: which rows a block owns, which it
// walks over, and what a pair (i, j) of a query and a key passes on, from its product x = q_i · k_j
// and the gradient of its weight, dO_i · v_j:
//
//   P = exp(Y - lse),  dY = P (M (dO_i · v_j) - delta),  dX = dY · dY/dX
#pragma once
#include "csrc/core/score.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/seen.cuh"

namespace atx::ATX_TARGET {

// Grid index → rows [first, first + block) of one side of one head: of a query head, or of a key
// head, whose gradients sum over the query heads [h0, h1) that read it.
struct BwdBlock {
  int b, h_kv, h0, h1, first;
  Sequence seq;

  __device__ __forceinline__ BwdBlock(const AttentionParams& p, int block, bool keys) {
    const int tiles = int((int64_t(keys ? p.Sk : p.Sq) + block - 1) / block);
    const int heads = keys ? p.Hkv : p.Hq, group = p.Hq / p.Hkv;
    const int index = int(simt::opaque(blockIdx.x)), tile = index % tiles, head = index / tiles;
    b = head / heads;
    const int h = head % heads;
    h_kv = keys ? h : h / group;
    h0 = keys ? h * group : h;
    h1 = keys ? h0 + group : h + 1;
    seq = sequence(p, b);
    // The longest blocks should not start last: late queries, early keys, where a mask is causal.
    first = (keys ? tile : tiles - 1 - tile) * block;
  }
};

inline int64_t bwd_blocks(const AttentionParams& p, int block, bool keys) {
  const int64_t rows = keys ? p.Sk : p.Sq;
  return (rows + block - 1) / block * (keys ? p.Hkv : p.Hq) * p.B;
}

// What a query's pairs need to know of it. base: its log-sum-exp, times log2(e) for linear
// policies, -inf where the row attends to nothing or does not exist.
struct alignas(8) RowStat {
  float base, delta;
};

// Where query 0 of one (sequence, head) is in a tensor of lse's layout.
__device__ __forceinline__ int64_t head_offset(const AttentionParams& p, const Sequence& seq, int b,
                                               int h) {
  return b * p.lse_batch + h * p.lse_head + seq.q_row;
}

// Of the query at an offset in lse's layout.
template <class Score>
__device__ __forceinline__ RowStat row_stat(const AttentionBwdParams& p, int64_t at, bool exists) {
  if (!exists) return {-INFINITY, 0};
  const float lse = static_cast<const float*>(p.fwd.lse)[at];
  return {Score::LINEAR ? lse * LOG2_E : lse, static_cast<const float*>(p.delta)[at]};
}

// Steps of STEP rows [first, last), multiples of STEP but for the end, that hold every partner of
// the rows [own0, own1).
struct Steps {
  int first, last;
};

template <int STEP, class Score>
__device__ __forceinline__ Steps key_steps(const Score& score, int i0, int i1) {
  const int begin = score.kv_begin(i0, i1), end = score.kv_end(i0, i1);
  return {begin / STEP * STEP, begin < end ? end : begin / STEP * STEP};
}

// Later queries see later keys, so both ends can be found by bisection.
template <int STEP, class Score>
__device__ __forceinline__ Steps query_steps(const Score& score, int j0, int j1, int sq) {
  const auto step_end = [&](int n) { return n * STEP + STEP < sq ? n * STEP + STEP : sq; };
  const auto first_where = [](int lo, int hi, auto condition) {
    while (lo < hi) {
      const int middle = lo + (hi - lo) / 2;
      if (condition(middle))
        hi = middle;
      else
        lo = middle + 1;
    }
    return lo;
  };
  const int steps = int((int64_t(sq) + STEP - 1) / STEP);
  const int first =
      first_where(0, steps, [&](int n) { return score.kv_end(n * STEP, step_end(n)) > j0; });
  const int last =
      first_where(first, steps, [&](int n) { return score.kv_begin(n * STEP, step_end(n)) >= j1; });
  return {first * STEP, last > first ? step_end(last - 1) : first * STEP};
}

// A pair's gradients. weight: M P, dV's share of dO. logit: dY. product: dX, but for a linear
// policy's factor.
struct PairGradient {
  float weight, logit, product;
};

template <class Score>
struct Pairs {
  const Score& score;
  const int sq;
  const float unit_log2;  // linear: log2(e) · scale
  const float kept;       // what dropout multiplies the weights by that it keeps

  __device__ __forceinline__ Pairs(const Score& score, const AttentionParams& p, int sq)
      : score(score), sq(sq), unit_log2(float(p.scale) * LOG2_E), kept(kept_factor<float>(p)) {}

  // The factor of every dX that product leaves out.
  __device__ __forceinline__ static float unit(const AttentionParams& p) {
    return Score::LINEAR ? float(p.scale) : 1.f;
  }

  // MASKED: the pair may be masked out, or not exist. It then passes on 0, whatever x and d_weight
  // are. keeps: dropout does. seen: what seen_pairs says of the pair.
  template <bool MASKED>
  __device__ __forceinline__ PairGradient gradient(float x, float d_weight, int i, int j,
                                                   RowStat row, bool keeps, bool seen) const {
    using Lane = OneLane<float>;
    bool attends = true;
    float y = x;
    if constexpr (MASKED) {
      // A query that does not exist has the base of one that attends to nothing.
      attends = (j < score.sk) & (row.base != -INFINITY);
      if constexpr (!Score::LINEAR) {
        // The policy may read a mask: no further than its end.
        i = i < sq ? i : sq - 1;
        j = j < score.sk ? j : score.sk - 1;
      }
      if constexpr (Score::SPARSE)
        attends &= seen;
      else
        attends &= bool(score.template keep<Lane>(i, j, 1));
    }
    if constexpr (!Score::LINEAR) {
      y = MASKED ? score.template score<Lane>(x, i, j, 1) : full_logit(score, x, i, j);
      if (MASKED) attends &= y != -INFINITY;
    }
    float p = simt::exp2(Score::LINEAR ? fmaf(x, unit_log2, -row.base) : (y - row.base) * LOG2_E);
    if (!Score::LINEAR) d_weight = keeps ? d_weight * kept : 0.f;
    float logit = p * (d_weight - row.delta), product = logit;
    if constexpr (!Score::LINEAR) {
      product = logit * score.template derivative<Lane>(x);
      p = keeps ? p * kept : 0.f;
    }
    return {attends ? p : 0.f, attends ? logit : 0.f, attends ? product : 0.f};
  }
};

}  // namespace atx::ATX_TARGET
