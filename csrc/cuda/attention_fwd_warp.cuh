// A warp's share of the forward on tensor cores (attention_fwd.cuh): its rows of S = Q Kᵀ, their
// weights, and their sums with V, in registers.
#pragma once
#include "csrc/cuda/attention_fwd_scores.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
struct FwdSmem {
  SmemTile<typename Tile::T, Tile::BLOCK_Q, Tile::D> q;  // at the end, the output on its way out
  SmemTile<typename Tile::T, Tile::BLOCK_KV, Tile::D> k;
  SmemTile<typename Tile::T, Tile::BLOCK_KV, Tile::DV> v;

  // In K's place.
  __device__ __forceinline__ auto& v_marks() {
    static_assert(sizeof(v) <= sizeof(k));
    return reinterpret_cast<decltype(v)&>(k);
  }
};

// A warp's view of its block.
template <class Tile, class Score>
struct AttentionWarp : ScoreWarp<Tile, Score> {
  using Base = ScoreWarp<Tile, Score>;
  using Base::base, Base::exponential, Base::first_key, Base::first_row, Base::lane, Base::rows,
      Base::score, Base::sum;
  using Base::D, Base::DV, Base::K, Base::KV, Base::M;
  using typename Base::T, typename Base::Rows, typename Base::Weights;
  using Smem = FwdSmem<Tile>;

  Smem& smem;
  const DownAddress<decltype(Smem::v)> v_address;
  float o[M][DV / 8][4] = {};  // Σ 2^exponent v

  __device__ __forceinline__ AttentionWarp(Smem& smem, const Score& score, const Rows& rows,
                                           Exponential<Score> exponential)
      : Base(smem.q, smem.k, score, rows, exponential),
        smem(smem),
        v_address(smem.v, first_key(), lane()) {}

  // Whether no row of this warp sees a key of the tile.
  __device__ __forceinline__ bool is_idle(int kv0) const {
    if (!Score::LINEAR) return false;  // not worth the registers there
    if (Tile::SPLIT) return false;     // its warps have the same rows: none has less to do
    // Of a pair, found again, not kept: Window's kernel was a register short on sm_90a.
    const int thread = int(D == DV ? threadIdx.x : simt::opaque(threadIdx.x));
    const int i = rows.position(thread / 32 * 16 * M), i1 = i + 16 * M;
    if constexpr (Score::SPARSE) return i >= rows.sq || score.next_key(i, i1, kv0) >= kv0 + KV;
    return i >= rows.sq || score.kv_end(i, i1) <= kv0 || score.kv_begin(i, i1) >= kv0 + KV;
  }

  // The same as weigh for a policy that is not linear, from logits: each row's base is moved first,
  // if it has to be. Most need not: their first weights stay, where there are registers for both.
  __device__ __forceinline__ void weigh_logits(float (&s)[M][KV / 8][4], float (&part)[M][2]) {
    if constexpr (D > 192) {
      move_bases(s);
      return this->template weigh<true>(s, part);
    }
    float x[M][KV / 8][4];
    Base::copy(x, s);
    this->template weigh<true>(x, part);
    bool moves = Base::too_large(part);
#pragma unroll
    for (int m = 0; m < M; ++m) moves |= base[m][0] == -INFINITY || base[m][1] == -INFINITY;
    if (simt::any(moves)) {
      move_bases(s);
      Base::copy(x, s);
      this->template weigh<true>(x, part);
    }
    Base::copy(s, x);
  }

  // Moves the base of each row whose weights, counted from it, would be too large: weigh's
  // condition.
  __device__ __forceinline__ void move_bases(const float (&s)[M][KV / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY, part = 0;
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            top = fmaxf(top, s[m][n][e]);
            part += exponential.weight(s[m][n][e], base[m][r]);
          }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          top = fmaxf(top, simt::shfl_xor(top, mask));
          part = fmaxf(part, simt::shfl_xor(part, mask));
        }
        const bool move =
            base[m][r] == -INFINITY ? top > -INFINITY : part > Exponential<Score>::LIMIT;
        if (!move) continue;
        const float to = exponential.base_at(top), factor = exponential.rebase(base[m][r], to);
        base[m][r] = to;
        sum[m][r] *= factor;
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
          o[m][n][2 * r] *= factor;
          o[m][n][2 * r + 1] *= factor;
        }
      }
    }
  }

  // o += P V
  __device__ __forceinline__ void accumulate(const Weights& p) {
    const auto values = v_address.here();
#pragma unroll
    for (int k = 0; k < KV / K; ++k) multiply_nn(o, p[k], values, k * K);
  }

  // Rows of o, divided by their sums, to this warp's rows of smem.q; their lse to memory.
  __device__ __forceinline__ void finish(const AttentionBlock& block, float sink, float* lse) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[m][r];
        total += simt::shfl_xor(total, 1);
        total += simt::shfl_xor(total, 2);
        const RowEnd end(exponential.logit(base[m][r]), total, sink);
        const simt::Place at = simt::c_place(lane(), 2 * r);
        const int row = first_row() + m * 16 + at.row;
        if (lse && at.col == 0 && block.q0 + row < block.seq.sq) lse[block.q0 + row] = end.lse;
        store_sums(smem.q, row, o[m], r, end.factor);
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
