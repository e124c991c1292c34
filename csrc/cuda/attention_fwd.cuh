// o = softmax(score(q kᵀ)) v on tensor cores, for bf16 and f16: FlashAttention-2 (Dao 2023,
// arXiv:2307.08691), algorithm 1, with the keys visited from the last to the first.
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
// Weights never leave registers, since the C layout of S is their A layout. Most tiles are plain:
// nothing is masked, and the base that a row's exponents are counted from is good enough
// (attention_block.cuh), which the sums of the weights tell without a search for the maximum. The
// others take the general body: masks, new bases, unaligned tensors, and values that are nan or inf
// (nonfinite.cuh). A tile that turns out not to be plain is simply done again.
//
// Plain loop, nvcc 13.0, sm_80, policy Full: SASS instructions per HMMA (and registers)
// - D 32: 5.72 (216), 64: 3.63 (254), 96: 3.30 (247), 128: 2.86 (255), 192: 3.11 (244), 256: 2.81
//   (255). Window adds 0.2 to 0.5. No kernel spills.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/attention_block.cuh"
#include "csrc/cuda/dropped.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/nonfinite.cuh"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
struct FwdSmem {
  SmemTile<typename Tile::T, Tile::BLOCK_Q, Tile::D> q;  // at the end, the output on its way out
  SmemTile<typename Tile::T, Tile::BLOCK_KV, Tile::D> k, v;
};

// A warp's view of its block.
template <class Tile, class Score>
struct AttentionWarp {
  using T = typename Tile::T;
  static constexpr int M = Tile::M, D = Tile::D, KV = Tile::BLOCK_KV;
  using Smem = FwdSmem<Tile>;

  Smem& smem;
  const Score& score;
  const int sq;
  const int q0;  // position of the block's first row
  const FragmentAddress<decltype(Smem::q)> q_address;
  const FragmentAddress<decltype(Smem::k), Order::ACROSS> k_address;
  const FragmentAddress<decltype(Smem::v)> v_address;
  const Exponential<Score> exponential;

  uint32_t q_frag[Tile::Q_IN_REGISTERS ? D / 16 : 1][M][4];
  float o[M][D / 8][4] = {};         // Σ 2^exponent v
  float base[M][2], sum[M][2] = {};  // of the exponents; Σ 2^exponent over this lane's columns

