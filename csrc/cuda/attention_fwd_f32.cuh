// o = softmax(score(q kᵀ)) v in f32: every product an FMA, no tensor cores, whose f32 inputs keep
// 11 bits. Keys are visited from the last to the first, and K and V take turns in shared memory, as
// in attention_fwd.cuh.
//
// - block: BLOCK_Q query rows of one (batch, head); its loop walks over tiles of BLOCK_KV keys
// - warp w: the rows w + 4 g + 8 i, of half-warp g = 0, 1, from the logits to the output
// - lane: its half-warp's rows; of S, keys lane % 16 + 16 j; of O, columns lane % 16 · 2 + 32 c and
//   the next
//
// Weights change hands within a warp through shared memory. The two rows that a warp touches at
// once differ by 4, so that the swizzle (tile.cuh) puts them into different banks.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/grid_logits.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/nonfinite.cuh"
#include "csrc/cuda/seen.cuh"
#include "csrc/cuda/split.cuh"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
struct F32Smem {
  SmemTile<float, Tile::BLOCK_Q, Tile::D> q;  // at the end, the output on its way out
  SmemTile<float, Tile::BLOCK_KV, Tile::D> k, v;
  SmemTile<float, Tile::BLOCK_Q, Tile::P_COLS> p;
};

// A lane's view of its block.
template <class Tile, class Score>
struct F32Lane {
  static constexpr int ROWS = Tile::BLOCK_Q / 8, KEYS = Tile::BLOCK_KV / 16, COLS = Tile::D / 32;

  F32Smem<Tile>& smem;
  const Score& score;
  const typename Owned<Tile>::Rows rows;
  const int column, first_row;
  const Exponential<Score> exponential;
  float o[ROWS][COLS][2] = {};       // Σ 2^exponent v
  float base[ROWS], sum[ROWS] = {};  // of the exponents; Σ 2^exponent over this lane's keys

