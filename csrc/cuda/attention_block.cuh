// What every attention kernel settles before and after its loop over keys: which (batch, head,
// query rows) a block owns, what a logit and its weight are, and how a row's sum becomes its output
// factor and its log-sum-exp.
#pragma once
#include "csrc/core/lanes.h"
#include "csrc/core/params.h"
#include "csrc/core/sequence.h"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t attention_blocks(const AttentionParams& p, int block_q) {
  return (int64_t(p.Sq) + block_q - 1) / block_q * p.Hq * p.B;
}

// A block's rows of a head's sq.
struct BlockRows {
  static constexpr bool GROUPED = false;
  int sq, first;
  __device__ __forceinline__ bool exists(int row) const { return first + row < sq; }
  __device__ __forceinline__ int position(int row) const { return first + row; }
};

// Grid index → rows [q0, q1) of one head. Blocks of one key head are neighbors, so that they share
// K and V in L2. Late rows come first: a causal row sees the more keys the later it is, and the
// longest blocks should not start last.
struct AttentionBlock {
  int b, h, h_kv, q0, q1;
  Sequence seq;

  __device__ __forceinline__ AttentionBlock(const AttentionParams& p, int block_q) {
    const int tiles = int((int64_t(p.Sq) + block_q - 1) / block_q);
    const int block = int(simt::opaque(blockIdx.x)), tile = block % tiles, head = block / tiles;
    b = head / p.Hq;
    h = head % p.Hq;
    h_kv = h / (p.Hq / p.Hkv);
    seq = sequence(p, b);
    q0 = (tiles - 1 - tile) * block_q;
    q1 = q0 + block_q < seq.sq ? q0 + block_q : seq.sq;
  }
  __device__ __forceinline__ BlockRows rows(const AttentionParams&) const { return {seq.sq, q0}; }
};

// The tile of KV keys that comes after the one at kv0 where keys are visited from the last to the
// first: one that queries [q0, q1) see. Negative: none.
template <int KV, class Score>
__device__ __forceinline__ int tile_before(const Score& score, int q0, int q1, int kv0) {
  if constexpr (!Score::SPARSE) {
    return kv0 - KV;
  } else {
    const int end = score.end_before(q0, q1, kv0);
    return end == 0 ? -KV : (end - 1) / KV * KV;
  }
}

// The product x of query i and key j, or -inf where a linear policy masks it out. A masked product
// is replaced, not added to: it may be nan. seen: what seen_pairs says of the pair.
template <class Score>
__device__ __forceinline__ float masked_product(const Score& score, float x, int i, int j,
                                                bool seen) {
  static_assert(Score::LINEAR);
  if constexpr (Score::SPARSE) return seen ? x : -INFINITY;
  // keep says the same of keys that do not exist; asked first, Window's kernels do not spill.
  return j < score.sk && score.template keep<OneLane<float>>(i, j, 1) ? x : -INFINITY;
}

// The exponential of a row's logits: weights are 2^exponent(x), counted from a base that is near
// the row's maximum. Linear policies leave their factor on the products x, and the exponent applies
// it in one fused multiply-add; the base is then log2(e) times a logit. Others count in logits,
// which may be as low as -FLT_MAX: subtracted before multiplied.
//
// A base is the maximum of the first tile in which the row has a key, and is moved only when a
// lane's weights in a tile sum up to more than LIMIT, not whenever there is a larger logit. It
// cancels at the end, and large weights are as exact as small ones. So o is almost never rescaled.
// A row decides by itself, for its bits must not depend on other rows.
template <class Score>
struct Exponential {
  static constexpr float LIMIT = 4096;  // f16 weights end at 65504
  float unit_log2;
  bool negative;  // linear, with a negative scale: turn the sign of Q, so that the maximum product
                  // is the maximum logit

  // The smallest normal number stands for 0, which times a masked -inf would be nan.
  __device__ __forceinline__ explicit Exponential(float scale)
      : unit_log2(fmaxf(fabsf(scale) * LOG2_E, 1.17549435e-38f)),
        negative(Score::LINEAR && scale < 0) {}

  // The base of a row without a key up to now. Of a linear policy it is -inf. Others count from the
  // lowest number: a key's weight is 1, or 2^inf, which is too large, and what is masked out has
  // none, so that it is a base like any. A row beyond the sequence need not wait for a key.
  __device__ __forceinline__ static float start(bool exists) {
    return !exists ? 0.f : Score::LINEAR ? -INFINITY : -3.402823466e38f;
  }
  __device__ __forceinline__ static bool has_none(float base) {
    return Score::LINEAR && base == -INFINITY;
  }
  // To count from in a row whose keys are all masked out: any finite base gives 2^-inf = 0.
  __device__ __forceinline__ static float finite(float base) { return has_none(base) ? 0.f : base; }

  __device__ __forceinline__ float exponent(float x, float base) const {
    if constexpr (Score::LINEAR) return fmaf(x, unit_log2, -base);
    return (x - base) * LOG2_E;
  }
  __device__ __forceinline__ float weight(float x, float base) const {
    return simt::exp2(exponent(x, base));
  }
  __device__ __forceinline__ float base_at(float top) const {
    return Score::LINEAR ? top * unit_log2 : top;
  }
  // What turns weights counted from one base into weights counted from another.
  __device__ __forceinline__ float rebase(float from, float to) const {
    return simt::exp2(Score::LINEAR ? from - to : (from - to) * LOG2_E);
  }
  __device__ __forceinline__ float logit(float base) const {
    return Score::LINEAR ? base / LOG2_E : base;
  }
};

// The end of a row: sum = Σ exp(x - base) over its logits x becomes
// - factor: 1 / Σ exp(x - base), sink included, which turns what o has accumulated into the output
// - lse: log Σ exp(x), sink included
// A row that attends to nothing has base = -inf and sum = 0: its factor is 0 and its lse -inf (the
// sink, if it has one).
struct RowEnd {
  float factor, lse;

  __device__ __forceinline__ RowEnd(float base, float sum, float sink) {
    const float top = fmaxf(base, sink), finite = top == -INFINITY ? 0.f : top;
    const float kept =
        simt::exp2((base - finite) * LOG2_E);  // 1 without a sink, or under a small one
    const float total = sum * kept + simt::exp2((sink - finite) * LOG2_E);
    factor = total == 0.f ? 0.f : kept / total;
    lse = finite + logf(total);
  }
};

__device__ __forceinline__ float sink_of(const AttentionParams& p, const AttentionBlock& block) {
  if (!p.sinks.data) return -INFINITY;
  return static_cast<const float*>(p.sinks.data)[block.b * p.sinks.batch + block.h * p.sinks.head];
}

// Row 0 of this block's sequence and head, or null where no lse is wanted.
__device__ __forceinline__ float* lse_rows(const AttentionParams& p, const AttentionBlock& block) {
  if (!p.lse) return nullptr;
  return static_cast<float*>(p.lse) + block.b * p.lse_batch + block.h * p.lse_head +
         block.seq.q_row;
}

}  // namespace atx::ATX_TARGET
