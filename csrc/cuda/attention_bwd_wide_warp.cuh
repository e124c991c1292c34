// The products of a backward pass of wide heads on tensor cores (bf16, f16): a warp's share of its
// block. Sums of 16 rows and 576 columns would be more than the registers that a lane has, so warps
// share rows, products and columns. The interface is that of BwdWarp (attention_bwd_warp.cuh).
//
// - block: BLOCK = 32 rows of its own, STEP = 16 of the other's at a time
// - warp w, of the products: those of A and A' (w < 4) or of B and B', of all rows with all
//   partners, over a quarter of the columns, whose sums meet in shared memory. An A fragment then
//   serves two B fragments and the other way round, at 3 ldmatrix for 4 mma (1 where A is held);
//   pairs of its own would take 6
// - warp w, of the pairs: the rows from 4 w on; lane: row l / 8 of these, partners 2 (l % 8) and
//   the next
// - warp w, of the sums: all rows, and the columns 64 n + 8 w ... 64 n + 8 w + 7. Weights are
//   handed over in shared memory
//
// Columns are dealt in turns of 64, a swizzle's period: addresses differ by constants.
#pragma once
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile_>
struct BwdWideWarp {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int STEP = Tile::STEP, M = Tile::BLOCK / 16, N = STEP / 8;
  static constexpr int ROWS = 1, COLS = 2, TURN = 64;
  static constexpr int TURNS_A = Tile::D / TURN, TURNS_B = Tile::DV / TURN;
  // Warps that have products of the same tiles. Of each, M · 2 · N pieces of 8 rows and partners.
  static constexpr int QUARTERS = Tile::WARPS / 2, PIECES = M * 2 * N;
  static constexpr int COPIERS = Tile::THREADS / 2;
  // Whether columns 2n and 2n + 1 are neighboring rows of the other.
  static constexpr bool NEIGHBORS = true;
  static_assert(STEP == 16 && Tile::BLOCK == 4 * Tile::WARPS && QUARTERS * 16 == TURN);

  using OwnTile = SmemTile<T, Tile::BLOCK, Tile::D>;
  using OtherTile = SmemTile<T, STEP, Tile::D>;
  using WeightsTile = SmemTile<T, Tile::BLOCK, 2 * STEP>;
  struct Smem {
    OwnTile own[2];  // at the end, their gradients on the way out
    OtherTile other[2 * Tile::STAGES];
    Float2 parts[Tile::WARPS][PIECES * 32];
    WeightsTile weights;
  };
  using Products = float[COLS];
  using SumsA = float[M][TURNS_A][4];
  using SumsB = float[M][TURNS_B][4];

  Smem& smem;
  uint32_t held[Tile::HELD ? TURNS_A : 1][M][4];  // what this warp multiplies of own
  const FragmentAddress<OwnTile> own;
  const FragmentAddress<OtherTile, Order::ACROSS> across;
  const uint32_t handed;  // the weights of A' as A operands
  const uint32_t down;    // this warp's columns of other[0]; of the upper lanes one turn further

  __device__ __forceinline__ explicit BwdWideWarp(Smem& smem)
      : smem(smem),
        own(smem.own[0], 0, lane()),
        across(smem.other[0], 0, lane()),
        handed(simt::smem_address(&smem.weights) +
               WeightsTile::offset(lane() % 16, lane() / 16 * 2)),
        down(simt::smem_address(&smem.other[0]) + OtherTile::offset(lane() % 16, warp()) +
             lane() / 16 * TURN_BYTES) {}

