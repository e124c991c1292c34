// The end of a chunk on tensor cores (split.cuh): the block's warps, each with sums over keys of
// its own, become one partial result.
#pragma once
#include "csrc/cuda/attention_fwd_warp.cuh"

namespace atx::ATX_TARGET {

// What the warps tell each other, in Q's place.
template <class Tile>
struct ChunkEnds {
  float base[Tile::WARPS][Tile::BLOCK_Q], sum[Tile::WARPS][Tile::BLOCK_Q];
};
// Their shares of the output, in the place of K and V.
template <class Tile>
struct ChunkOutputs {
  SmemTile<float, Tile::BLOCK_Q, Tile::DV> o[Tile::WARPS];
};

// own ← what this warp's o is to be multiplied with. A warp whose keys the row does not see, or of
// nan alone, has base = -inf; its sum then is 0, or nan to stay.
template <class Tile, class Score>
__device__ __forceinline__ RowEnd end_row(const ChunkEnds<Tile>& ends, int row,
                                          const Exponential<Score>& exponential, float* own) {
  float top = -INFINITY, total = 0, kept = 0;
#pragma unroll
  for (int w = 0; w < Tile::WARPS; ++w) top = fmaxf(top, ends.base[w][row]);
#pragma unroll
  for (int w = 0; w < Tile::WARPS; ++w) {
    const float base = ends.base[w][row];
    const float factor = base == -INFINITY ? 0.f : exponential.rebase(base, top);
    total += ends.sum[w][row] * factor;
    if (w == int(threadIdx.x / 32)) kept = factor;
  }
  const RowEnd end(exponential.logit(top), total, -INFINITY);
  *own = kept * end.factor;
  return end;
}

template <class Tile, class Score>
__device__ __forceinline__ void finish_chunk(AttentionWarp<Tile, Score>& warp,
                                             const AttentionParams& p,
                                             const typename Owned<Tile>::Block& block) {
  using Smem = FwdSmem<Tile>;
  static_assert(Tile::M == 1 && sizeof(ChunkEnds<Tile>) <= sizeof(Smem::q));
  static_assert(sizeof(ChunkOutputs<Tile>) <= sizeof(Smem) - sizeof(Smem::q));
  auto& ends = reinterpret_cast<ChunkEnds<Tile>&>(warp.smem.q);
  auto& outputs = reinterpret_cast<ChunkOutputs<Tile>&>(warp.smem.k);
  const int w = int(threadIdx.x / 32);
  simt::sync();  // no warp still reads Q or V, whose places are overwritten now
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = warp.sum[0][r];
    total += simt::shfl_xor(total, 1);
    total += simt::shfl_xor(total, 2);
    const simt::Place at = simt::c_place(warp.lane(), 2 * r);
    if (at.col != 0) continue;
    ends.base[w][at.row] = warp.base[0][r];
    ends.sum[w][at.row] = total;
  }
  simt::sync();  // every warp reads what all have written

  const auto rows = block.rows(p);
  float* const lse = lse_rows(p, block);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const simt::Place at = simt::c_place(warp.lane(), 2 * r);
    float own;
    const RowEnd end = end_row(ends, at.row, warp.exponential, &own);
    if (w == 0 && at.col == 0 && rows.exists(at.row)) lse[rows.first + at.row] = end.lse;
#pragma unroll
    for (int n = 0; n < Tile::DV / 8; ++n)
      reinterpret_cast<Float2&>(outputs.o[w].at(at.row, n * 8 + at.col)) = {
          warp.o[0][n][2 * r] * own, warp.o[0][n][2 * r + 1] * own};
  }
  simt::sync();  // threads add up what all warps have written

  const auto to = output_of<typename Tile::T>(p, block);
  constexpr int CHUNKS = Tile::DV / 4;
#pragma unroll 1
  for (int at = int(threadIdx.x); at < Tile::BLOCK_Q * CHUNKS; at += Tile::THREADS) {
    const int row = at / CHUNKS, c = at % CHUNKS;
    if (!rows.exists(row) || c * 4 >= to.cols) continue;
    Float4 sum = reinterpret_cast<Float4&>(*outputs.o[0].chunk(row, c));
#pragma unroll
    for (int w = 1; w < Tile::WARPS; ++w) {
      const Float4 x = reinterpret_cast<Float4&>(*outputs.o[w].chunk(row, c));
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.x[e] += x.x[e];
    }
    reinterpret_cast<Float4&>(to.data[(rows.first + row) * to.stride + c * 4]) = sum;
  }
}

}  // namespace atx::ATX_TARGET
