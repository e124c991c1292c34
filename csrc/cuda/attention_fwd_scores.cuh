// A warp's share of the scores in a forward on tensor cores: some rows of S = Q Kᵀ for some of a
// tile's keys, and the weights of these, in registers.
#pragma once
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/grid_logits.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/seen.cuh"
#include "csrc/cuda/split.cuh"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile_, class Score_>
struct ScoreWarp {
  using Tile = Tile_;
  using Score = Score_;
  using T = typename Tile::T;
  // KV: the keys of a tile that are this warp's, with rows of its own all of them.
  static constexpr int M = Tile::M, D = Tile::D, DV = Tile::DV, K = K_STEP<T>;
  static constexpr int KV = Tile::BLOCK_KV / (Tile::WARPS / Tile::ROW_WARPS);
  using QTile = SmemTile<T, Tile::BLOCK_Q, D>;
  using KTile = SmemTile<T, Tile::BLOCK_KV, D>;
  using Rows = typename Owned<Tile>::Rows;
  using Weights = uint32_t[KV / K][M][4];

  const Score& score;
  const Rows rows;
  const FragmentAddress<QTile> q_address;
  const FragmentAddress<KTile, Order::ACROSS> k_address;
  const Exponential<Score> exponential;

  int kept_position[2];  // of this lane's rows, where these take a division to find
  uint32_t q_frag[Tile::Q_IN_REGISTERS ? D / K : 1][M][4];
  float base[M][2], sum[M][2];  // of the exponents; Σ 2^exponent over this lane's columns

  __device__ __forceinline__ ScoreWarp(const QTile& q, const KTile& k, const Score& score,
                                       const Rows& rows, Exponential<Score> exponential)
      : score(score),
        rows(rows),
        q_address(q, first_row(), lane()),
        k_address(k, first_key(), lane()),
        exponential(exponential) {
    forget_keys();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row() + m * 16 + simt::c_place(lane(), 2 * r).row;
        if (Rows::GROUPED) kept_position[r] = rows.position(row);
      }
    }
  }

  // As if none had been seen.
  __device__ __forceinline__ void forget_keys() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row() + m * 16 + simt::c_place(lane(), 2 * r).row;
        base[m][r] = Exponential<Score>::start(rows.exists(row));
        sum[m][r] = 0;
      }
    }
  }

  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int warp() { return int(threadIdx.x / 32); }
  __device__ __forceinline__ static int first_row() {
    if (Tile::ROW_WARPS == 1) return 0;
    return (Tile::ROW_WARPS == Tile::WARPS ? warp() : warp() % Tile::ROW_WARPS) * 16 * M;
  }  // of the block's rows
  __device__ __forceinline__ static int first_key() {
    return Tile::ROW_WARPS == Tile::WARPS ? 0 : warp() / Tile::ROW_WARPS * KV;
  }  // of a tile's keys
  __device__ __forceinline__ static void load_q(uint32_t (&a)[M][4],
                                                const FragmentAddress<QTile>& q, int col) {
#pragma unroll
    for (int m = 0; m < M; ++m) simt::ldmatrix_x4(a[m], q.at(m * 16, col));
  }

  __device__ __forceinline__ void keep_q() {
    if constexpr (Tile::Q_IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < D / K; ++k) load_q(q_frag[k], q_address, k * K);
    }
  }

  // s = Q Kᵀ, of the tile of keys that lies `tile` tiles after the first.
  __device__ __forceinline__ void products(float (&s)[M][KV / 8][4], int tile = 0) const {
    const auto q = q_address.here();
    const auto keys = k_address.here(tile);
    // Unrolled more, General's loads of D 256 are moved up until registers run out, and those of D
    // 192 where DV is 128.
#pragma unroll(D == DV && (Score::LINEAR || D <= 192) ? D / K : 4)
    for (int k = 0; k < D / K; ++k) {
      if constexpr (Tile::Q_IN_REGISTERS) {
        multiply_nt(s, q_frag[k], keys, k * K);
      } else {
        uint32_t a[M][4];
        load_q(a, q, k * K);
        multiply_nt(s, a, keys, k * K);
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
  // The same of policies that are not linear, from a start that is unknown to the compiler: what
  // follows from it, for options that a call may not have, is not moved out of the loop.
  __device__ __forceinline__ auto places(int kv0) const {
    const Pair start = pair(0, 0, kv0);
    const int i = simt::opaque(start.i), j = simt::opaque(start.j);
    return [=](int r, int c) { return Pair{i + r / 2 * 16 + r % 2 * 8, j + c / 2 * 8 + c % 2}; };
  }
  __device__ __forceinline__ uint64_t seen(int kv0) const {
    const Pair from = {rows.first + first_row(), kv0 + first_key()};
    return seen_pairs<2 * M, KV / 4, false>(score, from, Pair{from.i + 16 * M, from.j + KV},
                                            [&](int r, int c) { return pair(r, c, kv0); });
  }

  // Of a mask: none on its way.
  using MaskPairs = MaskWords<2 * M, KV / 4>;

  // s ← logits, but for a linear policy's factor; -inf where masked out. Not MASKED, of a linear
  // policy: nothing is; of others: a product that is nan may stay nan where it is.
  template <bool MASKED, class Words = MaskPairs>
  __device__ __forceinline__ void logits(float (&s)[M][KV / 8][4], int kv0, uint64_t seen,
                                         const Words& words = {}) const {
    constexpr int ROWS = 2 * M, COLS = KV / 4;
    const auto at = [&](int r, int c) -> float& { return s[r / 2][c / 2][r % 2 * 2 + c % 2]; };
    if constexpr (!Score::LINEAR) {
      const int i0 = simt::opaque(rows.first + first_row()), j0 = kv0 + first_key();
      grid_logits<T, ROWS, COLS, MASKED>(score, rows.sq, Pair{i0, j0}, Pair{i0 + 16 * M, j0 + KV},
                                         seen, words, at, places(kv0));
    } else if constexpr (MASKED) {
      // In the order of C's elements: row by row, Blocks' kernels of D 128 spilled.
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = 2 * m + e / 2, c = 2 * n + e % 2;
            const auto [i, j] = pair(r, c, kv0);
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
        const float from = MASKED ? exponential.finite(base[m][r]) : base[m][r];
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
  // Of a policy that masks in plain tiles too, nan as well: it may be of a key that is masked out.
  __device__ __forceinline__ static bool too_large(const float (&part)[M][2]) {
    constexpr float LIMIT = Exponential<Score>::LIMIT;
    bool found = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        found |= Score::LINEAR ? part[m][r] > LIMIT : !(part[m][r] <= LIMIT);
    }
    return found;
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
      const uint32_t kept =
          kept_pairs<Calls<ROWS, COLS, false, 2>>(p, block.b, block.h, places(kv0));
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

  __device__ __forceinline__ static void pack(Weights& p, const float (&s)[M][KV / 8][4]) {
#pragma unroll
    for (int k = 0; k < KV / K; ++k) {
#pragma unroll
      for (int m = 0; m < M; ++m) to_operand<T>(p[k][m], s[m], k);
    }
  }
};

}  // namespace atx::ATX_TARGET
