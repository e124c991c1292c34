// o_i = Σ_n softmax_n(scale q_i · k_list(i, n)) v_list(i, n). A warp owns a query of a query head;
// each of its teams of lanes (topk_attention_lanes.cuh) walks over its own part of the list, with
// its own maximum, sum and output, and the teams are merged at the end. The warps of a block are,
// as far as there are so many, the heads of one group, so that a listed row comes from L1 for all
// but the first.
//
// An entry that names no key, padding or worse, is never followed.
#pragma once
#include "csrc/cuda/topk_attention_lanes.cuh"

namespace atx::ATX_TARGET {

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    topk_attention_fwd(const __grid_constant__ TopkAttentionParams params) {
  using T = typename Tile::T;
  using Row = SharedRow<Tile>;
  constexpr int TEAMS = 32 / Tile::SHARERS, STEP = Tile::LISTED;
  const AttentionParams& p = params.fwd;
  const int group = p.Hq / p.Hkv;
  const WarpRow<Tile> own(p.B, p.Hq, p.Sq, group);
  if (!own.exists) return;
  const int b = own.b, h = own.h, i = own.row;
  const T* const k = head_rows<const T>(p.k, p.k_stride, b, h / group);
  const T* const v = head_rows<const T>(p.v, p.v_stride, b, h / group);
  const int32_t* const list = list_of(params.lists, b, h, i);
  const float unit_log2 = float(p.scale) * LOG2_E;

  Row q, o;
  q.load(head_rows<const T>(p.q, p.q_stride, b, h) + i * p.q_stride.row, p.D);
  o.clear();
  float base = -INFINITY, sum = 0;  // the maximum, and Σ 2^(logit - base), of the team

#pragma unroll 1
  for (int first = 0; first < params.lists.length; first += TEAMS * STEP) {
    int key[STEP];
    float logit[STEP], top = base;
#pragma unroll
    for (int n = 0; n < STEP; ++n) {
      const int at = first + n * TEAMS + own.team;
      key[n] = at < params.lists.length ? list[at] : -1;
      const bool is = is_key(key[n], p.Sk);
      Row row;
      row.load(k + (is ? key[n] : 0) * p.k_stride.row, p.D, is);
      const float product = q.dot(row);
      logit[n] = is ? product * unit_log2 : -INFINITY;
      top = fmaxf(top, logit[n]);
    }
    const float origin = top == -INFINITY ? 0.f : top, kept = simt::exp2(base - origin);
    base = top;
    sum *= kept;
    o.scale(kept);
#pragma unroll
    for (int n = 0; n < STEP; ++n) {
      const bool is = is_key(key[n], p.Sk);
      const float weight = simt::exp2(logit[n] - origin);
      Row row;
      row.load(v + (is ? key[n] : 0) * p.v_stride.row, p.Dv, is);
      o.add(weight, row);
      sum += weight;
    }
  }

  float top = base;
#pragma unroll
  for (int mask = Tile::SHARERS; mask < 32; mask *= 2) top = fmaxf(top, simt::shfl_xor(top, mask));
  const float kept = simt::exp2(base - (top == -INFINITY ? 0.f : top));
  sum *= kept;
#pragma unroll
  for (int mask = Tile::SHARERS; mask < 32; mask *= 2) sum += simt::shfl_xor(sum, mask);
  o.scale(kept);
  o.add_teams();
  const float sink =
      p.sinks.data ? static_cast<const float*>(p.sinks.data)[b * p.sinks.batch + h * p.sinks.head]
                   : -INFINITY;
  const RowEnd end(top / LOG2_E, sum, sink);
  if (own.team != 0) return;
  o.store(head_rows<T>(p.o, p.o_stride, b, h) + i * p.o_stride.row, p.Dv, end.factor);
  if (threadIdx.x % 32 == 0)
    static_cast<float*>(p.lse)[b * p.lse_batch + h * p.lse_head + i] = end.lse;
}

template <class T>
Status launch_topk_attention_fwd(const TopkAttentionParams& params, const Exec& exec) {
  const AttentionParams& p = params.fwd;
  return with_dim_of<COARSE_HEAD_DIMS>(p.D > p.Dv ? p.D : p.Dv, [&]<int D>(HeadDim<D>) {
    using Tile = TopkTile<T, D>;
    return launch_warps<Tile>(topk_attention_fwd<Tile>, p.B, p.Hq, p.Sq, exec, params);
  });
}

}  // namespace atx::ATX_TARGET