  __device__ __forceinline__ F32Lane(F32Smem<Tile>& smem, const Score& score,
                                     const typename Owned<Tile>::Rows& rows,
                                     Exponential<Score> exponential)
      : smem(smem),
        score(score),
        rows(rows),
        column(int(threadIdx.x) % 16),
        first_row(int(threadIdx.x) / 32 + int(threadIdx.x) % 32 / 16 * 4),
        exponential(exponential) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) base[i] = -INFINITY;
  }
  __device__ __forceinline__ int row(int i) const { return first_row + 8 * i; }
  __device__ __forceinline__ int key(int j) const { return column + 16 * j; }
  __device__ __forceinline__ Pair pair(int i, int j, int kv0) const {
    return {rows.position(row(i)), kv0 + key(j)};
  }

  // s = Q Kᵀ
  __device__ __forceinline__ void products(float (&s)[ROWS][KEYS]) const {
#pragma unroll 1
    for (int c = 0; c < Tile::D / 4; ++c) {
      Float4 k[KEYS];
#pragma unroll
      for (int j = 0; j < KEYS; ++j) k[j] = reinterpret_cast<Float4&>(*smem.k.chunk(key(j), c));
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const Float4 q = reinterpret_cast<Float4&>(*smem.q.chunk(row(i), c));
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j] = fmaf(q.x[e], k[j].x[e], s[i][j]);
        }
      }
    }
  }

  template <bool MASKED>
  __device__ __forceinline__ void logits(float (&s)[ROWS][KEYS], int kv0) const {
    const auto at = [&](int r, int c) -> float& { return s[r][c]; };
    const auto place = [&](int r, int c) { return pair(r, c, kv0); };
    typename PairBits<ROWS * KEYS>::Word seen = ~typename PairBits<ROWS * KEYS>::Word(0);
    const Pair from = {rows.first, kv0}, to = {from.i + Tile::BLOCK_Q, kv0 + Tile::BLOCK_KV};
    if constexpr (MASKED) seen = seen_pairs<ROWS, KEYS, false>(score, from, to, place);
    if constexpr (!Score::LINEAR) {
      grid_logits<float, ROWS, KEYS, false>(score, rows.sq, from, to, seen, at, place);
    } else if constexpr (MASKED) {
      for_grid<ROWS, KEYS>([&](int r, int c) {
        const auto [i, j] = place(r, c);
        s[r][c] = masked_product(score, s[r][c], i, j, seen >> (r * KEYS + c) & 1);
      });
    }
  }

  // Moves the base of each row whose weights, counted from it, would be too large.
  __device__ __forceinline__ void move_bases(const float (&s)[ROWS][KEYS]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float top = s[i][0];
#pragma unroll
      for (int j = 1; j < KEYS; ++j) top = fmaxf(top, s[i][j]);
#pragma unroll
      for (int mask = 1; mask < 16; mask *= 2) top = fmaxf(top, simt::shfl_xor(top, mask));
      // Without a key in this row up to now, the weight is 2^inf, or nan where there still is none.
      if (!(exponential.weight(top, base[i]) > Exponential<Score>::LIMIT)) continue;
      const float to = exponential.base_at(top), factor = exponential.rebase(base[i], to);
      base[i] = to;
      sum[i] *= factor;
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
        o[i][c][0] *= factor;
        o[i][c][1] *= factor;
      }
    }
  }

  // smem.p ← what dropout leaves of the weights.
  template <bool MASKED>
  __device__ __forceinline__ void weigh(const float (&s)[ROWS][KEYS], const AttentionParams& p,
                                        int kv0) {
    uint32_t kept = ~0u;
    float factor = 1;
    if constexpr (!Score::LINEAR) {
      if (p.dropout > 0) {
        const typename Owned<Tile>::Block block(p, Tile::BLOCK_Q);  // found again, not kept
        kept = kept_pairs<Calls<ROWS, KEYS, false, 1>>(
            p, block.b, block.h, [&](int i, int j) { return pair(i, j, kv0); });
        factor = kept_factor<float>(p);
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      // A row without a key up to now: any finite base gives 2^-inf = 0.
      const float from = MASKED && base[i] == -INFINITY ? 0.f : base[i];
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        const float weight = exponential.weight(s[i][j], from);
        sum[i] += weight;
        if constexpr (Score::LINEAR)
          smem.p.at(row(i), key(j)) = weight;
        else
          smem.p.at(row(i), key(j)) = kept >> (i * KEYS + j) & 1 ? weight * factor : 0.f;
      }
    }
  }

  // o += P V. GUARDED: V holds nan or inf, which reach only the rows that attend to them.
  template <bool GUARDED>
  __device__ __forceinline__ void accumulate() {
#pragma unroll 1
    for (int j = 0; j < Tile::BLOCK_KV; j += 4) {
      Float4 p[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) p[i] = reinterpret_cast<Float4&>(*smem.p.chunk(row(i), j / 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* const values = &smem.v.at(j + e, column * 2);  // and whole periods further
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
          const Float2 v = *reinterpret_cast<const Float2*>(values + 32 * c);
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              const float added = fmaf(p[i].x[e], v.x[x], o[i][c][x]);
              o[i][c][x] = GUARDED && p[i].x[e] == 0.f ? o[i][c][x] : added;
            }
          }
        }
      }
    }
  }

  // Rows of o, divided by their sums, to this warp's rows of smem.q; their lse to memory.
  __device__ __forceinline__ void finish(const typename Owned<Tile>::Rows& rows, float sink,
                                         float* lse) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float total = sum[i];
#pragma unroll
      for (int mask = 1; mask < 16; mask *= 2) total += simt::shfl_xor(total, mask);
      const RowEnd end(exponential.logit(base[i]), total, sink);
      if (lse && column == 0 && rows.exists(row(i))) lse[rows.first + row(i)] = end.lse;
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
        reinterpret_cast<Float2&>(smem.q.at(row(i), column * 2 + 32 * c)) = {
            o[i][c][0] * end.factor, o[i][c][1] * end.factor};
      }
    }
  }
};

// A tile of keys, whose K is on the way.
// PLAIN: nothing is masked, and K and V are chunked.
template <bool PLAIN, class Tile, class Score, class Stream>
__device__ __forceinline__ void attend(F32Lane<Tile, Score>& lane, const AttentionParams& p,
                                       Stream& k, Stream& v, int kv0, int next, int first) {
  F32Smem<Tile>& smem = lane.smem;
  simt::cp_async_wait<0>();
  simt::sync();  // K has landed for every thread, and no warp still reads the last V, which is
                 // overwritten now
  v.template load<PLAIN>(smem.v, kv0);
  simt::cp_async_commit();

  float s[F32Lane<Tile, Score>::ROWS][F32Lane<Tile, Score>::KEYS] = {};
  lane.products(s);
  if constexpr (!PLAIN || !Score::LINEAR) lane.template logits<!PLAIN>(s, kv0);
  lane.move_bases(s);
  lane.template weigh<!PLAIN>(s, p, kv0);

  simt::cp_async_wait<0>();
  simt::sync();  // V has landed and P is written; no warp still reads K, which is overwritten now
  k.step_back(kv0 - next);
  if (next >= first) k.template load<PLAIN>(smem.k, next);
  simt::cp_async_commit();
  if (!PLAIN && simt::sync_or(holds_nonfinite<Tile::THREADS>(smem.v)))
    lane.template accumulate<true>();
  else
    lane.template accumulate<false>();
  v.step_back(kv0 - next);
}

