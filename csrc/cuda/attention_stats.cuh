// What the weights P = exp(Y - lse) look like, without P itself:
//   entropy_i = -Σ_j P_ij ln P_ij,  top weight max_j P_ij and its first j,  column sum_j = Σ_i P_ij
//
// Two passes of one kernel, each of which forms S again, so that every number has one owner and no
// addition is atomic: blocks of the first own rows of Q and walk over keys, blocks of the second
// own rows of K and walk over queries. Of each tile of the other side,
//
//   C = X Yᵀ,  log2 P of each pair,  statistics of this lane's rows and columns
//
// and the lanes that share a row compare notes at the end. Engine multiplies
// (attention_stats_engines.cuh). Most tiles are plain: nothing is masked, and both of its sides are
// whole.
//
// nvcc 13.0, sm_80, policy Window, bf16: SASS instructions per HMMA (and registers)
// - rows of queries, the loop of plain tiles and others together, D 64: 14.77 (208), 128: 8.20
//   (254). An estimated 128 instructions of each (2.0 and 1.0 per HMMA) find the place of a new
//   maximum and are skipped where there is none.
// - rows of keys, plain loop, D 64: 5.95 (155), 128: 3.64 (202). No kernel spills.
#pragma once
#include <type_traits>

#include "csrc/core/kernels.h"
#include "csrc/cuda/attention_bwd_block.cuh"
#include "csrc/cuda/attention_stats_engines.cuh"
#include "csrc/cuda/grid_logits.cuh"

namespace atx::ATX_TARGET {

// Grid index → rows [first, first + block) of one side of one query head.
struct StatsBlock {
  int b, h, h_kv, first;
  Sequence seq;

  __device__ __forceinline__ StatsBlock(const AttentionParams& p, int block, bool keys) {
    const int tiles = int((int64_t(keys ? p.Sk : p.Sq) + block - 1) / block);
    const int index = int(simt::opaque(blockIdx.x)), tile = index % tiles, head = index / tiles;
    b = head / p.Hq;
    h = head % p.Hq;
    h_kv = h / (p.Hq / p.Hkv);
    seq = sequence(p, b);
    // The longest blocks should not start last: late queries, early keys, where a mask is causal.
    first = (keys ? tile : tiles - 1 - tile) * block;
  }
};

inline int64_t stats_blocks(const AttentionParams& p, int block, bool keys) {
  const int64_t rows = keys ? p.Sk : p.Sq;
  return (rows + block - 1) / block * p.Hq * p.B;
}

// The statistics of one query, or of what one lane has seen of it.
struct RowStats {
  float entropy = 0, top = -INFINITY;  // -Σ P log2 P; max log2 P
  int index = -1;                      // the first key that has it

  // Row r of a tile's log2 P, whose first key is at.
  template <class Engine>
  __device__ __forceinline__ void add(typename Engine::Products& s, int r, int at) {
    constexpr float LEAST = -200;  // 2^LEAST is 0, and 0 times it is a number
    float part = 0, tile_top = -INFINITY;
#pragma unroll
    for (int c = 0; c < Engine::COLS; ++c) {
      const float x = Engine::at(s, r, c);
      part = fmaf(simt::exp2(x), fmaxf(x, LEAST), part);
      tile_top = fmaxf(tile_top, x);
    }
    entropy -= part;
    if (!(tile_top > top)) return;  // as a rule: the larger a maximum, the longer it stays
    top = tile_top;
#pragma unroll
    for (int c = Engine::COLS - 1; c >= 0; --c)
      index = Engine::at(s, r, c) == top ? at + Engine::col(c) : index;
  }
  __device__ __forceinline__ void add_lane(int mask) {
    const float other_top = simt::shfl_xor(top, mask);
    const int other_index = simt::shfl_xor(index, mask);
    entropy += simt::shfl_xor(entropy, mask);
    if (other_top > top || (other_top == top && other_index < index))
      top = other_top, index = other_index;
  }
  __device__ __forceinline__ void store(const AttentionStatsParams& p, const StatsBlock& block,
                                        int i) const {
    const auto at = [&](auto* tensor) {
      return tensor + head_offset(p.fwd, block.seq, block.b, block.h) + i;
    };
    const float lse = *at(static_cast<const float*>(p.fwd.lse));
    // Nothing to attend to; or a nan, which makes every weight a nan, and none of them the largest.
    const bool none = lse == -INFINITY, nan = lse != lse;
    if (p.entropy) *at(static_cast<float*>(p.entropy)) = none ? 0.f : nan ? lse : entropy / LOG2_E;
    if (p.top_weight)
      *at(static_cast<float*>(p.top_weight)) = none ? 0.f : nan ? lse : simt::exp2(top);
    if (p.top_index) *at(p.top_index) = none || nan ? -1 : index;
  }
};

// The sum of one key's weights, or of what one lane has seen of it.
struct ColumnSum {
  float sum = 0;

