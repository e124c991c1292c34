// The product of attention_stats.cuh, C = X Yᵀ of the rows that a block owns and a tile of the
// other side, in two engines of one interface: a lane has a grid of ROWS x COLS of C, at row(r) and
// col(c) of the block's tile, and shares its rows with SHARING neighboring lanes.
//
// - StatsWarp, tensor cores: a warp owns 16 M rows; lanes hold fragment.h's C layout
// - StatsLane, FMA units: warp w owns the rows w + 4 g + 8 r of its half-warps g = 0, 1; a lane has
//   its half-warp's, with the columns lane % 16 + 16 c
#pragma once
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
struct StatsSmem {
  using OwnTile = SmemTile<typename Tile::T, Tile::BLOCK, Tile::D>;
  using OtherTile = SmemTile<typename Tile::T, Tile::STEP, Tile::D>;
  OwnTile own;
  OtherTile other[Tile::STAGES];
  float base[Tile::STAGES][Tile::STEP];  // of a tile's queries, where keys are owned
};

template <class Tile_>
struct StatsWarp {
  using Tile = Tile_;
  using T = typename Tile::T;
  using Smem = StatsSmem<Tile>;
  static constexpr int M = Tile::M, D = Tile::D, STEP = Tile::STEP;
  static constexpr int ROWS = 2 * M, COLS = STEP / 4, SHARING = 4;
  static constexpr bool NEIGHBORS = true;  // columns 2n and 2n + 1
  using Products = float[M][STEP / 8][4];

  const FragmentAddress<typename Smem::OtherTile, Order::ACROSS> other;
  uint32_t own[D / 16][M][4];

  // Once the own rows are in shared memory.
  __device__ __forceinline__ explicit StatsWarp(Smem& smem) : other(smem.other[0], 0, lane()) {
    const FragmentAddress<typename Smem::OwnTile> rows(smem.own, first_row(), lane());
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int m = 0; m < M; ++m) simt::ldmatrix_x4(own[k][m], rows.at(m * 16, k * 16));
    }
  }
  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int first_row() { return int(threadIdx.x / 32 * 16 * M); }
  __device__ __forceinline__ static int row(int r) {
    return first_row() + r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row;
  }
  __device__ __forceinline__ static int col(int c) {
    return c / 2 * 8 + simt::c_place(lane(), c % 2).col;
  }
  __device__ __forceinline__ static float& at(Products& s, int r, int c) {
    return s[r / 2][c / 2][r % 2 * 2 + c % 2];
  }

  // s += own other[stage]ᵀ
  __device__ __forceinline__ void multiply(Products& s, int stage) const {
    const auto columns = other.here(stage);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_nt(s, own[k], columns, k * 16);
  }
};

template <class Tile_>
struct StatsLane {
  using Tile = Tile_;
  using T = float;
  using Smem = StatsSmem<Tile>;
  static constexpr int ROWS = Tile::BLOCK / 8, COLS = Tile::STEP / 16, SHARING = 16;
  static constexpr bool NEIGHBORS = false;
  using Products = float[ROWS][COLS];

  Smem& smem;

  __device__ __forceinline__ explicit StatsLane(Smem& smem) : smem(smem) {}
  __device__ __forceinline__ static int row(int r) {
    return int(threadIdx.x / 32 + threadIdx.x % 32 / 16 * 4) + 8 * r;
  }
  __device__ __forceinline__ static int col(int c) { return int(threadIdx.x % 16) + 16 * c; }
  __device__ __forceinline__ static float& at(Products& s, int r, int c) { return s[r][c]; }

  __device__ __forceinline__ void multiply(Products& s, int stage) const {
#pragma unroll 1
    for (int n = 0; n < Tile::D / 4; ++n) {
      Float4 y[COLS];
#pragma unroll
      for (int c = 0; c < COLS; ++c)
        y[c] = reinterpret_cast<Float4&>(*smem.other[stage].chunk(col(c), n));
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Float4 x = reinterpret_cast<Float4&>(*smem.own.chunk(row(r), n));
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[r][c] = fmaf(x.x[e], y[c].x[e], s[r][c]);
        }
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