template <class Tile, class Score>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    attention_fwd_f32(const __grid_constant__ AttentionParams p) {
  constexpr int KV = Tile::BLOCK_KV, THREADS = Tile::THREADS;
  const typename Owned<Tile>::Block block(p, Tile::BLOCK_Q);
  const int b = block.b, h_kv = block.h_kv, q0 = block.q0, q1 = block.q1;
  const Sequence seq = block.seq;
  if (q0 >= seq.sq) return;  // a shorter sequence than the longest
  const Score score(p, seq, b, block.h);
  const GlobalMatrix<const float> k(p.k, p.k_stride, b, h_kv, seq.k_row, seq.sk, p.D);
  const GlobalMatrix<const float> v(p.v, p.v_stride, b, h_kv, seq.k_row, seq.sk, p.Dv);
  F32Smem<Tile>& smem = simt::shared<F32Smem<Tile>>();

  const auto [begin, end] = keys_of(p, block, score);
  const int first = begin / KV * KV;
  int kv0 = begin < end ? (end - 1) / KV * KV : first - KV;
  load_queries<THREADS>(smem.q, p, block);
  TileStream<decltype(smem.k), THREADS> k_stream(k, kv0), v_stream(v, kv0);
  if (kv0 >= first) k_stream.load(smem.k, kv0);
  simt::cp_async_commit();
  const Exponential<Score> exponential(float(p.scale));
  if (exponential.negative) {
    simt::cp_async_wait<0>();
    simt::sync();  // Q has landed for every thread; the loop's first barrier makes the new signs
                   // visible
    negate<THREADS>(smem.q);
  }

  F32Lane<Tile, Score> lane(smem, score, block.rows(p), exponential);
  const auto plain = [&](int j) {
    return k_stream.chunked() && v_stream.chunked() && score.full(q0, q1, j, j + KV);
  };
  for (int next; kv0 >= first; kv0 = next) {
    next = tile_before<KV>(score, q0, q1, kv0);
    if (plain(kv0))
      attend<true>(lane, p, k_stream, v_stream, kv0, next, first);
    else
      attend<false>(lane, p, k_stream, v_stream, kv0, next, first);
  }

  // Found again, not kept: the loop needs the registers.
  const typename Owned<Tile>::Block out(p, Tile::BLOCK_Q);
  simt::cp_async_wait<0>();
  simt::sync();  // Q has landed even if no tile followed, and no lane still reads it: the output
                 // overwrites it
  lane.finish(out.rows(p), sink_of(p, out), lse_rows(p, out));
  simt::sync();  // lanes store what others have written
  store_rows<Tile::BLOCK_Q, THREADS>(output_of<float>(p, out), out.rows(p).first, smem.q, 0);
}

template <class Score>
Status launch_attention_fwd_f32(const AttentionParams& p, const Exec& exec) {
  return with_dim_of<DIMS<float, Score>>(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = F32Tile<D>;
    static_assert(sizeof(F32Smem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd_f32<Tile, Score>, attention_blocks(p, Tile::BLOCK_Q),
                        Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
  });
}

// The chunks of a call of few queries, into the workspace.
template <class Score>
Status launch_attention_fwd_split_f32(const AttentionParams& p, const Exec& exec) {
  return with_dim_of<COARSE_HEAD_DIMS>(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = F32SplitTile<D, Score::LINEAR>;
    static_assert(sizeof(F32Smem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd_f32<Tile, Score>,
                        split_blocks(p, Tile::BLOCK_Q, Tile::GROUPED), Tile::THREADS,
                        Tile::SHARED_BYTES, exec.stream, p);
  });
}

}  // namespace atx::ATX_TARGET
