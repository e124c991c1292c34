// The products of a backward pass on tensor cores, for bf16, f16 and tf32: a warp's view of its
// block. It owns 16 M rows of the block, with no exchange between warps: what the first products
// leave in C registers, for each pair of a row and a partner, is the A operand of the second.
//
// - lane: the pairs of fragment.h's C layout; row r of ROWS and column c of COLS of its own grid
#pragma once
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile_>
struct BwdWarp {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int M = Tile::M, D = Tile::D, DV = Tile::DV, STEP = Tile::STEP,
                       HELD = Tile::HELD;
  static constexpr int K = K_STEP<T>, ROWS = 2 * M, COLS = STEP / 4;

  struct Smem {
    SmemTile<T, Tile::BLOCK, D> own[2];  // at the end, their gradients on the way out
    SmemTile<T, STEP, D> other[2 * Tile::STAGES];
  };
  using OwnTile = SmemTile<T, Tile::BLOCK, D>;
  using OtherTile = SmemTile<T, STEP, D>;
  // Whether columns 2n and 2n + 1 are neighboring rows of the other.
  static constexpr bool NEIGHBORS = true;
  using Products = float[M][STEP / 8][4];
  template <int COLS>
  using Sums = float[M][COLS / 8][4];
  using SumsA = Sums<D>;
  using SumsB = Sums<DV>;
  static constexpr int COPIERS = Tile::THREADS;

  Smem& smem;
  uint32_t held[HELD ? HELD : 1][D / K][M][4];  // own[0 ... HELD) as A operands
  const FragmentAddress<OwnTile> own;
  const FragmentAddress<OtherTile, Order::ACROSS> across;
  const DownAddress<OtherTile> down;

  __device__ __forceinline__ explicit BwdWarp(Smem& smem)
      : smem(smem),
        own(smem.own[0], first_row(), lane()),
        across(smem.other[0], 0, lane()),
        down(smem.other[0], 0, lane()) {}

  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int first_row() { return int(threadIdx.x / 32 * 16 * M); }
  // Where the grid lies in the block's tile of pairs.
  __device__ __forceinline__ static int row(int r) {
    return first_row() + r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row;
  }
  __device__ __forceinline__ static int col(int c) {
    return c / 2 * 8 + simt::c_place(lane(), c % 2).col;
  }
  __device__ __forceinline__ static float& at(Products& s, int r, int c) {
    return s[r / 2][c / 2][r % 2 * 2 + c % 2];
  }
  // Σ over the lanes that share row r.
  __device__ __forceinline__ static float sum_row(float x) {
    x += simt::shfl_xor(x, 1);
    return x + simt::shfl_xor(x, 2);
  }
  __device__ __forceinline__ static bool leads_row() { return lane() % 4 == 0; }

  // Once own rows have landed.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int a = 0; a < HELD; ++a) {
#pragma unroll
      for (int k = 0; k < D / K; ++k) {
#pragma unroll
        for (int m = 0; m < M; ++m) simt::ldmatrix_x4(held[a][k][m], own.here(a).at(m * 16, k * K));
      }
    }
  }

  // s += own[OWN] other[b]ᵀ
  template <int OWN, int UNROLL>
  __device__ __forceinline__ void multiply(Products& s, int b) const {
    constexpr int DIM = OWN == 0 ? D : DV;
    const auto partners = across.here(b);
    if constexpr (OWN < HELD) {
#pragma unroll
      for (int k = 0; k < DIM / K; ++k) multiply_nt(s, held[OWN][k], partners, k * K);
    } else {
      const auto rows = own.here(OWN);
#pragma unroll UNROLL
      for (int k = 0; k < DIM / K; ++k) {
        uint32_t fragment[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) simt::ldmatrix_x4(fragment[m], rows.at(m * 16, k * K));
        multiply_nt(s, fragment, partners, k * K);
      }
    }
  }

  // What engines do whose warps share products, and weights: nothing.
  __device__ __forceinline__ void gather(Products&, Products&) const {}
  template <bool BOTH>
  __device__ __forceinline__ void publish(const Products&, const Products&) const {}

  // Weights as A operands.
  struct Weights {
    uint32_t packed[STEP / K][M][4];
  };
  __device__ __forceinline__ Weights hand_over(const Products& s) const {
    Weights weights;
#pragma unroll
    for (int k = 0; k < STEP / K; ++k) {
#pragma unroll
      for (int m = 0; m < M; ++m) to_operand<T>(weights.packed[k][m], s[m], k);
    }
    return weights;
  }

  // sums += weights other[b]
  template <int N>
  __device__ __forceinline__ void accumulate(float (&sums)[M][N][4], const Weights& weights,
                                             int b) const {
    const auto partners = down.here(b);
#pragma unroll
    for (int k = 0; k < STEP / K; ++k) multiply_nn(sums, weights.packed[k], partners, k * K);
  }

  // The same where other[b] holds nan or inf, which must not reach rows whose weight is 0: on FMA
  // units, partner by partner. Rare enough to be slow.
  template <int N>
  __device__ __forceinline__ void accumulate_guarded(float (&sums)[M][N][4], const Weights& weights,
                                                     int b) const {
#pragma unroll 1
    for (int j = 0; j < STEP; ++j) {
      float weight[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        uint32_t mine = 0;
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n)
          mine |= word_of(weights, r, n, j) & (n == j / 8 ? ~0u : 0u);
        weight[r] = element(simt::shfl(mine, lane() / 4 * 4 + j % 8 / 2), j % 2);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Summands pair = summands(smem.other[b], j, n);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            float& sum = sums[r / 2][n][r % 2 * 2 + e];
            sum = weight[r] == 0.f ? sum : fmaf(weight[r], element(pair.word[e % WORDS], e), sum);
          }
        }
      }
    }
  }
  // Of row r and the n-th eight partners, the word that holds j's weight in one lane of four.
  __device__ __forceinline__ static uint32_t word_of(const Weights& weights, int r, int n, int j) {
    if constexpr (sizeof(T) == 2) {
      return weights.packed[n / 2][r / 2][n % 2 * 2 + r % 2];
    } else {
      const uint32_t (&words)[4] = weights.packed[n][r / 2];
      return j % 2 ? words[2 + r % 2] : words[r % 2];
    }
  }
  // Element i of a word, which in tf32 is one.
  __device__ __forceinline__ static float element(uint32_t word, int i) {
    if constexpr (sizeof(T) == 2)
      return to_float(T{uint16_t(word >> 16 * i)});
    else
      return to_float(T{word});
  }
  // What row j of the other has in the two columns of this lane's n-th sums.
  static constexpr int WORDS = int(sizeof(T)) / 2;
  struct Summands {
    uint32_t word[WORDS];
  };
  __device__ __forceinline__ static Summands summands(OtherTile& other, int j, int n) {
    if constexpr (sizeof(T) == 2) {
      return {reinterpret_cast<uint32_t&>(other.chunk(j, n)[col(0)])};
    } else {
      const auto at = [&](int e) { return other.chunk(j, n / 4 * 8 + col(e))[n % 4].bits; };
      return {at(0), at(1)};
    }
  }

  // This warp's rows of own[a] ← factor · sums.
  template <int N>
  __device__ __forceinline__ void finish(const float (&sums)[M][N][4], float factor, int a) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) store_sums(smem.own[a], row(r), sums[r / 2], r % 2, factor);
  }
};

}  // namespace atx::ATX_TARGET
