// A warp's share of the forward of wide heads (attention_fwd_wide.cuh): scores of its own rows with
// its own keys, and its own columns of every row's output.
#pragma once
#include "csrc/cuda/attention_fwd_scores.cuh"
#include "csrc/cuda/nonfinite.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
struct WideSmem {
  using T = typename Tile::T;
  static constexpr int KEY_WARPS = Tile::WARPS / Tile::ROW_WARPS;
  SmemTile<T, Tile::BLOCK_Q, Tile::D> q;  // at the end, the output on its way out
  SmemTile<T, Tile::BLOCK_KV, Tile::D> kv[2];
  SmemTile<T, Tile::BLOCK_Q, Tile::BLOCK_KV> weights;
  // Of each row: what its exponents are counted from; of the keys of each warp that has some of
  // them, the largest logit, and the largest sum of weights of a lane, at the end of all lanes.
  float base[Tile::BLOCK_Q], top[KEY_WARPS][Tile::BLOCK_Q], part[KEY_WARPS][Tile::BLOCK_Q];
};

template <class Tile, class Score>
struct WideWarp : ScoreWarp<Tile, Score> {
  using Base = ScoreWarp<Tile, Score>;
  using Base::base, Base::exponential, Base::first_key, Base::first_row, Base::lane, Base::rows,
      Base::score, Base::sum, Base::warp;
  using Base::KV;
  using typename Base::KTile, typename Base::Rows, typename Base::T;
  using Smem = WideSmem<Tile>;
  // M: 16 rows each. COLS: of the output, the warp's own.
  static constexpr int M = Tile::BLOCK_Q / 16, COLS = Tile::DV / Tile::WARPS;
  static constexpr int KEY_WARPS = Smem::KEY_WARPS;
  using Scores = float[1][KV / 8][4];

  Smem& smem;
  const FragmentAddress<decltype(Smem::weights)> weights_address;
  const FragmentAddress<KTile> v_address;
  float o[M][COLS / 8][4] = {};  // Σ 2^exponent v

  __device__ __forceinline__ WideWarp(Smem& smem, const Score& score, const Rows& rows,
                                      Exponential<Score> exponential)
      : Base(smem.q, smem.kv[0], score, rows, exponential),
        smem(smem),
        weights_address(smem.weights, 0, lane()),
        v_address(FragmentAddress<KTile>(smem.kv[0], 0, lane()).beyond(warp() * COLS)) {
    keep_bases();
  }

  __device__ __forceinline__ static int key_warp() { return warp() / Tile::ROW_WARPS; }
  // Row r of the two of which this lane has scores.
  __device__ __forceinline__ static int own_row(int r) {
    return first_row() + simt::c_place(lane(), 2 * r).row;
  }
  // Row r of the 2 M of which this lane has output.
  __device__ __forceinline__ static int row(int r) {
    return r / 2 * 16 + simt::c_place(lane(), r % 2 * 2).row;
  }
  __device__ __forceinline__ static bool leads_row() { return lane() % 4 == 0; }

  // Whether no row of this warp sees one of its keys of the tile.
  __device__ __forceinline__ bool is_idle(int kv0) const {
    if (!rows.exists(first_row())) return true;
    if constexpr (!Score::LINEAR || Tile::SPLIT) return false;
    const int i = rows.position(first_row()), j = kv0 + first_key();
    return score.kv_end(i, i + 16) <= j || score.kv_begin(i, i + 16) >= j + KV;
  }
  __device__ __forceinline__ static void see_nothing(Scores& s) {
#pragma unroll
    for (int n = 0; n < KV / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = -INFINITY;
    }
  }