  __device__ __forceinline__ AttentionWarp(Smem& smem, const Score& score,
                                           const AttentionBlock& block,
                                           Exponential<Score> exponential)
      : smem(smem),
        score(score),
        sq(block.seq.sq),
        q0(block.q0),
        q_address(smem.q, first_row(), lane()),
        k_address(smem.k, 0, lane()),
        v_address(smem.v, 0, lane()),
        exponential(exponential) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // No key yet. A row beyond the sequence need not wait for one.
        const int i = q0 + first_row() + m * 16 + simt::c_place(lane(), 2 * r).row;
        base[m][r] = i < sq ? -INFINITY : 0.f;
      }
    }
  }

  __device__ __forceinline__ static int lane() { return int(threadIdx.x % 32); }
  __device__ __forceinline__ static int first_row() {
    return int(threadIdx.x / 32 * 16 * M);
  }  // of the block's rows
  __device__ __forceinline__ static void load_q(uint32_t (&a)[M][4],
                                                const FragmentAddress<decltype(Smem::q)>& q,
                                                int col) {
#pragma unroll
    for (int m = 0; m < M; ++m) simt::ldmatrix_x4(a[m], q.at(m * 16, col));
  }

  __device__ __forceinline__ void keep_q() {
    if constexpr (Tile::Q_IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) load_q(q_frag[k], q_address, k * 16);
    }
  }

  // Whether no row of this warp sees a key of the tile.
  __device__ __forceinline__ bool is_idle(int kv0) const {
    if (!Score::LINEAR) return false;  // not worth the registers there
    const int i = q0 + first_row(), i1 = i + 16 * M;
    return i >= sq || score.kv_end(i, i1) <= kv0 || score.kv_begin(i, i1) >= kv0 + KV;
  }

  // s = Q Kᵀ
  __device__ __forceinline__ void products(float (&s)[M][KV / 8][4]) const {
    const auto q = q_address.here();
    const auto keys = k_address.here();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      if constexpr (Tile::Q_IN_REGISTERS) {
        multiply_nt(s, q_frag[k], keys, k * 16);
      } else {
        uint32_t a[M][4];
        load_q(a, q, k * 16);
        multiply_nt(s, a, keys, k * 16);
      }
    }
  }

  // s ← logits, but for a linear policy's factor; -inf where masked out.
  template <bool MASKED>
  __device__ __forceinline__ void logits(float (&s)[M][KV / 8][4], int kv0) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const simt::Place at = simt::c_place(lane(), e);
          const int i = q0 + first_row() + m * 16 + at.row, j = kv0 + n * 8 + at.col;
          s[m][n][e] = MASKED ? masked_logit(score, s[m][n][e], i, j, sq)
                              : full_logit(score, s[m][n][e], i, j);
        }
      }
    }
  }

  // s ← weights; part ← Σ of them, of this lane's columns.
  template <bool MASKED>
  __device__ __forceinline__ void weigh(float (&s)[M][KV / 8][4], float (&part)[M][2]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row without a key up to now: any finite base gives 2^-inf = 0.
        const float from = MASKED && base[m][r] == -INFINITY ? 0.f : base[m][r];
        part[m][r] = 0;
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e)
            part[m][r] += s[m][n][e] = exponential.weight(s[m][n][e], from);
        }
      }
    }
  }

  __device__ __forceinline__ static bool too_large(const float (&part)[M][2]) {
    bool found = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      found |= part[m][0] > Exponential<Score>::LIMIT;
      found |= part[m][1] > Exponential<Score>::LIMIT;
    }
    return found;
  }

  // Moves the base of each row whose weights, counted from it, would be too large: weigh's
  // condition.
  __device__ __forceinline__ void move_bases(const float (&s)[M][KV / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY, part = 0;
#pragma unroll
        for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            top = fmaxf(top, s[m][n][e]);
            part += exponential.weight(s[m][n][e], base[m][r]);
          }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          top = fmaxf(top, simt::shfl_xor(top, mask));
          part = fmaxf(part, simt::shfl_xor(part, mask));
        }
        const bool move =
            base[m][r] == -INFINITY ? top > -INFINITY : part > Exponential<Score>::LIMIT;
        if (!move) continue;
        const float to = exponential.base_at(top), factor = exponential.rebase(base[m][r], to);
        base[m][r] = to;
        sum[m][r] *= factor;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[m][n][2 * r] *= factor;
          o[m][n][2 * r + 1] *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void add(const float (&part)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sum[m][0] += part[m][0];
      sum[m][1] += part[m][1];
    }
  }

  // s ← what dropout leaves of the weights, after their sums were taken.
  __device__ __forceinline__ void drop(float (&s)[M][KV / 8][4], const AttentionParams& p,
                                       int kv0) const {
    if constexpr (!Score::LINEAR) {
      if (!(p.dropout > 0)) return;
      constexpr int ROWS = 2 * M, COLS = KV / 4;
      const AttentionBlock block(p, Tile::BLOCK_Q);  // found again, not kept
      const uint32_t kept = kept_pairs<ROWS, COLS>(p, block.b, block.h, [&](int r, int c) {
        const int row = r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row;
        return Pair{q0 + first_row() + row, kv0 + c / 2 * 8 + simt::c_place(lane(), c % 2).col};
      });
      const float factor = kept_factor(p);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
          float& weight = s[r / 2][c / 2][r % 2 * 2 + c % 2];
          weight = kept >> (r * COLS + c) & 1 ? weight * factor : 0.f;
        }
      }
    }
  }

  __device__ __forceinline__ static void pack(uint32_t (&p)[KV / 16][M][4],
                                              const float (&s)[M][KV / 8][4]) {
#pragma unroll
    for (int k = 0; k < KV / 16; ++k) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &s[m][2 * k + i / 2][i % 2 * 2];
          p[k][m][i] = simt::pack2<T>(pair[0], pair[1]);
        }
      }
    }
  }

  // o += P V
  __device__ __forceinline__ void accumulate(const uint32_t (&p)[KV / 16][M][4]) {
    const auto values = v_address.here();
#pragma unroll
    for (int k = 0; k < KV / 16; ++k) multiply_nn(o, p[k], values, k * 16);
  }

  // Rows of o, divided by their sums, to this warp's rows of smem.q; their lse to memory.
  __device__ __forceinline__ void finish(const AttentionBlock& block, float sink, float* lse) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[m][r];
        total += simt::shfl_xor(total, 1);
        total += simt::shfl_xor(total, 2);
        const RowEnd end(exponential.logit(base[m][r]), total, sink);
        const simt::Place at = simt::c_place(lane(), 2 * r);
        const int row = first_row() + m * 16 + at.row;
        if (lse && at.col == 0 && block.q0 + row < block.seq.sq) lse[block.q0 + row] = end.lse;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const uint32_t pair =
              simt::pack2<T>(o[m][n][2 * r] * end.factor, o[m][n][2 * r + 1] * end.factor);
          reinterpret_cast<uint32_t&>(smem.q.at(row, n * 8 + at.col)) = pair;
        }
      }
    }
  }
};

