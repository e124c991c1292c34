// The gradients of q, k and v: what FlashAttention-2 (Dao 2023, arXiv:2307.08691) computes in its
// algorithm 2, but in passes that each own what they sum up, so that no addition is atomic and
// results do not depend on the order of blocks:
//
// - Pass::Q: a block owns rows of Q, and walks over keys: dQ = scale dX K
// - Pass::KV: a block owns rows of K, and walks over the queries of every head that reads them:
//   dK = scale dXᵀ Q, dV = (M P)ᵀ dO. Where a warp has no registers for both: Pass::K, Pass::V
//
// Both are one loop. The block's own rows A = Q, B = dO (or K, V) stay in shared memory; tiles of
// the other side, A' = K, B' = V (or Q, dO), pass by. Of each tile,
//
//   X = A A'ᵀ,  dW = B B'ᵀ,  pairs (attention_bwd_block.cuh),  dA += dX A',  dB += (M P) B'
//
// Engine multiplies: BwdWarp on tensor cores, BwdWideWarp there beyond D 256, BwdLane on FMA units.
// As in the forward, most tiles are plain: nothing is masked, and both of its sides are whole. The
// others may hold nan or inf that only some rows attend to: the engines' accumulate_guarded.
//
// Plain loop, nvcc 13.0, sm_80, policy Window: SASS instructions per HMMA (and registers) of
// Pass::Q and Pass::KV, or of Pass::Q, K and V. Scores are computed in each: 7 products, or 8,
// for 5.
// - D 32: 5.10 (176), 5.42 (202). 64: 3.38 (245), 3.58 (255). 96: 2.81 (241), 3.54 (238). 128: 2.62
//   (255), 3.17 (254). 192: 2.82 (243), 3.01 (254), 3.29 (246). 256: 2.89 (255), 3.39 (255), 3.77
//   (255). What registers hold (BwdTile) spared D 128's Pass::Q 0.7, and an H100 6 to 14 % of the
//   passes' time (docs/h100.md).
// - tf32, the turns of its rounding loops counted, before plain tiles were two bounds: D 64: 5.08,
//   5.55. 128: 6.69, 7.05.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/cuda/attention_bwd_lane.cuh"
#include "csrc/cuda/attention_bwd_pass.cuh"
#include "csrc/cuda/attention_bwd_warp.cuh"
#include "csrc/cuda/attention_bwd_wide_warp.cuh"

