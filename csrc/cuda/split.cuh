// Calls of few queries: their keys are split among blocks, each of which leaves a partial result in
// the workspace, as if its chunk were all there is, without the sink:
//
// - o [chunks, rows, pitch]: normalized, in floats; the rows of [B, Hq, Sq], of whole 16 bytes
// - lse [chunks, rows]
//
// attention_fwd_combine.cu turns these into the results.
#pragma once
#include "csrc/core/score.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

// The chunks of a call. Each has keys that some query sees; one chunk: the call is not split.
struct Split {
  int first, keys, chunks;  // chunk c is the keys [first + c keys, first + (c + 1) keys)
  int pitch;
  int64_t rows;

  // Sequences of varlen are as many lengths, which the batch decides: these are not split.
  ATX_HD explicit Split(const AttentionParams& p)
      : first(0),
        keys(p.Sk),
        chunks(1),
        pitch((p.Dv + 3) / 4 * 4),
        rows(int64_t(p.B) * p.Hq * p.Sq) {
    if (p.cu_seqlens_q || p.blocks.visited || p.Sq > FEW_QUERIES) return;
    const Window<float> window(p, sequence(p, 0), 0, 0);
    first = window.kv_begin(0, p.Sq) / CHUNK_STEP * CHUNK_STEP;
    const int seen = window.kv_end(0, p.Sq) - first;
    constexpr int SHARE = MOST_CHUNKS * CHUNK_STEP;
    keys = (seen / SHARE + (seen % SHARE > 0)) * CHUNK_STEP;
    if (keys < LEAST_CHUNK_KEYS) keys = LEAST_CHUNK_KEYS;
    chunks = seen <= keys ? 1 : seen / keys + (seen % keys > 0);
  }
  ATX_HD int64_t floats() const { return chunks == 1 ? 0 : chunks * rows * (pitch + 1); }
  ATX_HD float* o(const AttentionParams& p) const { return p.workspace; }
  ATX_HD float* lse(const AttentionParams& p) const { return p.workspace + chunks * rows * pitch; }
};

inline int64_t split_blocks(const AttentionParams& p, int block_q, bool grouped) {
  const int group = p.Hq / p.Hkv;
  const int64_t tiles = grouped ? (int64_t(group) * p.Sq + block_q - 1) / block_q : group;
  return tiles * Split(p).chunks * p.Hkv * p.B;
}

// A block's rows among `count`: query heads one after the other, all queries of each.
struct GroupRows {
  static constexpr bool GROUPED = true;
  int sq, first, count;
  __device__ __forceinline__ bool exists(int row) const { return first + row < count; }
  // sq: there is no such row.
  __device__ __forceinline__ int position(int row) const {
    return exists(row) ? (first + row) % sq : sq;
  }
};
template <bool GROUPED>
struct SplitRows {
  using Type = BlockRows;
};
template <>
struct SplitRows<true> {
  using Type = GroupRows;
};

// Grid index → one chunk of keys, and query rows that read it: of one query head, or of all that
// share the key head. Those of one key head and chunk are neighbors, so that they share it in L2.
template <bool GROUPED>
struct SplitBlock {
  using Rows = typename SplitRows<GROUPED>::Type;
  int b, h, h_kv;  // h: the first of the query heads
  int q0, q1;      // positions of the queries, all there are
  int chunk, first_row;
  Sequence seq;

  __device__ __forceinline__ SplitBlock(const AttentionParams& p, int block_q) {
    const int heads = p.Hq / p.Hkv,
              tiles = GROUPED ? (heads * p.Sq + block_q - 1) / block_q : heads;
    const int block = int(simt::opaque(blockIdx.x)), tile = block % tiles, head = block / tiles;
    h_kv = head % p.Hkv;
    h = h_kv * heads + (GROUPED ? 0 : tile);
    b = head / p.Hkv % p.B;
    chunk = head / p.Hkv / p.B;
    first_row = GROUPED ? tile * block_q : 0;
    q0 = 0, q1 = p.Sq;
    seq = {0, 0, p.Sq, p.Sk};
  }
  __device__ __forceinline__ int count(const AttentionParams& p) const {
    return GROUPED ? p.Hq / p.Hkv * p.Sq : p.Sq;
  }
  __device__ __forceinline__ Rows rows(const AttentionParams& p) const {
    if constexpr (GROUPED)
      return {p.Sq, first_row, count(p)};
    else
      return {p.Sq, 0};
  }
};