  template <class Engine>
  __device__ __forceinline__ void add(typename Engine::Products& s, int r, int) {
    float part = 0;
#pragma unroll
    for (int c = 0; c < Engine::COLS; ++c) part += simt::exp2(Engine::at(s, r, c));
    sum += part;
  }
  __device__ __forceinline__ void add_lane(int mask) { sum += simt::shfl_xor(sum, mask); }
  __device__ __forceinline__ void store(const AttentionStatsParams& p, const StatsBlock& block,
                                        int j) const {
    static_cast<float*>(
        p.column_sum)[block.b * p.column_batch + block.h * p.column_head + block.seq.k_row + j] =
        sum;
  }
};

// A pass over the other side of a block's rows.
template <class Engine, class Score, bool KEYS>
struct StatsPass {
  using Tile = typename Engine::Tile;
  using T = typename Tile::T;
  using Smem = StatsSmem<Tile>;
  using Products = typename Engine::Products;
  static constexpr int STEP = Tile::STEP, ROWS = Engine::ROWS, COLS = Engine::COLS;

  using Own = std::conditional_t<KEYS, ColumnSum, RowStats>;

  const Score& score;
  const StatsBlock& block;
  Smem& smem;
  const Steps steps;
  const float unit_log2;   // of the products where the policy is linear, else of the logits
  const float* const lse;  // of the head's query 0
  TileStream<typename Smem::OtherTile, Tile::THREADS> stream;  // of the next tile
  float next_base = 0;                                         // KEYS: of its query threadIdx.x
  int stage = 0;                                               // where this tile is
  Own own[ROWS];
  float base[ROWS] = {};  // of this lane's queries, where queries are owned

  __device__ __forceinline__ StatsPass(const AttentionStatsParams& p, const Score& score,
                                       const StatsBlock& block, Smem& smem, Steps steps,
                                       const GlobalMatrix<const T>& other)
      : score(score),
        block(block),
        smem(smem),
        steps(steps),
        unit_log2(Score::LINEAR ? float(p.fwd.scale) * LOG2_E : LOG2_E),
        lse(static_cast<const float*>(p.fwd.lse) + head_offset(p.fwd, block.seq, block.b, block.h)),
        stream(other, steps.first) {
    if constexpr (!KEYS) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) base[r] = base_of(block.first + Engine::row(r));
    }
  }

  // Of a row that is owned, and one of the other side.
  __device__ __forceinline__ static Pair pair(int mine, int other) {
    return KEYS ? Pair{other, mine} : Pair{mine, other};
  }
  // What log2 P of query i's pairs is counted from; -inf where it attends to nothing or does not
  // exist.
  __device__ __forceinline__ float base_of(int i) const {
    return i < block.seq.sq ? lse[i] * LOG2_E : -INFINITY;
  }

  // Starts the copy of the tile at `at`. WHOLE: TileStream's.
  template <bool WHOLE>
  __device__ __forceinline__ void fetch(int to, int at) {
    stream.template load<WHOLE>(smem.other[to], at);
    simt::cp_async_commit();
    if (KEYS && threadIdx.x < STEP) next_base = base_of(at + int(threadIdx.x));
  }

  // Whether nothing in the tile at `at` is masked and it, as the one after it, is whole and
  // chunked.
  __device__ __forceinline__ bool is_plain(int at) const {
    if (!stream.chunked() || at + 2 * STEP > stream.from.rows) return false;
    const int own_end = block.first + Tile::BLOCK;
    if (KEYS) return score.full(at, at + STEP, block.first, own_end);
    return score.full(block.first, own_end, at, at + STEP);
  }

  // s ← log2 P of the tile at `at`, from its products. MASKED: pairs may be masked out, or not
  // exist; they then have -inf, whatever s is.
  template <bool MASKED>
  __device__ __forceinline__ void weigh(Products& s, int at) const {
    const auto place = [&](int r, int c) {
      return pair(block.first + Engine::row(r), at + Engine::col(c));
    };
    const auto attends = [&](int r, int c, float base) {
      const auto [i, j] = place(r, c);
      if (!MASKED || base == -INFINITY) return !MASKED;
      if constexpr (Score::LINEAR)
        return i < block.seq.sq && bool(score.template keep<OneLane<float>>(i, j, 1));
      return Engine::at(s, r, c) != -INFINITY;
    };
    if constexpr (!Score::LINEAR)
      grid_logits<T, ROWS, COLS, !KEYS && Engine::NEIGHBORS>(
          score, block.seq.sq, pair(block.first, at), pair(block.first + Tile::BLOCK, at + STEP),
          ~0ull, [&](int r, int c) -> float& { return Engine::at(s, r, c); }, place);
#pragma unroll
    for (int c = 0; c < COLS; ++c) {
      const float column = KEYS ? smem.base[stage][Engine::col(c)] : 0.f;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float from = KEYS ? column : base[r];
        float& x = Engine::at(s, r, c);
        x = attends(r, c, from) ? fmaf(x, unit_log2, -from) : -INFINITY;
      }
    }
  }

  // The tile at `at`, which is on its way. PLAIN: is_plain says so; answers false, with nothing
  // done, if one of its queries attends to nothing all the same.
  template <bool PLAIN>
  __device__ __forceinline__ bool step(const Engine& engine, int at) {
    simt::cp_async_wait<0>();
    if (KEYS && threadIdx.x < STEP) smem.base[stage][threadIdx.x] = next_base;
    // The tile has landed for every thread, and no warp still reads the last one in the other
    // stage, which is overwritten now.
    if (KEYS && PLAIN) {
      if (simt::sync_or(next_base == -INFINITY)) return false;
    } else {
      simt::sync();
    }
    if (at + STEP < steps.last) {
      stream.move(STEP * stream.from.stride);
      fetch<PLAIN>(stage ^ 1, at + STEP);
    }
    Products s = {};
    engine.multiply(s, stage);
    weigh<!PLAIN>(s, at);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) own[r].template add<Engine>(s, r, at);
    stage ^= 1;
    return true;
  }

  // A policy that is not linear has one body for all tiles: less to compile.
  __device__ __forceinline__ void walk(const Engine& engine) {
    for (int at = steps.first; at < steps.last; at += STEP) {
      if constexpr (Score::LINEAR)
        while (is_plain(at) && step<true>(engine, at)) at += STEP;
      if (at < steps.last) step<false>(engine, at);
    }
  }
};

