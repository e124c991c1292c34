// o = softmax(score(q kᵀ)) v on tensor cores, for bf16 and f16, and for f32 whose products may be
// rounded to tf32: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with the keys
// visited from the last to the first.
//
// - block: BLOCK_Q query rows of one (batch, head); its loop walks over tiles of BLOCK_KV keys
// - warp: 16 M of these rows, from the logits to the output, with no exchange between warps
// - lane: the elements of fragment.h's C layout, of two rows that it shares with three neighbors
//
// A tile of K and one of V take turns in shared memory, and each copy runs under the other's
// product, which hides as much latency as two stages of both would, in half the space:
//
// - wait for K_j, copy V_j, S = Q K_jᵀ, weights of S
// - wait for V_j, copy K_{j-1}, O += weights V_j
//
// Weights never leave registers, since the C layout of S is their A layout (tile.cuh: of tf32 too).
// Most tiles are plain: nothing is masked, and the base that a row's exponents are counted from is
// good enough (attention_block.cuh), which the sums of the weights tell without a search for the
// maximum. The others take the general body: masks, new bases, unaligned tensors, and values that
// are nan or inf (nonfinite.cuh). A tile that turns out not to be plain is simply done again.
// General's tiles are plain whatever masks them.
//
// Plain loop, nvcc 13.0, sm_80, policy Window: SASS instructions per HMMA (and registers)
// - D 32: 5.89 (255), 64: 3.70 (255), 96: 3.43 (235), 128: 2.95 (255), 192: 3.49 (222), 256: 2.96
//   (255). No kernel spills.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/attention_fwd_chunk.cuh"
#include "csrc/cuda/attention_fwd_warp.cuh"
#include "csrc/cuda/nonfinite.cuh"

