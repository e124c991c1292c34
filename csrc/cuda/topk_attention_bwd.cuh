// The gradients of attention over listed keys (params.h has the equations), by two kernels that
// hold rows as the forward does and scatter nothing:
//
// - a warp owns a query of a query head, walks over its list and forms d_q
// - a warp owns a key of a key head, walks over its readers, head by head, and forms d_k and d_v
//
// P is recomputed from lse. delta and the gradient of the sinks are those of dense attention
// (attention_bwd_rows.cuh).
#pragma once
#include "csrc/cuda/topk_attention_lanes.cuh"

namespace atx::ATX_TARGET {

// What the pairs of one query head need to know of its queries.
struct QueryNumbers {
  const float *lse, *delta;  // of query 0
  __device__ __forceinline__ QueryNumbers(const AttentionBwdParams& p, int b, int h) {
    const int64_t at = b * p.fwd.lse_batch + h * p.fwd.lse_head;
    lse = static_cast<const float*>(p.fwd.lse) + at;
    delta = static_cast<const float*>(p.delta) + at;
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS)
    topk_attention_bwd_q(const __grid_constant__ TopkAttentionBwdParams params) {
  using T = typename Tile::T;
  using Row = SharedRow<Tile>;
  constexpr int TEAMS = 32 / Tile::SHARERS;
  const AttentionBwdParams& p = params.bwd;
  const AttentionParams& f = p.fwd;
  const int group = f.Hq / f.Hkv;
  const WarpRow<Tile> own(f.B, f.Hq, f.Sq, group);
  if (!own.exists) return;
  const int b = own.b, h = own.h, i = own.row;
  const T* const k = head_rows<const T>(f.k, f.k_stride, b, h / group);
  const T* const v = head_rows<const T>(f.v, f.v_stride, b, h / group);
  const int32_t* const list = list_of(params.lists, b, h, i);
  const float unit_log2 = float(f.scale) * LOG2_E;
  const QueryNumbers numbers(p, b, h);
  const float log2_sum = numbers.lse[i] * LOG2_E, delta = numbers.delta[i];
  // a row that attends to nothing has a gradient of 0, whatever it holds
  const int length = log2_sum == -INFINITY ? 0 : params.lists.length;

  Row q, d_o, d_q;
  q.load(head_rows<const T>(f.q, f.q_stride, b, h) + i * f.q_stride.row, f.D);
  d_o.load(head_rows<const T>(p.d_o, p.d_o_stride, b, h) + i * p.d_o_stride.row, f.Dv);
  d_q.clear();
#pragma unroll 1
  for (int first = 0; first < length; first += TEAMS) {
    const int at = first + own.team, key = at < length ? list[at] : -1;
    const bool is = is_key(key, f.Sk);
    Row k_row, v_row;
    k_row.load(k + (is ? key : 0) * f.k_stride.row, f.D, is);
    v_row.load(v + (is ? key : 0) * f.v_stride.row, f.Dv, is);
    const float product = q.dot(k_row), d_weight = d_o.dot(v_row);
    const float weight = is ? simt::exp2(fmaf(product, unit_log2, -log2_sum)) : 0.f;
    d_q.add(weight * (d_weight - delta), k_row);
  }
  d_q.add_teams();
  if (own.team == 0)
    d_q.store(head_rows<T>(p.d_q, p.d_q_stride, b, h) + i * p.d_q_stride.row, f.D, float(f.scale));
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    topk_attention_bwd_kv(const __grid_constant__ TopkAttentionBwdParams params) {
  using T = typename Tile::T;
  using Row = SharedRow<Tile>;
  constexpr int TEAMS = 32 / Tile::SHARERS;
  const AttentionBwdParams& p = params.bwd;
  const AttentionParams& f = p.fwd;
  const int group = f.Hq / f.Hkv;
  const WarpRow<Tile> own(f.B, f.Hkv, f.Sk, 1);
  if (!own.exists) return;
  const int b = own.b, j = own.row;
  const float unit_log2 = float(f.scale) * LOG2_E;

  Row k, v, d_k, d_v;
  k.load(head_rows<const T>(f.k, f.k_stride, b, own.h) + j * f.k_stride.row, f.D);
  v.load(head_rows<const T>(f.v, f.v_stride, b, own.h) + j * f.v_stride.row, f.Dv);
  d_k.clear();
  d_v.clear();
#pragma unroll 1
  for (int h = own.h * group; h < (own.h + 1) * group; ++h) {
    const Readers readers = readers_of(params, b, h, j);
    const QueryNumbers numbers(p, b, h);
    const T* const q = head_rows<const T>(f.q, f.q_stride, b, h);
    const T* const d_o = head_rows<const T>(p.d_o, p.d_o_stride, b, h);
#pragma unroll 1
    for (int64_t first = 0; first < readers.count; first += TEAMS) {
      const int64_t at = first + own.team;
      const int i = at < readers.count ? readers.query[at] : -1;
      const float log2_sum = i >= 0 ? numbers.lse[i] * LOG2_E : -INFINITY;
      const bool is = log2_sum != -INFINITY;
      Row q_row, d_o_row;
      q_row.load(q + (is ? i : 0) * f.q_stride.row, f.D, is);
      d_o_row.load(d_o + (is ? i : 0) * p.d_o_stride.row, f.Dv, is);
      const float product = k.dot(q_row), d_weight = v.dot(d_o_row);
      const float weight = is ? simt::exp2(fmaf(product, unit_log2, -log2_sum)) : 0.f;
      const float slope = is ? weight * (d_weight - numbers.delta[i]) : 0.f;
      d_k.add(slope, q_row);
      d_v.add(weight, d_o_row);
    }
  }
  d_k.add_teams();
  d_v.add_teams();
  if (own.team != 0) return;
  if (p.d_k)
    d_k.store(head_rows<T>(p.d_k, p.d_k_stride, b, own.h) + j * p.d_k_stride.row, f.D,
              float(f.scale));
  if (p.d_v)
    d_v.store(head_rows<T>(p.d_v, p.d_v_stride, b, own.h) + j * p.d_v_stride.row, f.Dv, 1.f);
}

template <class T>
Status launch_topk_attention_bwd(const TopkAttentionBwdParams& params, const Exec& exec) {
  const AttentionBwdParams& p = params.bwd;
  const AttentionParams& f = p.fwd;
  return with_dim_of<COARSE_HEAD_DIMS>(f.D > f.Dv ? f.D : f.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = TopkTile<T, D>;
    Status failed = nullptr;
    if (p.d_q)
      failed = launch_warps<Tile>(topk_attention_bwd_q<Tile>, f.B, f.Hq, f.Sq, exec, params);
    if (!failed && (p.d_k || p.d_v))
      failed = launch_warps<Tile>(topk_attention_bwd_kv<Tile>, f.B, f.Hkv, f.Sk, exec, params);
    return failed;
  });
}

}  // namespace atx::ATX_TARGET
