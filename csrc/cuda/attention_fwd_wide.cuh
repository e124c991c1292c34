// o = softmax(score(q kᵀ)) v on tensor cores for head dimensions of up to 576 of q and k and 512 of
// v: what multi-head latent attention becomes when queries read its latent as it is (DeepSeek-V2,
// arXiv:2405.04434), V being the first columns of K.
//
// - block: 64 query rows of one (batch, head), or few queries of all heads that share a key head;
//   its loop walks over tiles of 32 keys, from the last to the first
// - warp w: of the scores, 16 rows with half of a tile's keys; of the output, all rows and 64
//   columns. 16 x 512 sums would be all the registers that a lane has
// - lane: the elements of fragment.h's C layout
//
// So weights change hands through shared memory, and with them what a row's exponents are counted
// from. Most tiles move no row's base (attention_block.cuh): a warp weighs its scores, and the
// barrier at which the weights change hands also asks whether some row has to move. If one has,
// warps tell each other the largest logits, and rows that must are weighed again.
//
// Shared memory: Q, 64 x 576 x 2 bytes = 72 KB; two tiles of keys, 2 x 36 KB; weights, 4 KB; what
// rows tell, 1.25 KB. That is 149 of the 163 KB that a block may have on sm_80, and too much for
// the 99 of sm_86 and sm_89: half the rows would fit there, but read every key twice as often.
//
// The second tile of keys is V's. Where V is a view of K, which has the same rows then, the tile of
// K is also V's, every row is read once, and the second tile is the next one's:
//
// - V is K's:  wait for K_j, copy K_{j-1}, S = Q K_jᵀ, weights of S, O += weights K_j
// - otherwise: wait for K_j, copy V_j, S = Q K_jᵀ, weights of S, wait for V_j, copy K_{j-1},
//   O += weights V_j
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/attention_fwd_wide_warp.cuh"

