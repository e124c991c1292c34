// What every pass of the backward settles outside its products: which rows a block owns, which it
// walks over, and what a pair (i, j) of a query and a key passes on, from its product x = q_i · k_j
// and the gradient of its weight, dO_i · v_j:
//
//   P = exp(Y - lse),  dY = P (M (dO_i · v_j) - delta),  dX = dY · dY/dX
#pragma once
#include "csrc/core/score.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/grid_logits.cuh"
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

// Where steps start whose pairs with queries [i0, i1) the window holds, all of them.
template <int STEP>
__device__ __forceinline__ Steps full_key_steps(const Window<float>& window, int i0, int i1) {
  return {window.full_from(i1), i0 + window.hi - STEP + 2};
}
// The same of queries, with keys [j0, j1).
template <int STEP>
__device__ __forceinline__ Steps full_query_steps(const Window<float>& window, int j0, int j1) {
  if (j1 > window.sk) return {0, 0};
  return {j1 - 1 - window.hi, j0 - window.lo - STEP + 2};
}

// A pair's gradients under a linear policy. weight: P, dV's share of dO. product: dX, but for the
// policy's factor.
struct PairGradient {
  float weight, product;
};

// x: the pair's product. attends: its query does to its key; it otherwise passes on 0, whatever x
// and d_weight are.
__device__ __forceinline__ PairGradient pair_gradient(float unit_log2, float x, float d_weight,
                                                      RowStat row, bool attends) {
  const float p = simt::exp2(fmaf(x, unit_log2, -row.base)), product = p * (d_weight - row.delta);
  return {attends ? p : 0.f, attends ? product : 0.f};
}

// Of a grid of pairs under any other policy, for operands of type T: y, the products X, becomes
// M P, and d, dW, becomes dY; 0 where a query does not attend to a key. seen, from, to, place,
// NEIGHBORS: grid_logits'. kept: what dropout keeps. stat(r, c): of the query.
template <class T, int ROWS, int COLS, bool NEIGHBORS, class Score, class Seen, class Y, class D,
          class Place, class Stat>
__device__ __forceinline__ void grid_gradients(const AttentionParams& p, const Score& score, int sq,
                                               Pair from, Pair to, Seen seen, uint32_t kept, Y y,
                                               D d, Place place, Stat stat) {
  grid_logits<T, ROWS, COLS, NEIGHBORS>(score, sq, from, to, seen, y, place);
  const float factor = kept_factor<float>(p);
  for_grid<ROWS, COLS>([&](int r, int c) {
    const RowStat row = stat(r, c);
    const bool keeps = kept >> (r * COLS + c) & 1;
    // A query that does not exist has the base of one that attends to nothing.
    const bool attends = (y(r, c) != -INFINITY) & (row.base != -INFINITY);
    const float weight = simt::exp2((y(r, c) - row.base) * LOG2_E);
    const float d_weight = keeps ? d(r, c) * factor : 0.f;
    y(r, c) = attends & keeps ? weight * factor : 0.f;
    d(r, c) = attends ? weight * (d_weight - row.delta) : 0.f;
  });
}

}  // namespace atx::ATX_TARGET
