#include "attention_buffers.h"

#include <tuple>
#include <utility>

namespace atx::ops {
namespace {

class Buffers {
 public:
  Buffers(const AttentionRequest& r, const AttentionParams& p, int itemsize)
      : rows_{r.row[Q].size, r.row[K].size},
        p_(p),
        itemsize_(itemsize),
        accumulate_(p.dtype == DType::f64 ? 8 : 4) {}

  void add(Buffer buffer) {
    if (buffer.data) all.push_back(buffer);
  }
  // [B, H, S, D], with the rows of q or of k.
  void rows(const char* name, const void* data, Operand side, int heads, int width,
            const Strides& s, bool writable) {
    add({name,
         data,
         itemsize_,
         4,
         {p_.B, heads, rows_[side == K], width},
         {s.batch, s.head, s.row, 1},
         writable});
  }
  // [B, Hq, Sq], like lse.
  void per_row(const char* name, const void* data, bool writable) {
    add({name,
         data,
         accumulate_,
         3,
         {p_.B, p_.Hq, rows_[0]},
         {p_.lse_batch, p_.lse_head, 1},
         writable});
  }
  void per_head(const char* name, const PerHead& x, bool writable) {
    add({name, x.data, accumulate_, 2, {p_.B, p_.Hq}, {x.batch, x.head}, writable});
  }
  void mask(const char* name, const Mask& m, int itemsize, bool writable) {
    add({name,
         m.data,
         itemsize,
         4,
         // What is shared exists once, even where nobody shares it.
         {m.batch ? p_.B : 1, m.head ? p_.Hq : 1, m.row ? p_.Sq : 1, m.col ? p_.Sk : 1},
         {m.batch, m.head, m.row, m.col},
         writable});
  }

  std::vector<Buffer> all;

 private:
  int64_t rows_[2];
  const AttentionParams& p_;
  int itemsize_, accumulate_;
};

}  // namespace

std::vector<Buffer> forward_buffers(const Arguments& a, const AttentionRequest& r,
                                    const AttentionParams& p, bool writes) {
  Buffers b(r, p, int(a.q.element_size()));
  b.rows("q", p.q, Q, p.Hq, p.D, p.q_stride, false);
  b.rows("k", p.k, K, p.Hkv, p.D, p.k_stride, false);
  b.rows("v", p.v, K, p.Hkv, p.Dv, p.v_stride, false);
  b.rows("o", p.o, Q, p.Hq, p.Dv, p.o_stride, writes);
  b.per_row("lse", p.lse, writes);
  if (a.mask) b.mask("attn_mask", p.mask, int(a.mask->element_size()), false);
  b.per_head("alibi_slopes", p.alibi_slopes, false);
  b.per_head("sinks", p.sinks, false);
  const Forgetting& f = p.forgetting;
  b.add({"sums",
         f.sums,
         p.dtype == DType::f64 ? 8 : 4,
         4,
         {f.batch ? p.B : 1, f.head ? p.Hq : 1, 2, p.Sk},
         {f.batch, f.head, p.Sk, 1},
         false});
  b.add({"seed", p.seed, 8, 1, {1}, {1}, false});
  if (p.workspace)
    b.add({"workspace", p.workspace, 4, 1, {r.kernels->attention_fwd_workspace(p)}, {1}, true});
  if (a.blocks)
    for (const auto& [name, data, tensor] :
         {std::tuple<const char*, const void*, const Tensor*>{"visited", p.blocks.visited,
                                                              &a.blocks->visited},
          {"full", p.blocks.full, &a.blocks->full},
          {"visited_t", p.blocks.visited_t, &a.blocks->visited_t},
          {"first_part", p.blocks.first_part, &a.blocks->first_part},
          {"bits", p.blocks.bits, &a.blocks->bits}})
      b.add({name, data, 4, 1, {tensor->numel()}, {1}, false});
  for (const auto& [name, data] :
       {std::pair{"cu_seqlens_q", p.cu_seqlens_q}, {"cu_seqlens_k", p.cu_seqlens_k}})
    b.add({name, data, 4, 1, {p.B + 1}, {1}, false});
  return b.all;
}

std::vector<Buffer> backward_buffers(const Arguments& a, const AttentionRequest& r,
                                     const AttentionBwdParams& p) {
  const AttentionParams& f = p.fwd;
  Buffers b(r, f, int(a.q.element_size()));
  b.all = forward_buffers(a, r, f, false);
  b.rows("d_o", p.d_o, Q, f.Hq, f.Dv, p.d_o_stride, false);
  b.per_row("d_lse", p.d_lse, false);
  b.rows("d_q", p.d_q, Q, f.Hq, f.D, p.d_q_stride, true);
  b.rows("d_k", p.d_k, K, f.Hkv, f.D, p.d_k_stride, true);
  b.rows("d_v", p.d_v, K, f.Hkv, f.Dv, p.d_v_stride, true);
  b.mask("d_mask",
         {p.d_mask, p.d_mask_dtype, p.d_mask_batch, p.d_mask_head, p.d_mask_row, p.d_mask_col},
         p.d_mask_dtype == DType::f64   ? 8
         : p.d_mask_dtype == DType::f32 ? 4
                                        : 2,
         true);
  b.per_head("d_alibi", {p.d_alibi, f.Hq, 1}, true);
  b.per_head("d_sinks", {p.d_sinks, f.Hq, 1}, true);
  b.per_row("delta", p.delta, true);
  b.per_row("row_shares", p.row_shares, true);
  return b.all;
}

std::vector<Buffer> stats_buffers(const Arguments& a, const AttentionRequest& r,
                                  const AttentionStatsParams& p) {
  const AttentionParams& f = p.fwd;
  Buffers b(r, f, int(a.q.element_size()));
  b.all = forward_buffers(a, r, f, false);
  b.per_row("entropy", p.entropy, true);
  b.per_row("top_weight", p.top_weight, true);
  b.add({"top_index",
         p.top_index,
         4,
         3,
         {f.B, f.Hq, r.row[Q].size},
         {f.lse_batch, f.lse_head, 1},
         true});
  b.add({"column_sum",
         p.column_sum,
         f.dtype == DType::f64 ? 8 : 4,
         3,
         {f.B, f.Hq, r.row[K].size},
         {p.column_batch, p.column_head, 1},
         true});
  return b.all;
}

}  // namespace atx::ops