namespace atx::ATX_TARGET {

// Whether V's rows are the first columns of K's.
__device__ __forceinline__ bool v_is_view_of_k(const AttentionParams& p) {
  const Strides &k = p.k_stride, &v = p.v_stride;
  return p.v == p.k && p.Dv <= p.D && k.batch == v.batch && k.head == v.head && k.row == v.row;
}

// The weights of a tile of keys, in shared memory, counted from bases that fit them. masked: not
// every pair of the tile is attended to. is_view: V need not be waited for.
template <class Tile, class Score>
__device__ __forceinline__ void weigh_tile(WideWarp<Tile, Score>& warp, const AttentionParams& p,
                                           int kv0, int tile, bool masked, bool is_view) {
  constexpr int KV = WideWarp<Tile, Score>::KV;
  float s[1][KV / 8][4] = {}, part[1][2];
  if (warp.is_idle(kv0)) {
    warp.see_nothing(s);
  } else {
    const auto seen = warp.seen(kv0);
    warp.products(s, tile);
    if (!Score::LINEAR || masked) warp.template logits<true>(s, kv0, seen);
  }
  float x[1][KV / 8][4];
  warp.copy(x, s);
  warp.template weigh<true>(x, part);
  const bool moves = warp.must_move(s, part);
  warp.drop(x, p, kv0);
  warp.hand_over(x);
  if (!is_view) simt::cp_async_wait<0>();
  // Every warp's weights are there, V has landed for every thread, and no warp still reads K.
  if (!simt::sync_or(moves)) return warp.add(part);

  warp.tell(s, part);
  simt::sync();  // every warp knows what all rows ask for, and none reads weights yet
  warp.move_rows();
  warp.move_own_rows();
  warp.template weigh<true>(s, part);
  warp.add(part);
  warp.drop(s, p, kv0);
  warp.hand_over(s);
  simt::sync();  // every warp's weights are there, and none still reads the bases
  warp.keep_bases();
}

template <class Tile, class Score>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    attention_fwd_wide(const __grid_constant__ AttentionParams p) {
  using T = typename Tile::T;
  using Warp = WideWarp<Tile, Score>;
  constexpr int KV = Tile::BLOCK_KV, THREADS = Tile::THREADS;
  const typename Owned<Tile>::Block block(p, Tile::BLOCK_Q);
  const int b = block.b, h_kv = block.h_kv, q0 = block.q0, q1 = block.q1;
  const Sequence seq = block.seq;
  if (q0 >= seq.sq) return;  // a shorter sequence than the longest
  const Score score(p, seq, b, block.h);
  const GlobalMatrix<const T> k(p.k, p.k_stride, b, h_kv, seq.k_row, seq.sk, p.D);
  const GlobalMatrix<const T> v(p.v, p.v_stride, b, h_kv, seq.k_row, seq.sk, p.Dv);
  auto& smem = simt::shared<WideSmem<Tile>>();

  const auto [begin, end] = keys_of(p, block, score);
  const int first = begin / KV * KV;
  int kv0 = begin < end ? (end - 1) / KV * KV : first - KV;
  load_queries<THREADS>(smem.q, p, block);
  TileStream<typename Warp::KTile, THREADS> k_stream(k, kv0), v_stream(v, kv0);
  if (kv0 >= first) k_stream.load(smem.kv[0], kv0);
  simt::cp_async_commit();
  const Exponential<Score> exponential(float(p.scale));
  if (exponential.negative) {
    simt::cp_async_wait<0>();
    simt::sync();  // Q has landed for every thread; the loop's first barrier makes the new signs
                   // visible
    negate<THREADS>(smem.q);
  }

  Warp warp(smem, score, block.rows(p), exponential);
  const bool is_view = v_is_view_of_k(p);
  int tile = 0;  // where K is
  for (int next; kv0 >= first; kv0 = next) {
    next = tile_before<KV>(score, q0, q1, kv0);
    k_stream.step_back(kv0 - next);
    simt::cp_async_wait<0>();
    simt::sync();  // K has landed for every thread, and no warp still reads the other tile, which
                   // is overwritten now, or the weights
    if (!is_view)
      v_stream.load(smem.kv[1], kv0);
    else if (next >= first)
      k_stream.load(smem.kv[tile ^ 1], next);
    simt::cp_async_commit();
    v_stream.step_back(kv0 - next);

    const bool masked = !score.full(q0, q1, kv0, kv0 + KV);
    // Any of them may be 0: masked out, or dropped.
    const bool is_guarded = masked || !Score::LINEAR;
    weigh_tile(warp, p, kv0, tile, masked, is_view);
    const int v_tile = is_view ? tile : 1;
    const bool guarded = is_guarded && simt::sync_or(holds_nonfinite<THREADS>(smem.kv[v_tile]));
    if (!is_view && next >= first) k_stream.load(smem.kv[0], next);
    simt::cp_async_commit();
    warp.accumulate(v_tile, guarded);
    if (is_view) tile ^= 1;
  }

  // Found again, not kept: the loop needs the registers.
  const typename Owned<Tile>::Block out(p, Tile::BLOCK_Q);
  simt::cp_async_wait<0>();
  simt::sync();  // Q has landed even if no tile followed, and no warp still reads it: the output
                 // overwrites it
  warp.tell_sums();
  simt::sync();  // every warp knows what all have summed up
  warp.finish(out.rows(p), sink_of(p, out), lse_rows(p, out), output_of<T>(p, out));
  if constexpr (!Tile::SPLIT) {
    simt::sync();  // threads store what others have written
    store_rows<Tile::BLOCK_Q, THREADS>(output_of<T>(p, out), out.q0, smem.q, 0);
  }
}

template <class T, class Score>
Status launch_attention_fwd_wide(const AttentionParams& p, const Exec& exec) {
  using Tile = WideTile<T, Score::LINEAR, false>;
  static_assert(sizeof(WideSmem<Tile>) == Tile::SHARED_BYTES);
  return simt::launch(attention_fwd_wide<Tile, Score>, attention_blocks(p, Tile::BLOCK_Q),
                      Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
}

// The chunks of a call of few queries, into the workspace.
template <class T, class Score>
Status launch_attention_fwd_wide_split(const AttentionParams& p, const Exec& exec) {
  using Tile = WideTile<T, Score::LINEAR, true>;
  static_assert(sizeof(WideSmem<Tile>) == Tile::SHARED_BYTES);
  return simt::launch(attention_fwd_wide<Tile, Score>,
                      split_blocks(p, Tile::BLOCK_Q, Tile::GROUPED), Tile::THREADS,
                      Tile::SHARED_BYTES, exec.stream, p);
}

}  // namespace atx::ATX_TARGET