template <class Engine, class Score, bool KEYS>
__global__ void __launch_bounds__(Engine::Tile::THREADS, 2)
    attention_stats(const __grid_constant__ AttentionStatsParams p) {
  using Tile = typename Engine::Tile;
  using T = typename Tile::T;
  using Pass = StatsPass<Engine, Score, KEYS>;
  constexpr int BLOCK = Tile::BLOCK;
  const AttentionParams& f = p.fwd;
  const StatsBlock block(f, BLOCK, KEYS);
  const auto [b, h, h_kv, first, seq] = block;
  const int rows = KEYS ? seq.sk : seq.sq;
  if (first >= rows) return;  // a shorter sequence than the longest
  const int end = first + BLOCK < rows ? first + BLOCK : rows;
  const Score score(f, seq, b, h);
  const GlobalMatrix<const T> q(f.q, f.q_stride, b, h, seq.q_row, seq.sq, f.D);
  const GlobalMatrix<const T> k(f.k, f.k_stride, b, h_kv, seq.k_row, seq.sk, f.D);
  auto& smem = simt::shared<typename Pass::Smem>();

  const Steps steps = KEYS ? query_steps<Tile::STEP>(score, first, end, seq.sq)
                           : key_steps<Tile::STEP>(score, first, end);
  TileStream<typename Pass::Smem::OwnTile, Tile::THREADS>(KEYS ? k : q, first)
      .load(smem.own, first);
  simt::cp_async_commit();
  Pass pass(p, score, block, smem, steps, KEYS ? q : k);
  if (steps.first < steps.last) pass.template fetch<false>(0, steps.first);
  simt::cp_async_wait<0>();
  simt::sync();  // own rows have landed for every thread
  const Engine engine(smem);
  pass.walk(engine);

#pragma unroll
  for (int r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
    for (int mask = 1; mask < Engine::SHARING; mask *= 2) pass.own[r].add_lane(mask);
    const int at = first + Engine::row(r);
    if (threadIdx.x % Engine::SHARING == 0 && at < rows) pass.own[r].store(p, block, at);
  }
}

template <class T, class Score>
struct StatsEngines {
  template <int D>
  using Engine = StatsWarp<StatsTile<T, D, Score::LINEAR>>;
};
template <class Score>
struct StatsEngines<float, Score> {
  template <int D>
  using Engine = StatsLane<F32StatsTile<D>>;
};

template <class T, class Score>
Status launch_attention_stats(const AttentionStatsParams& p, const Exec& exec) {
  return with_dim_of<COARSE_HEAD_DIMS>(p.fwd.D, [&]<int D>(HeadDim<D>) -> Status {
    using Engine = typename StatsEngines<T, Score>::template Engine<D>;
    using Tile = typename Engine::Tile;
    static_assert(sizeof(StatsSmem<Tile>) == Tile::SHARED_BYTES);
    Status failed = nullptr;
    if (p.entropy || p.top_weight || p.top_index)
      failed = simt::launch(attention_stats<Engine, Score, false>,
                            stats_blocks(p.fwd, Tile::BLOCK, false), Tile::THREADS,
                            Tile::SHARED_BYTES, exec.stream, p);
    if (p.column_sum && !failed)
      failed =
          simt::launch(attention_stats<Engine, Score, true>, stats_blocks(p.fwd, Tile::BLOCK, true),
                       Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
    return failed;
  });
}

}  // namespace atx::ATX_TARGET