  static constexpr int TURN_BYTES = TURN * int(sizeof(T));
  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int warp() { return int(threadIdx.x / 32); }
  __device__ __forceinline__ static int row(int) { return warp() * 4 + lane() / 8; }
  __device__ __forceinline__ static int col(int c) { return lane() % 8 * 2 + c; }
  __device__ __forceinline__ static float& at(Products& s, int, int c) { return s[c]; }
  // Σ over the lanes that share the row.
  __device__ __forceinline__ static float sum_row(float x) {
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) x += simt::shfl_xor(x, mask);
    return x;
  }
  __device__ __forceinline__ static bool leads_row() { return lane() % 8 == 0; }

  // Where a lane's two products of a piece are. The pieces of the other eight partners are shifted
  // by half a line, for a lane's row has both.
  __device__ __forceinline__ static int place(int piece, int of_lane) {
    return piece * 32 + (of_lane ^ piece % N * 8);
  }

  // Which of own and other this warp multiplies, and from which column of a turn on, in bytes.
  __device__ __forceinline__ static int operand() { return warp() / QUARTERS; }
  __device__ __forceinline__ static uint32_t quarter() {
    return uint32_t(warp() % QUARTERS * TURN_BYTES / QUARTERS);
  }
  __device__ __forceinline__ static void load(uint32_t (&fragment)[M][4],
                                              const FragmentAddress<OwnTile>& rows, int turn) {
#pragma unroll
    for (int m = 0; m < M; ++m) simt::ldmatrix_x4(fragment[m], rows.at(m * 16, turn * TURN));
  }
  // Once own rows have landed. Beyond its last column, B is zeros.
  __device__ __forceinline__ void hold() {
    auto rows = own.here(operand());
    rows.first ^= quarter();
#pragma unroll
    for (int turn = 0; turn < TURNS_A; ++turn) load(held[turn], rows, turn);
  }

  // This warp's part of own[OWN] other[b]ᵀ, into shared memory, if it has one.
  template <int OWN, int>
  __device__ __forceinline__ void multiply(Products&, int b) const {
    if (operand() != OWN) return;
    auto rows = own.here(OWN);
    auto partners = across.here(b);
    rows.first ^= quarter(), partners.first ^= quarter();
    float c[M][N][4] = {};
#pragma unroll
    for (int turn = 0; turn < (OWN == 0 ? TURNS_A : TURNS_B); ++turn) {
      if constexpr (Tile::HELD) {
        multiply_nt(c, held[turn], partners, turn * TURN);
      } else {
        uint32_t fragment[M][4];
        load(fragment, rows, turn);
        multiply_nt(c, fragment, partners, turn * TURN);
      }
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const float* const two = &c[piece / N / 2][piece % N][piece / N % 2 * 2];
      smem.parts[warp()][place(piece, lane())] = {two[0], two[1]};
    }
  }

  // x, d ← the products of this lane's pairs, when all warps have multiplied.
  __device__ __forceinline__ void gather(Products& x, Products& d) const {
    simt::sync();  // every warp's parts are there, and none still reads the last step's weights
    const int piece = warp() / 2 * N + lane() / 4 % 2;
    const int at = place(piece, (row(0) % 8) * 4 + lane() % 4);
#pragma unroll
    for (int q = 0; q < QUARTERS; ++q) {
      const Float2 of_x = smem.parts[q][at], of_d = smem.parts[QUARTERS + q][at];
#pragma unroll
      for (int c = 0; c < COLS; ++c) x[c] += of_x.x[c], d[c] += of_d.x[c];
    }
  }

  // Weights to shared memory, rounded: those of A' in even chunks, BOTH: of B' in odd ones, so that
  // rows of the same banks, two apart, do not meet there.
  template <bool BOTH>
  __device__ __forceinline__ void publish(const Products& of_a, const Products& of_b) const {
    const auto put = [&](const Products& s, int b) {
      T* const chunk = smem.weights.chunk(row(0), col(0) / 8 * 2 + b);
      reinterpret_cast<uint32_t&>(chunk[col(0) % 8]) = simt::pack2<T>(s[0], s[1]);
    };
    put(of_a, 0);
    if constexpr (BOTH) put(of_b, 1);
    simt::sync();  // every warp's weights are there
  }
  struct Weights {};
  __device__ __forceinline__ Weights hand_over(const Products&) const { return {}; }

  // sums += weights other[b], of this warp's columns
  template <int TURNS>
  __device__ __forceinline__ void accumulate(float (&sums)[M][TURNS][4], Weights, int b) const {
    uint32_t weights[M][4];
    const uint32_t from = simt::opaque(handed ^ b % 2 * CHUNK_BYTES);
#pragma unroll
    for (int m = 0; m < M; ++m) simt::ldmatrix_x4(weights[m], from + m * 16 * WeightsTile::PITCH);
    const uint32_t partners = simt::opaque(down + b * int(sizeof(OtherTile)));
#pragma unroll
    for (int turn = 0; turn < TURNS; turn += 2) {
      // Of an odd number, the last is loaded twice.
      const bool pair = turn + 1 < TURNS;
      uint32_t r[4];
      simt::ldmatrix_x4_trans(r,
                              partners + turn * TURN_BYTES - (pair ? 0 : lane() / 16 * TURN_BYTES));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        simt::mma(sums[m][turn], weights[m], r[0], r[1], T{});
        if (pair) simt::mma(sums[m][turn + 1], weights[m], r[2], r[3], T{});
      }
    }
  }

  // The same where other[b] holds nan or inf, which must not reach rows whose weight is 0: on FMA
  // units, partner by partner. Rare enough to be slow.
  template <int TURNS>
  __device__ __forceinline__ void accumulate_guarded(float (&sums)[M][TURNS][4], Weights,
                                                     int b) const {
#pragma unroll 1
    for (int j = 0; j < STEP; ++j) {
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const float weight = to_float(smem.weights.chunk(sums_row(r), j / 8 * 2 + b % 2)[j % 8]);
        if (weight == 0.f) continue;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          const T* const pair =
              smem.other[b].chunk(j, chunk_of(turn)) + simt::c_place(lane(), 0).col;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = sums[r / 2][turn][r % 2 * 2 + e];
            sum = fmaf(weight, to_float(pair[e]), sum);
          }
        }
      }
    }
  }

  // Rows of own[a], this warp's columns ← factor · sums.
  template <int TURNS>
  __device__ __forceinline__ void finish(const float (&sums)[M][TURNS][4], float factor,
                                         int a) const {
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        const float* const two = &sums[r / 2][turn][r % 2 * 2];
        T* const pair =
            smem.own[a].chunk(sums_row(r), chunk_of(turn)) + simt::c_place(lane(), 0).col;
        reinterpret_cast<uint32_t&>(*pair) = simt::pack2<T>(two[0] * factor, two[1] * factor);
      }
    }
  }

 private:
  // Row r of the 2 M of which this lane has sums, and where their columns are.
  __device__ __forceinline__ static int sums_row(int r) {
    return r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row;
  }
  __device__ __forceinline__ static int chunk_of(int turn) { return turn * (TURN / 8) + warp(); }
};

}  // namespace atx::ATX_TARGET