// What a tile's blocks own.
template <class Tile, bool = Tile::SPLIT>
struct Owned {
  using Block = AttentionBlock;
  using Rows = BlockRows;
};
template <class Tile>
struct Owned<Tile, true> {
  using Block = SplitBlock<Tile::GROUPED>;
  using Rows = typename Block::Rows;
};

// The keys that a block walks over.
struct KeyRange {
  int begin, end;
};
template <class Score>
__device__ __forceinline__ KeyRange keys_of(const AttentionParams&, const AttentionBlock& block,
                                            const Score& score) {
  return {score.kv_begin(block.q0, block.q1), score.kv_end(block.q0, block.q1)};
}
template <bool GROUPED, class Score>
__device__ __forceinline__ KeyRange keys_of(const AttentionParams& p,
                                            const SplitBlock<GROUPED>& block, const Score& score) {
  const Split split(p);
  const int from = split.first + block.chunk * split.keys;
  const int begin = score.kv_begin(0, p.Sq), end = score.kv_end(0, p.Sq);
  return {begin > from ? begin : from, end - from < split.keys ? end : from + split.keys};
}

// tile ← this block's rows of q, zeros beyond them.
template <int THREADS, class Tile>
__device__ __forceinline__ void load_queries(Tile& tile, const AttentionParams& p,
                                             const AttentionBlock& block) {
  using T = typename Tile::T;
  const GlobalMatrix<const T> q(p.q, p.q_stride, block.b, block.h, block.seq.q_row, block.seq.sq,
                                p.D);
  TileStream<Tile, THREADS>(q, block.q0).load(tile, block.q0);
}
template <int THREADS, class Tile, bool GROUPED>
__device__ __forceinline__ void load_queries(Tile& tile, const AttentionParams& p,
                                             const SplitBlock<GROUPED>& block) {
  using T = typename Tile::T;
  const auto rows = block.rows(p);
#pragma unroll 1
  for (int at = int(threadIdx.x); at < Tile::ROWS * Tile::CHUNKS; at += THREADS) {
    const int r = at / Tile::CHUNKS, c = at % Tile::CHUNKS;
    const int row = rows.exists(r) ? rows.first + r : 0;
    const int cols = rows.exists(r) ? p.D - c * Tile::CHUNK : 0;
    const GlobalMatrix<const T> q(p.q, p.q_stride, block.b, block.h + row / p.Sq, row % p.Sq, 1,
                                  p.D);
    if (q.chunked(q.data)) {
      simt::cp_async16(simt::smem_address(tile.chunk(r, c)), q.data + c * Tile::CHUNK,
                       cols > 0 ? CHUNK_BYTES : 0);
    } else {
#pragma unroll 1
      for (int e = 0; e < Tile::CHUNK; ++e)
        tile.chunk(r, c)[e] = e < cols ? q.data[c * Tile::CHUNK + e] : T{};
    }
  }
}

// What a block's rows end with: the sink, and where their results go.
template <bool GROUPED>
__device__ __forceinline__ float sink_of(const AttentionParams&, const SplitBlock<GROUPED>&) {
  return -INFINITY;
}
// The workspace's row of the block's first.
template <bool GROUPED>
__device__ __forceinline__ int64_t first_of(const AttentionParams& p,
                                            const SplitBlock<GROUPED>& block) {
  return (int64_t(block.b) * p.Hq + block.h) * p.Sq;
}
template <bool GROUPED>
__device__ __forceinline__ float* lse_rows(const AttentionParams& p,
                                           const SplitBlock<GROUPED>& block) {
  const Split split(p);
  return split.lse(p) + block.chunk * split.rows + first_of(p, block);
}
template <class T>
__device__ __forceinline__ GlobalMatrix<T> output_of(const AttentionParams& p,
                                                     const AttentionBlock& block) {
  return {p.o, p.o_stride, block.b, block.h, block.seq.q_row, block.seq.sq, p.Dv};
}
template <class T, bool GROUPED>
__device__ __forceinline__ GlobalMatrix<float> output_of(const AttentionParams& p,
                                                         const SplitBlock<GROUPED>& block) {
  const Split split(p);
  const Strides strides = {split.rows * split.pitch, 0, split.pitch};
  return {split.o(p), strides, block.chunk, 0, first_of(p, block), block.count(p), split.pitch};
}

}  // namespace atx::ATX_TARGET