// A tile of keys whose K is on the way, in full generality: masked, of any alignment, with any
// values. A block has few of these, so the next K is copied only when all is done.
template <class Tile, class Score, class Stream>
__device__ __forceinline__ void attend(AttentionWarp<Tile, Score>& warp, const AttentionParams& p,
                                       Stream& k, Stream& v, int kv0, int first) {
  constexpr int KV = Tile::BLOCK_KV, M = Tile::M, THREADS = Tile::THREADS;
  FwdSmem<Tile>& smem = warp.smem;
  simt::cp_async_wait<0>();
  simt::sync();  // K has landed for every thread, and no warp still reads the last V, which is
                 // overwritten now
  v.load(smem.v, kv0);
  simt::cp_async_commit();

  uint32_t weights[KV / 16][M][4] = {};
  const bool idle = warp.is_idle(kv0);
  if (!idle) {
    float s[M][KV / 8][4] = {}, part[M][2];
    warp.products(s);
    warp.template logits<true>(s, kv0);
    warp.move_bases(s);
    warp.template weigh<true>(s, part);
    warp.add(part);
    warp.drop(s, p, kv0);
    warp.pack(weights, s);
  }

  simt::cp_async_wait<0>();
  simt::sync();  // V has landed for every thread, and no warp still reads K, which may become V's
                 // marks now
  const bool split = simt::sync_or(holds_nonfinite<THREADS>(smem.v));
  if (split) {
    split_nonfinite<THREADS>(smem.v, smem.k);
    simt::sync();  // every warp multiplies with what all threads have split
  }
  if (!idle) warp.accumulate(weights);
  if (split && !idle)
    add_nonfinite(warp.o, weights, FragmentAddress<decltype(smem.k)>(smem.k, 0, warp.lane()));
  simt::sync();  // no warp still reads the marks in K's place, which is overwritten now
  k.step_back();
  v.step_back();
  if (kv0 > first) k.load(smem.k, kv0 - KV);
  simt::cp_async_commit();
}

// The same for a tile that nothing masks, of chunked K and V, if no row's weights grow too large.
// Otherwise answers false and leaves everything to attend: K is still there, V is copied again.
template <class Tile, class Score, class Stream>
__device__ __forceinline__ bool attend_plain(AttentionWarp<Tile, Score>& warp,
                                             const AttentionParams& p, Stream& k, Stream& v,
                                             int kv0, int first) {
  constexpr int KV = Tile::BLOCK_KV, M = Tile::M;
  FwdSmem<Tile>& smem = warp.smem;
  simt::cp_async_wait<0>();
  simt::sync();  // K has landed for every thread, and no warp still reads the last V, which is
                 // overwritten now
  v.template load<true>(smem.v, kv0);
  simt::cp_async_commit();

  float s[M][KV / 8][4] = {}, part[M][2];
  warp.products(s);
  if constexpr (!Score::LINEAR) warp.template logits<false>(s, kv0);
  warp.template weigh<false>(s, part);
  warp.drop(s, p, kv0);
  uint32_t weights[KV / 16][M][4];
  warp.pack(weights, s);

  simt::cp_async_wait<0>();
  // V has landed for every thread, and no warp still reads K, which is overwritten now
  if (simt::sync_or(warp.too_large(part))) return false;
  k.step_back();
  if (kv0 > first) k.template load<true>(smem.k, kv0 - KV);
  simt::cp_async_commit();
  warp.add(part);
  warp.accumulate(weights);
  v.step_back();
  return true;
}