namespace atx::ATX_TARGET {

// A tile of keys whose K is on the way, in full generality: masked, of any alignment, with any
// values. A block has few of these, so the next K is copied only when all is done. next: the tile
// after it, before `first` if there is none.
template <class Tile, class Score, class KStream, class VStream>
__device__ __forceinline__ void attend(AttentionWarp<Tile, Score>& warp, const AttentionParams& p,
                                       KStream& k, VStream& v, int kv0, int next, int first) {
  constexpr int KV = AttentionWarp<Tile, Score>::KV, M = Tile::M, THREADS = Tile::THREADS;
  FwdSmem<Tile>& smem = warp.smem;
  simt::cp_async_wait<0>();
  k.settle(smem.k);
  simt::sync();  // K has landed for every thread, and no warp still reads the last V, which is
                 // overwritten now
  v.load(smem.v, kv0);
  simt::cp_async_commit();

  typename AttentionWarp<Tile, Score>::Weights weights = {};
  const bool idle = warp.is_idle(kv0);
  if (!idle) {
    const uint64_t seen = warp.seen(kv0);
    float s[M][KV / 8][4] = {}, part[M][2];
    warp.products(s);
    warp.template logits<true>(s, kv0, seen);
    warp.move_bases(s);
    warp.template weigh<true>(s, part);
    warp.add(part);
    warp.drop(s, p, kv0);
    warp.pack(weights, s);
  }

  simt::cp_async_wait<0>();
  v.settle(smem.v);
  simt::sync();  // V has landed for every thread, and no warp still reads K, which may become V's
                 // marks now
  const bool split = simt::sync_or(holds_nonfinite<THREADS>(smem.v));
  if (split) {
    split_nonfinite<THREADS>(smem.v, smem.v_marks());
    simt::sync();  // every warp multiplies with what all threads have split
  }
  if (!idle) warp.accumulate(weights);
  if (split && !idle)
    add_nonfinite(warp.o, weights,
                  DownAddress<decltype(smem.v)>(smem.v_marks(), warp.first_key(), warp.lane()));
  simt::sync();  // no warp still reads the marks in K's place, which is overwritten now
  k.step_back(kv0 - next);
  v.step_back(kv0 - next);
  if (next >= first) {
    k.load(smem.k, next);
    warp.load_mask(next);
  }
  simt::cp_async_commit();
}

// The same for a whole tile of chunked K and V, if no row's weights grow too large: one that
// nothing masks, or of General any, where the output tells whether V has a nan or inf that may be
// masked. Otherwise answers false and leaves everything to attend: K is still there, V is copied
// again.
template <class Tile, class Score, class KStream, class VStream>
__device__ __forceinline__ bool attend_plain(AttentionWarp<Tile, Score>& warp,
                                             const AttentionParams& p, KStream& k, VStream& v,
                                             int kv0, int next, int first) {
  constexpr int KV = AttentionWarp<Tile, Score>::KV, M = Tile::M;
  FwdSmem<Tile>& smem = warp.smem;
  simt::cp_async_wait<0>();
  k.template settle<true>(smem.k);
  simt::sync();  // K has landed for every thread, and no warp still reads the last V, which is
                 // overwritten now
  v.template load<true>(smem.v, kv0);
  simt::cp_async_commit();

  float s[M][KV / 8][4] = {}, part[M][2];
  warp.products(s);
  if constexpr (!Score::LINEAR)
    warp.template logits<false>(s, kv0, ~uint64_t(0), warp.mask_of(kv0));
  warp.template weigh<false>(s, part);
  warp.drop(s, p, kv0);
  typename AttentionWarp<Tile, Score>::Weights weights;
  warp.pack(weights, s);

  simt::cp_async_wait<0>();
  v.template settle<true>(smem.v);
  // V has landed for every thread, and no warp still reads K, which is overwritten now
  if (simt::sync_or(warp.too_large(part))) return false;
  k.step_back(kv0 - next);
  if (next >= first) {
    k.template load<true>(smem.k, next);
    warp.load_mask(next);
  }
  simt::cp_async_commit();
  warp.add(part);
  warp.accumulate(weights);
  v.step_back(kv0 - next);
  return true;
}

template <class Tile, class Score>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    attention_fwd(const __grid_constant__ AttentionParams p) {
  using T = typename Tile::T;
  constexpr int KV = Tile::BLOCK_KV, THREADS = Tile::THREADS;
  const typename Owned<Tile>::Block block(p, Tile::BLOCK_Q);
  const int b = block.b, h_kv = block.h_kv, q0 = block.q0, q1 = block.q1;
  const Sequence seq = block.seq;
  if (q0 >= seq.sq) return;  // a shorter sequence than the longest
  const Score score(p, seq, b, block.h);
  const GlobalMatrix<const T> k(p.k, p.k_stride, b, h_kv, seq.k_row, seq.sk, p.D);
  const GlobalMatrix<const T> v(p.v, p.v_stride, b, h_kv, seq.k_row, seq.sk, p.Dv);
  FwdSmem<Tile>& smem = simt::shared<FwdSmem<Tile>>();

  // Tiles of keys from the last to the first: the diagonal of a causal mask, and what is near it,
  // sets the bases.
  const auto [begin, end] = keys_of(p, block, score);
  int first = begin / KV * KV;  // less 1, which changes no comparison: no tile is taken for plain
  int kv0 = begin < end ? (end - 1) / KV * KV : first - KV;
  load_queries<THREADS>(smem.q, p, block);
  simt::cp_async_commit();
  TileStream<decltype(smem.k), THREADS> k_stream(k, kv0);
  TileStream<decltype(smem.v), THREADS> v_stream(v, kv0);
  if (kv0 >= first) k_stream.load(smem.k, kv0);
  simt::cp_async_commit();
  simt::cp_async_wait<1>();
  simt::sync();  // Q has landed for every thread
  if constexpr (std::is_same_v<T, tf32>) {
    round_chunks<THREADS>(smem.q);
    simt::sync();  // every warp reads what all threads have rounded
  }
  const Exponential<Score> exponential(float(p.scale));
  if (exponential.negative) {
    negate<THREADS>(smem.q);
    simt::sync();  // every warp reads what all threads have negated
  }

  AttentionWarp<Tile, Score> warp(smem, score, block.rows(p), exponential);
  warp.keep_q();
  const auto before = [&](int j) { return tile_before<KV>(score, q0, q1, j); };
  // General's kernels ask tile by tile what masks it, and only in the end whether nan or inf of V
  // has come to where it may be masked.
  constexpr bool TELLS_PLAIN = Score::LINEAR || Score::SPARSE;
  const auto plain = [&](int j) {
    return j >= first && (!TELLS_PLAIN || score.full(q0, q1, j, j + KV));
  };
  if constexpr (Score::SPARSE) {
    for (int next; kv0 >= first; kv0 = next) {
      next = before(kv0);
      attend(warp, p, k_stream, v_stream, kv0, next, first);
      if (!k_stream.chunked() || !v_stream.chunked()) continue;
      for (int after; plain(next); next = after) {
        after = before(next);
        if (!attend_plain(warp, p, k_stream, v_stream, next, after, first)) break;
      }
    }
  } else {
    // The same with one position in a register: with two, Window spilled on sm_90a at D 128. Below
    // a tile that nothing masks, the window's left edge alone may: one bound for the loop to hold,
    // where there is a register for it (D 192 spilled on sm_90a, few queries' D 256 on sm_80).
    constexpr bool KNOWS_EDGE = TELLS_PLAIN && Tile::D != 192 && !Tile::SPLIT;
    for (; kv0 >= first; kv0 -= KV) {
      attend(warp, p, k_stream, v_stream, kv0, kv0 - KV, first);
      const bool careful = !TELLS_PLAIN && first % 2 != 0;
      if (careful || !k_stream.chunked() || !v_stream.chunked()) continue;
      const auto pass = [&](int j) {
        return attend_plain(warp, p, k_stream, v_stream, j, j - KV, first);
      };
      if (TELLS_PLAIN && !plain(kv0 - KV)) continue;
      const int edge = KNOWS_EDGE ? score.full_from(q1) : first;
      const int plain_first = edge > first ? edge : first;
      const auto more = [&](int j) { return KNOWS_EDGE ? j >= plain_first : plain(j); };
      while (more(kv0 - KV) && pass(kv0 - KV)) kv0 -= KV;
      if (TELLS_PLAIN || kv0 != first || !simt::sync_or(!warp.is_finite())) continue;
      // A nan or inf of V may have come to where it is masked out. The same again, as if no tile
      // were plain; no warp still reads K, which is overwritten now.
      --first;
      warp.start_again();
      const int last =
          (keys_of(p, typename Owned<Tile>::Block(p, Tile::BLOCK_Q), score).end - 1) / KV * KV;
      k_stream.step_back(kv0 - KV - last);
      v_stream.step_back(kv0 - KV - last);
      kv0 = last + KV;
      k_stream.load(smem.k, last);
      simt::cp_async_commit();
    }
  }

  // Found again, not kept: the loop needs the registers.
  const typename Owned<Tile>::Block out(p, Tile::BLOCK_Q);
  if constexpr (Tile::SPLIT) {
    finish_chunk(warp, p, out);
  } else {
    simt::sync_warp();  // no lane still reads this warp's rows of Q, which the output overwrites
    warp.finish(out, sink_of(p, out), lse_rows(p, out));
    simt::sync_warp();  // lanes store what others have written
    store_rows<16 * Tile::M, 32>(output_of<T>(p, out), out.q0 + warp.first_row(), smem.q,
                                 warp.first_row());
  }
}

template <class T, class Score>
Status launch_attention_fwd(const AttentionParams& p, const Exec& exec) {
  return with_head_dims<T, Score>(p.D, p.Dv, [&]<int D, int DV>(HeadDim<D, DV>) {
    using Tile = typename FwdTileOf<T, D, DV, Score::LINEAR>::Tile;
    static_assert(sizeof(FwdSmem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd<Tile, Score>, attention_blocks(p, Tile::BLOCK_Q),
                        Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
  });
}

template <class Score>
Status launch_attention_fwd_tf32(const AttentionParams& p, const Exec& exec) {
  return with_dim_of<COARSE_HEAD_DIMS>(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = Tf32Tile<D, Score::LINEAR>;
    static_assert(sizeof(FwdSmem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd<Tile, Score>, attention_blocks(p, Tile::BLOCK_Q),
                        Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
  });
}

// The chunks of a call of few queries, into the workspace.
template <class T, class Score>
Status launch_attention_fwd_split(const AttentionParams& p, const Exec& exec) {
  return with_dim_of<COARSE_HEAD_DIMS>(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = SplitTile<T, D, Score::LINEAR>;
    static_assert(sizeof(FwdSmem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd<Tile, Score>, split_blocks(p, Tile::BLOCK_Q, Tile::GROUPED),
                        Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
  });
}

}  // namespace atx::ATX_TARGET
