// The products of a backward pass in f32: every one an FMA, a lane's view of its block. The
// interface is that of BwdWarp (attention_bwd_warp.cuh).
//
// - warp w: the rows w + 4 g + 8 r of the block, of half-warp g = 0, 1
// - lane: its half-warp's rows, with the partners lane % 16 + 16 c; of sums, the columns from
//   2 (lane % 16) + 32 n on, two of them
//
// Weights change hands within a warp through shared memory.
#pragma once
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile_>
struct BwdLane {
  using Tile = Tile_;
  using T = float;
  static constexpr int D = Tile::D, STEP = Tile::STEP;
  static constexpr int ROWS = Tile::BLOCK / 8, COLS = STEP / 16;
  // A product is summed in runs of this many dimensions: dY is a difference of two such sums, which
  // may be nearly equal, and shorter sums round less.
  static constexpr int RUN = 16;

  using OwnTile = SmemTile<float, Tile::BLOCK, D>;
  using OtherTile = SmemTile<float, STEP, D>;
  struct Smem {
    OwnTile own[2];  // at the end, their gradients on the way out
    OtherTile other[2 * Tile::STAGES];
    SmemTile<float, Tile::BLOCK, STEP> weights;
  };
  // Whether columns 2n and 2n + 1 are neighboring rows of the other.
  static constexpr bool NEIGHBORS = false;
  using Products = float[ROWS][COLS];
  using Sums = float[ROWS][D / 32][2];
  using SumsA = Sums;
  using SumsB = Sums;
  static constexpr int COPIERS = Tile::THREADS;

  Smem& smem;

  __device__ __forceinline__ explicit BwdLane(Smem& smem) : smem(smem) {}

  __device__ __forceinline__ static int row(int r) {
    return int(threadIdx.x / 32 + threadIdx.x % 32 / 16 * 4) + 8 * r;
  }
  __device__ __forceinline__ static int col(int c) { return int(threadIdx.x % 16) + 16 * c; }
  __device__ __forceinline__ static float& at(Products& s, int r, int c) { return s[r][c]; }
  __device__ __forceinline__ static float sum_row(float x) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) x += simt::shfl_xor(x, mask);
    return x;
  }
  __device__ __forceinline__ static bool leads_row() { return threadIdx.x % 16 == 0; }

  template <int OWN, int>
  __device__ __forceinline__ void multiply(Products& s, int b) const {
#pragma unroll 1
    for (int n = 0; n < D / 4; n += RUN / 4) {
      Products part = {};
#pragma unroll 1
      for (int chunk = n; chunk < n + RUN / 4; ++chunk) multiply_chunk(part, OWN, b, chunk);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) s[r][c] += part[r][c];
      }
    }
  }
  __device__ __forceinline__ void multiply_chunk(Products& s, int a, int b, int n) const {
    Float4 partner[COLS];
#pragma unroll
    for (int c = 0; c < COLS; ++c)
      partner[c] = reinterpret_cast<Float4&>(*smem.other[b].chunk(col(c), n));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const Float4 x = reinterpret_cast<Float4&>(*smem.own[a].chunk(row(r), n));
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][c] = fmaf(x.x[e], partner[c].x[e], s[r][c]);
      }
    }
  }

  __device__ __forceinline__ void gather(Products&, Products&) const {}
  template <bool BOTH>
  __device__ __forceinline__ void publish(const Products&, const Products&) const {}

  // Weights in shared memory, for this warp.
  struct Weights {};
  __device__ __forceinline__ Weights hand_over(const Products& s) const {
    simt::sync_warp();  // no lane still reads what was handed over before
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLS; ++c) smem.weights.at(row(r), col(c)) = s[r][c];
    }
    simt::sync_warp();  // weights are there for every lane
    return {};
  }
  __device__ __forceinline__ void accumulate(Sums& sums, Weights, int b) const {
    add_products<false>(sums, smem.other[b]);
  }
  __device__ __forceinline__ void accumulate_guarded(Sums& sums, Weights, int b) const {
    add_products<true>(sums, smem.other[b]);
  }

  template <bool GUARDED>
  __device__ __forceinline__ void add_products(Sums& sums, OtherTile& other) const {
#pragma unroll 1
    for (int j = 0; j < STEP; j += 4) {
      Float4 weight[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        weight[r] = reinterpret_cast<Float4&>(*smem.weights.chunk(row(r), j / 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* const partners = &other.at(j + e, col(0) * 2);  // and whole periods further
#pragma unroll
        for (int n = 0; n < D / 32; ++n) {
          const Float2 partner = *reinterpret_cast<const Float2*>(partners + 32 * n);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              const float added = fmaf(weight[r].x[e], partner.x[x], sums[r][n][x]);
              sums[r][n][x] = GUARDED && weight[r].x[e] == 0.f ? sums[r][n][x] : added;
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const Sums& sums, float factor, int a) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
        reinterpret_cast<Float2&>(smem.own[a].at(row(r), col(0) * 2 + 32 * n)) = {
            sums[r][n][0] * factor, sums[r][n][1] * factor};
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
