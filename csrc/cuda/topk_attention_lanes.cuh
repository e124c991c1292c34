// How a warp of topk attention holds rows. Lanes that are neighbors share a row, 16 bytes each at a
// time, so that a row is read in whole sectors and a product of two takes as few shuffles as
// sharers have bits; a warp has several rows in hand at once, one per team of sharers.
#pragma once
#include "csrc/core/lists.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/pieces.cuh"

namespace atx::ATX_TARGET {

// A row, or this lane's share of it: x[c] starts at dimension (c · SHARERS + lane) · PIECE.
template <class Tile>
struct SharedRow {
  using T = typename Tile::T;
  static constexpr int PIECE = Pieces<T>::PIECE, COUNT = Tile::D / (Tile::SHARERS * PIECE);
  float x[COUNT][PIECE];

  static __device__ __forceinline__ int at(int c) {
    return (c * Tile::SHARERS + int(threadIdx.x % Tile::SHARERS)) * PIECE;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int i = 0; i < PIECE; ++i) x[c][i] = 0;
  }
  // exists: false reads nothing, and gives zeros.
  __device__ __forceinline__ void load(const T* row, int size, bool exists = true) {
    const Pieces<const T> from = {row, exists ? size : 0};
#pragma unroll
    for (int c = 0; c < COUNT; ++c) from.load(at(c), x[c]);
  }
  __device__ __forceinline__ void store(T* row, int size, float factor) {
    const Pieces<T> to = {row, size};
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
#pragma unroll
      for (int i = 0; i < PIECE; ++i) x[c][i] *= factor;
      to.store(at(c), x[c]);
    }
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int i = 0; i < PIECE; ++i) x[c][i] *= factor;
  }
  __device__ __forceinline__ void add(float factor, const SharedRow& row) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int i = 0; i < PIECE; ++i) x[c][i] = fmaf(factor, row.x[c][i], x[c][i]);
  }
  // The product, for all sharers.
  __device__ __forceinline__ float dot(const SharedRow& row) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int i = 0; i < PIECE; ++i) sum = fmaf(x[c][i], row.x[c][i], sum);
#pragma unroll
    for (int mask = 1; mask < Tile::SHARERS; mask *= 2) sum += simt::shfl_xor(sum, mask);
    return sum;
  }
  // x ← the sum of the teams' x, in each.
  __device__ __forceinline__ void add_teams() {
#pragma unroll
    for (int mask = Tile::SHARERS; mask < 32; mask *= 2)
#pragma unroll
      for (int c = 0; c < COUNT; ++c)
#pragma unroll
        for (int i = 0; i < PIECE; ++i) x[c][i] += simt::shfl_xor(x[c][i], mask);
  }
};

// The row that a warp owns, of [B, heads, rows]: heads run fastest within a group, for they share
// what they read.
template <class Tile>
struct WarpRow {
  int b, h, row, team;
  bool exists;

  // Unsigned: a division of 64 bits is a call, and takes a stack.
  __device__ __forceinline__ WarpRow(unsigned batch, unsigned heads, unsigned rows,
                                     unsigned group) {
    const unsigned n = blockIdx.x * Tile::WARPS + threadIdx.x / 32;
    const unsigned in_group = n / group, head = in_group / rows;
    exists = n < batch * heads * rows;
    row = int(in_group % rows);
    b = int(head / (heads / group));
    h = int(head % (heads / group) * group + n % group);
    team = int(threadIdx.x % 32 / Tile::SHARERS);
  }
};

// A kernel whose warps own the rows of [B, heads, rows].
template <class Tile, class Params>
Status launch_warps(void (*kernel)(Params), int batch, int heads, int rows, const Exec& exec,
                    const Params& params) {
  const int64_t warps = int64_t(batch) * heads * rows;
  if (warps + Tile::WARPS > int64_t(UINT32_MAX)) return "the problem has more than 2^32 - 1 rows";
  return simt::launch(kernel, (warps + Tile::WARPS - 1) / Tile::WARPS, Tile::THREADS, 0,
                      exec.stream, params);
}

// Row 0 of one (batch, head).
template <class T>
__device__ __forceinline__ T* head_rows(const void* tensor, const Strides& s, int b, int h) {
  return const_cast<T*>(static_cast<const T*>(tensor)) + row0(s, b, h, 0);
}

}  // namespace atx::ATX_TARGET