namespace atx::ATX_TARGET {

template <class Engine, class Score>
__global__ void __launch_bounds__(Engine::Tile::THREADS, Engine::Tile::BLOCKS)
    attention_bwd(const __grid_constant__ AttentionBwdParams p) {
  using T = typename Engine::T;
  using This = BwdPass<Engine, Score>;
  using Tile = typename Engine::Tile;
  constexpr int THREADS = Tile::THREADS, BLOCK = Tile::BLOCK;
  constexpr bool KEYS = This::KEYS;
  const AttentionParams& f = p.fwd;
  const BwdBlock block(f, BLOCK, KEYS);
  const auto [b, h_kv, h0, h1, first, seq] = block;
  const int rows = KEYS ? seq.sk : seq.sq;
  if (first >= rows) return;  // a shorter sequence than the longest
  const int end = first + BLOCK < rows ? first + BLOCK : rows;
  const GlobalMatrix<const T> q(f.q, f.q_stride, b, h0, seq.q_row, seq.sq, f.D);
  const GlobalMatrix<const T> k(f.k, f.k_stride, b, h_kv, seq.k_row, seq.sk, f.D);
  const GlobalMatrix<const T> v(f.v, f.v_stride, b, h_kv, seq.k_row, seq.sk, f.Dv);
  const GlobalMatrix<const T> d_o(p.d_o, p.d_o_stride, b, h0, seq.q_row, seq.sq, f.Dv);
  auto& smem = simt::shared<typename This::Smem>();

  const Score some(f, seq, b, h0);  // of the heads, which have the same range
  const Steps steps = Score::SPARSE ? Steps{0, KEYS ? seq.sq : seq.sk}
                      : KEYS        ? query_steps<Engine::STEP>(some, first, end, seq.sq)
                                    : key_steps<Engine::STEP>(some, first, end);
  using OwnStream = TileStream<typename Engine::OwnTile, THREADS>;
  OwnStream(KEYS ? k : q, first).load(smem.own[0], first);
  if constexpr (This::SUMS_A) OwnStream(KEYS ? v : d_o, first).load(smem.own[1], first);
  This pass(p, block, smem, steps, KEYS ? q : k, KEYS ? d_o : v);
  if (!Score::SPARSE && steps.first < steps.last && h0 < h1)
    pass.template fetch<false>(0, steps.first);
  simt::cp_async_commit();
  if constexpr (Tile::HELD > 0 || std::is_same_v<T, tf32>) {
    simt::cp_async_wait<0>();
    simt::sync();  // own rows have landed for every thread
  }
  if constexpr (std::is_same_v<T, tf32>) {
    round_chunks<THREADS>(smem.own[0]);
    if constexpr (This::SUMS_A) round_chunks<THREADS>(smem.own[1]);
    if constexpr (Tile::HELD > 0) simt::sync();  // every warp holds what all threads have rounded
  }
  if constexpr (Tile::HELD > 0) {
    pass.engine.hold();
  }
  const bool plain = This::TELLS_PLAIN && (KEYS || !pass.holds_void_row());
  if constexpr (KEYS) {
    for (int h = h0; h < h1; ++h) pass.walk(Score(f, seq, b, h), h, plain);
  } else {
    pass.walk(some, h0, plain);
  }

  simt::cp_async_wait<0>();
  simt::sync();  // own rows have landed even if no tile followed, and no lane still reads them: the
                 // gradients overwrite them
  if constexpr (This::SUMS_A)
    pass.engine.finish(pass.sums_a, Score::LINEAR ? float(f.scale) : 1.f, 0);
  if constexpr (This::SUMS_B) pass.engine.finish(pass.sums_b, 1, 1);
  simt::sync();  // threads store what others have written
  // Found again, not kept: the loop needs the registers.
  const BwdBlock out(f, BLOCK, KEYS);
  const auto store = [&](void* to, const Strides& stride, int cols, int a) {
    if (!to) return;
    const GlobalMatrix<T> matrix(to, stride, out.b, KEYS ? out.h_kv : out.h0,
                                 KEYS ? out.seq.k_row : out.seq.q_row,
                                 KEYS ? out.seq.sk : out.seq.sq, cols);
    store_rows<BLOCK, THREADS>(matrix, out.first, smem.own[a], 0);
  };
  if constexpr (KEYS) {
    if constexpr (This::SUMS_A) store(p.d_k, p.d_k_stride, f.D, 0);
    if constexpr (This::SUMS_B) store(p.d_v, p.d_v_stride, f.Dv, 1);
  } else {
    store(p.d_q, p.d_q_stride, f.D, 0);
    if constexpr (This::SHARES) pass.store_shares(out);
  }
}

template <class Engine, class Score>
Status launch_bwd_pass(const AttentionBwdParams& p, const Exec& exec) {
  using Tile = typename Engine::Tile;
  static_assert(sizeof(BwdSmem<Engine>) == Tile::SHARED_BYTES);
  return simt::launch(attention_bwd<Engine, Score>,
                      bwd_blocks(p.fwd, Tile::BLOCK, owns_keys(Tile::PASS)), Tile::THREADS,
                      Tile::SHARED_BYTES, exec.stream, p);
}

// Head dimensions beyond 256.
template <class T, class Score>
Status launch_attention_bwd_wide(const AttentionBwdParams& p, const Exec& exec) {
  Status failed = nullptr;
  if (p.d_q || p.row_shares)
    failed = launch_bwd_pass<BwdWideWarp<WideBwdTile<T, Pass::Q>>, Score>(p, exec);
  if (!failed && (p.d_k || p.d_v))
    failed = launch_bwd_pass<BwdWideWarp<WideBwdTile<T, Pass::KV>>, Score>(p, exec);
  return failed;
}

template <class T, class Score>
struct BwdEngines {
  template <int D, int DV, Pass PASS>
  using Engine = BwdWarp<typename BwdTileOf<T, D, DV, PASS, ONLY_SCALES<Score>>::Tile>;
};
template <class Score>
struct BwdEngines<tf32, Score> {
  template <int D, int, Pass PASS>
  using Engine = BwdWarp<Tf32BwdTile<D, PASS, ONLY_SCALES<Score>>>;
};
template <class Score>
struct BwdEngines<float, Score> {
  template <int D, int, Pass PASS>
  using Engine = BwdLane<F32BwdTile<D, PASS>>;
};

template <class T, class Score>
Status launch_attention_bwd(const AttentionBwdParams& p, const Exec& exec) {
  return with_bwd_dims<T, Score>(p.fwd.D, p.fwd.Dv, [&]<int D, int DV>(HeadDim<D, DV>) -> Status {
    using Engines = BwdEngines<T, Score>;
    Status failed = nullptr;
    const auto launch = [&]<Pass PASS>() {
      if (!failed)
        failed = launch_bwd_pass<typename Engines::template Engine<D, DV, PASS>, Score>(p, exec);
    };
    if (p.d_q || p.row_shares) launch.template operator()<Pass::Q>();
    if constexpr (splits_keys_pass<T>(D, DV)) {
      if (p.d_k) launch.template operator()<Pass::K>();
      if (p.d_v) launch.template operator()<Pass::V>();
    } else if (p.d_k || p.d_v) {
      launch.template operator()<Pass::KV>();
    }
    return failed;
  });
}

}  // namespace atx::ATX_TARGET
