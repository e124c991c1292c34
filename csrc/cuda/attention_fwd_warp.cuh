// A warp's share of the forward on tensor cores (attention_fwd.cuh): its rows of S = Q Kᵀ, their
// weights, and their sums with V, in registers.
#pragma once
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/grid_logits.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/seen.cuh"
#include "csrc/cuda/split.cuh"
#include "csrc/cuda/tile.cuh"

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
struct AttentionWarp {
  using T = typename Tile::T;
  // KV: the keys of a tile that are this warp's, with rows of its own all of them.
  static constexpr int M = Tile::M, D = Tile::D, DV = Tile::DV;
  static constexpr int KV = Tile::SPLIT ? Tile::BLOCK_KV / Tile::WARPS : Tile::BLOCK_KV;
  using Smem = FwdSmem<Tile>;
  using Rows = typename Owned<Tile>::Rows;

  Smem& smem;
  const Score& score;
  const Rows rows;
  const FragmentAddress<decltype(Smem::q)> q_address;
  const FragmentAddress<decltype(Smem::k), Order::ACROSS> k_address;
  const FragmentAddress<decltype(Smem::v)> v_address;
  const Exponential<Score> exponential;

  int kept_position[2];  // of this lane's rows, where these take a division to find
  uint32_t q_frag[Tile::Q_IN_REGISTERS ? D / 16 : 1][M][4];
  float o[M][DV / 8][4] = {};        // Σ 2^exponent v
  float base[M][2], sum[M][2] = {};  // of the exponents; Σ 2^exponent over this lane's columns