template <class Tile, class Score>
__global__ void __launch_bounds__(Tile::THREADS, 2)
    attention_fwd(const __grid_constant__ AttentionParams p) {
  using T = typename Tile::T;
  constexpr int KV = Tile::BLOCK_KV, THREADS = Tile::THREADS;
  const AttentionBlock block(p, Tile::BLOCK_Q);
  const auto [b, h, h_kv, q0, q1, seq] = block;
  if (q0 >= seq.sq) return;  // a shorter sequence than the longest
  const Score score(p, seq, b, h);
  const GlobalMatrix<const T> q(p.q, p.q_stride, b, h, seq.q_row, seq.sq, p.D);
  const GlobalMatrix<const T> k(p.k, p.k_stride, b, h_kv, seq.k_row, seq.sk, p.D);
  const GlobalMatrix<const T> v(p.v, p.v_stride, b, h_kv, seq.k_row, seq.sk, p.Dv);
  FwdSmem<Tile>& smem = simt::shared<FwdSmem<Tile>>();

  // Tiles of keys from the last to the first: the diagonal of a causal mask, and what is near it,
  // sets the bases.
  const int begin = score.kv_begin(q0, q1), end = score.kv_end(q0, q1);
  const int first = begin / KV * KV;
  int kv0 = begin < end ? (end - 1) / KV * KV : first - KV;
  TileStream<decltype(smem.q), THREADS>(q, q0).load(smem.q, q0);
  simt::cp_async_commit();
  TileStream<decltype(smem.k), THREADS> k_stream(k, kv0), v_stream(v, kv0);
  if (kv0 >= first) k_stream.load(smem.k, kv0);
  simt::cp_async_commit();
  simt::cp_async_wait<1>();
  simt::sync();  // Q has landed for every thread
  const Exponential<Score> exponential(float(p.scale));
  if (exponential.negative) {
    negate<THREADS>(smem.q);
    simt::sync();  // every warp reads what all threads have negated
  }

  AttentionWarp<Tile, Score> warp(smem, score, block, exponential);
  warp.keep_q();
  const auto plain = [&](int j) { return j >= first && score.full(q0, q1, j, j + KV); };
  for (; kv0 >= first; kv0 -= KV) {
    attend(warp, p, k_stream, v_stream, kv0, first);
    if (!k_stream.chunked() || !v_stream.chunked()) continue;
    while (plain(kv0 - KV) && attend_plain(warp, p, k_stream, v_stream, kv0 - KV, first)) kv0 -= KV;
  }

  // Found again, not kept: the loop needs the registers.
  const AttentionBlock out(p, Tile::BLOCK_Q);
  const GlobalMatrix<T> o(p.o, p.o_stride, out.b, out.h, out.seq.q_row, out.seq.sq, p.Dv);
  simt::sync_warp();  // no lane still reads this warp's rows of Q, which the output overwrites
  warp.finish(out, sink_of(p, out), lse_rows(p, out));
  simt::sync_warp();  // lanes store what others have written
  store_rows<16 * Tile::M, 32>(o, out.q0 + warp.first_row(), smem.q, warp.first_row());
}

template <class T, class Score>
Status launch_attention_fwd(const AttentionParams& p, const Exec& exec) {
  return with_head_dim(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = FwdTile<T, D, Score::LINEAR>;
    static_assert(sizeof(FwdSmem<Tile>) == Tile::SHARED_BYTES);
    return simt::launch(attention_fwd<Tile, Score>, attention_blocks(p, Tile::BLOCK_Q),
                        Tile::THREADS, Tile::SHARED_BYTES, exec.stream, p);
  });
}

}  // namespace atx::ATX_TARGET
