// A warp's share of the forward on tensor cores (attention_fwd.cuh): its rows of S = Q Kᵀ, their
// weights, and their sums with V, in registers.
#pragma once
#include "csrc/cuda/attention_fwd_scores.cuh"
#include "csrc/cuda/mask_tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile, bool = Tile::STAGES_MASK>
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
template <class Tile>
struct FwdSmem<Tile, true> : FwdSmem<Tile, false> {
  MaskTile<Tile::BLOCK_Q, Tile::BLOCK_KV> mask;
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

  __device__ __forceinline__ void start_again() {
    Base::forget_keys();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < DV / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][n][e] = 0;
      }
    }
  }

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

  static constexpr bool STAGES_MASK = Tile::STAGES_MASK && !Score::LINEAR && !Score::SPARSE;
  // The share of a mask in the tile of keys at kv0, all of which exist, on its way to shared
  // memory.
  __device__ __forceinline__ void load_mask(int kv0) const {
    if constexpr (STAGES_MASK)
      if (is_staged(score))
        load_mask_tile<Tile::THREADS>(smem.mask, score.mask, rows.first, rows.sq, kv0);
  }
  // It, once it has landed; or what lanes load by themselves.
  __device__ __forceinline__ auto mask_of(int kv0) const {
    if constexpr (STAGES_MASK) {
      return StagedMask<M, KV, decltype(smem.mask)>{smem.mask, is_staged(score), first_row(),
                                                    first_key()};
    } else {
      typename Base::MaskPairs words;
      // Few queries' D 256 has no registers to load them ahead.
      if constexpr (!Score::LINEAR && !(Tile::SPLIT && D > 128))
        atx::ATX_TARGET::load_mask(words, score, rows.sq, Base::places(kv0));
      return words;
    }
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
            exponential.has_none(base[m][r]) ? top > -INFINITY : part > Exponential<Score>::LIMIT;
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

  // Whether everything summed up so far is a number.
  __device__ __forceinline__ bool is_finite() const {
    float zeros = 0;  // or nan
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < DV / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) zeros = fmaf(o[m][n][e], 0.f, zeros);
      }
    }
    return zeros == 0.f;
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