  __device__ __forceinline__ AttentionWarp(Smem& smem, const Score& score, const Rows& rows,
                                           Exponential<Score> exponential)
      : smem(smem),
        score(score),
        rows(rows),
        q_address(smem.q, first_row(), lane()),
        k_address(smem.k, first_key(), lane()),
        v_address(smem.v, first_key(), lane()),
        exponential(exponential) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // No key yet. A row beyond the sequence need not wait for one.
        const int row = first_row() + m * 16 + simt::c_place(lane(), 2 * r).row;
        base[m][r] = rows.exists(row) ? -INFINITY : 0.f;
        if (Rows::GROUPED) kept_position[r] = rows.position(row);
      }
    }
  }

  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int first_row() {
    return Tile::SPLIT ? 0 : int(threadIdx.x / 32 * 16 * M);
  }  // of the block's rows
  __device__ __forceinline__ static int first_key() {
    return Tile::SPLIT ? int(threadIdx.x / 32 * KV) : 0;
  }  // of a tile's keys
  __device__ __forceinline__ static void load_q(uint32_t (&a)[M][4],
                                                const FragmentAddress<decltype(Smem::q)>& q,
                                                int col) {
#pragma unroll
    for (int m = 0; m < M; ++m) simt::ldmatrix_x4(a[m], q.at(m * 16, col));
  }

  __device__ __forceinline__ void keep_q() {
    if constexpr (Tile::Q_IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) load_q(q_frag[k], q_address, k * 16);
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

  // s = Q Kᵀ
  __device__ __forceinline__ void products(float (&s)[M][KV / 8][4]) const {
    const auto q = q_address.here();
    const auto keys = k_address.here();
    // Unrolled more, General's loads of D 256 are moved up until registers run out, and those of D
    // 192 where DV is 128.
    constexpr bool ALL = D == DV && (Score::LINEAR || D <= 192);
#pragma unroll(ALL ? D / 16 : 4)
    for (int k = 0; k < D / 16; ++k) {
      if constexpr (Tile::Q_IN_REGISTERS) {
        multiply_nt(s, q_frag[k], keys, k * 16);
      } else {
        uint32_t a[M][4];
        load_q(a, q, k * 16);
        multiply_nt(s, a, keys, k * 16);
      }
    }
  }

  // Of row r of this lane's 2 M.
  __device__ __forceinline__ int position(int r) const {
    if (Rows::GROUPED) return kept_position[r];
    return rows.position(first_row() + r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row);
  }
  // Pair (r, c) of this lane's 2 M x KV / 4 of a tile; its score is s[r / 2][c / 2][r % 2 * 2 + c %
  // 2].
  __device__ __forceinline__ Pair pair(int r, int c, int kv0) const {
    return {position(r), kv0 + first_key() + c / 2 * 8 + simt::c_place(lane(), c % 2).col};
  }
  __device__ __forceinline__ uint64_t seen(int kv0) const {
    return seen_pairs<2 * M, KV / 4>(score, [&](int r, int c) { return pair(r, c, kv0); });
  }

  // s ← logits, but for a linear policy's factor; -inf where masked out.
  template <bool MASKED>
  __device__ __forceinline__ void logits(float (&s)[M][KV / 8][4], int kv0, uint64_t seen) const {
    constexpr int ROWS = 2 * M, COLS = KV / 4;
    const auto at = [&](int r, int c) -> float& { return s[r / 2][c / 2][r % 2 * 2 + c % 2]; };
    const auto place = [&](int r, int c) { return pair(r, c, kv0); };
    if constexpr (!Score::LINEAR) {
      const int i0 = rows.first + first_row(), j0 = kv0 + first_key();
      grid_logits<T, ROWS, COLS, true>(score, rows.sq, Pair{i0, j0}, Pair{i0 + 16 * M, j0 + KV},
                                       seen, at, place);
    } else if constexpr (MASKED) {
      // In the order of C's elements: row by row, Blocks' kernels of D 128 spilled.
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = 2 * m + e / 2, c = 2 * n + e % 2;
            const auto [i, j] = place(r, c);
            s[m][n][e] = masked_product(score, s[m][n][e], i, j, seen >> (r * COLS + c) & 1);
          }
        }
      }
    }
  }

  // s ← weights; part ← Σ of them, of this lane's columns.
  template <bool MASKED>
  __device__ __forceinline__ void weigh(float (&s)[M][KV / 8][4], float (&part)[M][2]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row without a key up to now: any finite base gives 2^-inf = 0.
        const float from = MASKED && base[m][r] == -INFINITY ? 0.f : base[m][r];
        part[m][r] = 0;
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e)
            part[m][r] += s[m][n][e] = exponential.weight(s[m][n][e], from);
        }
      }
    }
  }

  __device__ __forceinline__ static void copy(float (&to)[M][KV / 8][4],
                                              const float (&from)[M][KV / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) to[m][n][e] = from[m][n][e];
      }
    }
  }
  // The same as weigh for a policy that is not linear, from logits: each row's base is moved first,
  // if it has to be. Most need not: their first weights stay, where there are registers for both.
  __device__ __forceinline__ void weigh_logits(float (&s)[M][KV / 8][4], float (&part)[M][2]) {
    if constexpr (D > 192) {
      move_bases(s);
      return weigh<true>(s, part);
    }
    float x[M][KV / 8][4];
    copy(x, s);
    weigh<true>(x, part);
    bool moves = too_large(part);
#pragma unroll
    for (int m = 0; m < M; ++m) moves |= base[m][0] == -INFINITY || base[m][1] == -INFINITY;
    if (simt::any(moves)) {
      move_bases(s);
      copy(x, s);
      weigh<true>(x, part);
    }
    copy(s, x);
  }

  __device__ __forceinline__ static bool too_large(const float (&part)[M][2]) {
    bool found = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      found |= part[m][0] > Exponential<Score>::LIMIT;
      found |= part[m][1] > Exponential<Score>::LIMIT;
    }
    return found;
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

  __device__ __forceinline__ void add(const float (&part)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sum[m][0] += part[m][0];
      sum[m][1] += part[m][1];
    }
  }

  // s ← what dropout leaves of the weights, after their sums were taken.
  __device__ __forceinline__ void drop(float (&s)[M][KV / 8][4], const AttentionParams& p,
                                       int kv0) const {
    if constexpr (!Score::LINEAR) {
      if (!(p.dropout > 0)) return;
      constexpr int ROWS = 2 * M, COLS = KV / 4;
      const typename Owned<Tile>::Block block(p, Tile::BLOCK_Q);  // found again, not kept
      const uint32_t kept = kept_pairs<Calls<ROWS, COLS, false, 2>>(
          p, block.b, block.h, [&](int r, int c) { return pair(r, c, kv0); });
      const float factor = kept_factor<float>(p);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
          float& weight = s[r / 2][c / 2][r % 2 * 2 + c % 2];
          weight = kept >> (r * COLS + c) & 1 ? weight * factor : 0.f;
        }
      }
    }
  }

  __device__ __forceinline__ static void pack(uint32_t (&p)[KV / 16][M][4],
                                              const float (&s)[M][KV / 8][4]) {
#pragma unroll
    for (int k = 0; k < KV / 16; ++k) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &s[m][2 * k + i / 2][i % 2 * 2];
          p[k][m][i] = simt::pack2<T>(pair[0], pair[1]);
        }
      }
    }
  }

  // o += P V
  __device__ __forceinline__ void accumulate(const uint32_t (&p)[KV / 16][M][4]) {
    const auto values = v_address.here();
#pragma unroll
    for (int k = 0; k < KV / 16; ++k) multiply_nn(o, p[k], values, k * 16);
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
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
          const uint32_t pair =
              simt::pack2<T>(o[m][n][2 * r] * end.factor, o[m][n][2 * r + 1] * end.factor);
          reinterpret_cast<uint32_t&>(smem.q.at(row, n * 8 + at.col)) = pair;
        }
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
