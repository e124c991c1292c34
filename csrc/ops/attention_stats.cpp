// attention_stats and varlen_attention_stats: what the weights of an attention call look like. The
// wrapper (attn_ext/ops/attention_stats.py) has brought every tensor to one batch dimension.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention_buffers.h"
#include "attention_request.h"
#include "targets.h"

namespace atx::ops {
namespace {

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Stats run(const Arguments& a, const Tensor& lse) {
  Reasons reasons(a.op);
  AttentionRequest r = read_attention(a, reasons);
  reasons.raise_first();
  AttentionStatsParams p{};
  p.fwd = r.params;
  if (set_one_batch(a, r, &p.fwd, reasons)) check_row_numbers(a, r, p.fwd, "lse", lse, reasons);
  reasons.raise_first();

  const ScalarType accumulate = accumulation_type(p.fwd.dtype);
  const int64_t rows_k = r.row[K].size;
  const int64_t dense[] = {p.fwd.B, p.fwd.Hq, rows_k}, packed[] = {p.fwd.Hq, rows_k};
  Tensor entropy = torch::stable::empty_like(lse), top_weight = torch::stable::empty_like(lse);
  Tensor top_index = torch::stable::new_empty(lse, lse.sizes(), ScalarType::Int);
  Tensor column_sum = a.varlen() ? torch::stable::new_empty(lse, {packed, 2}, accumulate)
                                 : torch::stable::new_empty(lse, {dense, 3}, accumulate);
  p.fwd.v = nullptr, p.fwd.Dv = 0;
  p.fwd.lse = const_cast<void*>(lse.const_data_ptr());
  p.entropy = entropy.mutable_data_ptr();
  p.top_weight = top_weight.mutable_data_ptr();
  p.top_index = static_cast<int32_t*>(top_index.mutable_data_ptr());
  p.column_sum = column_sum.mutable_data_ptr();
  p.column_head = rows_k, p.column_batch = a.varlen() ? 0 : p.fwd.Hq * rows_k;

  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (a.q.is_cuda()) guard.emplace(a.q.get_device_index());
  const std::vector<Buffer> buffers =
      wants_buffers() ? stats_buffers(a, r, p) : std::vector<Buffer>();
  const Status failed =
      r.kernels->attention_stats(p, exec_for(a.q.is_cuda(), a.q.get_device_index(), buffers));
  if (failed) throw std::runtime_error(std::string(a.op) + ": the kernel launch failed: " + failed);
  return {entropy, column_sum, top_index, top_weight};
}

const OptionalTensor none;

Stats dense(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& mask,
            const OptionalTensor& alibi_slopes, double scale, double softcap, int64_t window_left,
            int64_t window_right, bool bottom_right) {
  return run({.op = "attention_stats",
              .q = q,
              .k = k,
              .v = k,
              .mask = mask,
              .alibi_slopes = alibi_slopes,
              .sinks = none,
              .seed = none,
              .dropout = 0,
              .scale = scale,
              .softcap = softcap,
              .window_left = window_left,
              .window_right = window_right,
              .bottom_right = bottom_right,
              .enable_gqa = true},
             lse);
}

Stats packed(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens_q,
             const Tensor& cu_seqlens_k, const OptionalTensor& alibi_slopes, int64_t max_seqlen_q,
             int64_t max_seqlen_k, double scale, double softcap, int64_t window_left,
             int64_t window_right, bool bottom_right) {
  return run({.op = "varlen_attention_stats",
              .q = q,
              .k = k,
              .v = k,
              .mask = none,
              .alibi_slopes = alibi_slopes,
              .sinks = none,
              .seed = none,
              .cu_seqlens_q = &cu_seqlens_q,
              .cu_seqlens_k = &cu_seqlens_k,
              .max_seqlen_q = max_seqlen_q,
              .max_seqlen_k = max_seqlen_k,
              .dropout = 0,
              .scale = scale,
              .softcap = softcap,
              .window_left = window_left,
              .window_right = window_right,
              .bottom_right = bottom_right,
              .enable_gqa = true},
             lse);
}

void register_attention_stats(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_stats", TORCH_BOX(&dense));
  m.impl("varlen_attention_stats", TORCH_BOX(&packed));
}

}  // namespace
}  // namespace atx::ops

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) { atx::ops::register_attention_stats(m); }
STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) { atx::ops::register_attention_stats(m); }