  __device__ __forceinline__ static float top_of(const Scores& s, int r) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < KV / 8; ++n) top = fmaxf(top, fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
    return top;
  }
  // Whether a row's weights, counted from its base, are too large for this lane, or it has none.
  __device__ __forceinline__ bool must_move(const Scores& s, const float (&part)[1][2]) const {
    bool found = false;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      found |= base[0][r] == -INFINITY ? top_of(s, r) > -INFINITY
                                       : part[0][r] > Exponential<Score>::LIMIT;
    return found;
  }
  // What all warps need to know to move the rows that must.
  __device__ __forceinline__ void tell(const Scores& s, const float (&part)[1][2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = top_of(s, r), most = part[0][r];
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        top = fmaxf(top, simt::shfl_xor(top, mask));
        most = fmaxf(most, simt::shfl_xor(most, mask));
      }
      if (!leads_row()) continue;
      smem.top[key_warp()][own_row(r)] = top;
      smem.part[key_warp()][own_row(r)] = most;
    }
  }
  // A row's base, where it moves to, and what turns weights counted from the one into weights
  // counted from the other. A row decides by itself, for its bits must not depend on other rows.
  struct Move {
    float to, factor;
  };
  __device__ __forceinline__ Move move_of(int row) const {
    const float from = smem.base[row];
    float top = -INFINITY, most = 0;
#pragma unroll
    for (int w = 0; w < KEY_WARPS; ++w) {
      top = fmaxf(top, smem.top[w][row]);
      most = fmaxf(most, smem.part[w][row]);
    }
    const bool moves = from == -INFINITY ? top > -INFINITY : most > Exponential<Score>::LIMIT;
    if (!moves) return {from, 1};
    const float to = exponential.base_at(top);
    return {to, exponential.rebase(from, to)};
  }
  __device__ __forceinline__ void move_own_rows() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Move move = move_of(own_row(r));
      base[0][r] = move.to;
      sum[0][r] *= move.factor;
    }
  }
  __device__ __forceinline__ void move_rows() {
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      const float factor = move_of(row(r)).factor;
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
        o[r / 2][n][r % 2 * 2] *= factor;
        o[r / 2][n][r % 2 * 2 + 1] *= factor;
      }
    }
  }
  __device__ __forceinline__ void keep_bases() const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (leads_row() && key_warp() == 0) smem.base[own_row(r)] = base[0][r];
  }

  // Weights to shared memory, rounded.
  __device__ __forceinline__ void hand_over(const Scores& x) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < KV / 8; ++n) {
        const int col = first_key() + n * 8 + simt::c_place(lane(), 0).col;
        reinterpret_cast<uint32_t&>(smem.weights.at(own_row(r), col)) =
            simt::pack2<T>(x[0][n][2 * r], x[0][n][2 * r + 1]);
      }
    }
  }

  // o += weights V, which is in tile `v`. guarded: it holds nan or inf, which must reach no row
  // whose weight is 0.
  __device__ __forceinline__ void accumulate(int v, bool guarded) {
    if (guarded) return accumulate_guarded(v);
    // Few heads, or few queries of one: 16 rows are all that there are.
    if (!rows.exists(16)) return accumulate_rows<1>(v);
    accumulate_rows<M>(v);
  }
  template <int ROWS>
  __device__ __forceinline__ void accumulate_rows(int v) {
    auto& sums = reinterpret_cast<float (&)[ROWS][COLS / 8][4]>(o);
    const auto weights = weights_address.here();
    const auto values = v_address.here(v);
#pragma unroll
    for (int k = 0; k < Tile::BLOCK_KV / 16; ++k) {
      uint32_t a[ROWS][4];
#pragma unroll
      for (int m = 0; m < ROWS; ++m) simt::ldmatrix_x4(a[m], weights.at(m * 16, k * 16));
      multiply_nn(sums, a, values, k * 16);
    }
  }
  // On FMA units, key by key: rare enough to be slow.
  __device__ __forceinline__ void accumulate_guarded(int v) {
    const int col = warp() * COLS + simt::c_place(lane(), 0).col;
#pragma unroll 1
    for (int j = 0; j < Tile::BLOCK_KV; ++j) {
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const float weight = to_float(smem.weights.at(row(r), j));
        if (weight == 0.f) continue;
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = o[r / 2][n][r % 2 * 2 + e];
            x = fmaf(weight, to_float(smem.kv[v].at(j, col + n * 8 + e)), x);
          }
        }
      }
    }
  }

  // Of the lane's columns of scores, this warp's sums, for all warps.
  __device__ __forceinline__ void tell_sums() const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[0][r];
      total += simt::shfl_xor(total, 1);
      total += simt::shfl_xor(total, 2);
      if (leads_row()) smem.part[key_warp()][own_row(r)] = total;
    }
  }
  // Rows of o, divided by their sums: of a chunk to memory, otherwise to their place in smem.q;
  // their lse to memory.
  template <class To>
  __device__ __forceinline__ void finish(const Rows& rows, float sink, float* lse,
                                         const GlobalMatrix<To>& to) {
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      const int at = row(r);
      float total = 0;
#pragma unroll
      for (int w = 0; w < KEY_WARPS; ++w) total += smem.part[w][at];
      const RowEnd end(exponential.logit(smem.base[at]), total, sink);
      if (lse && warp() == 0 && leads_row() && rows.exists(at)) lse[rows.first + at] = end.lse;
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
        const int col = warp() * COLS + n * 8 + simt::c_place(lane(), 0).col;
        const float* const pair = &o[r / 2][n][r % 2 * 2];
        const Float2 x = {pair[0] * end.factor, pair[1] * end.factor};
        if constexpr (Tile::SPLIT) {
          if (rows.exists(at) && col < to.cols)
            reinterpret_cast<Float2&>(to.data[(rows.first + at) * to.stride + col]) = x;
        } else {
          reinterpret_cast<uint32_t&>(smem.q.at(at, col)) = simt::pack2<T>(x.x[0], x.x[1]);
        }
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
