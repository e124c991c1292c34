// attention_fwd and varlen_attention_fwd: allocate the results and hand the params to the target
// that serves the call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention_buffers.h"
#include "attention_request.h"
#include "targets.h"

namespace atx::ops {
namespace {

class Call {
 public:
  Call(const Arguments& a, AttentionRequest&& request)
      : a_(a), r_(std::move(request)), p_(r_.params) {}

  std::tuple<Tensor, Tensor> run() {
    allocate();
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (a_.q.is_cuda()) guard.emplace(a_.q.get_device_index());
    if (o_->numel() > 0) launch_each();
    return {*o_, *lse_};
  }

 private:
  // o and lse, in [batch..., H, S] order; o lies as q does when q is a transposed [B, S, H, D]
  // tensor.
  void allocate() {
    int64_t size[MAX_BATCH_DIMS + 3];
    const ScalarType accumulate = p_.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    if (a_.varlen()) {
      const int64_t o_size[] = {r_.row[Q].size, p_.Hq, p_.Dv}, lse_size[] = {p_.Hq, r_.row[Q].size};
      o_ = torch::stable::new_empty(a_.q, {o_size, 3});
      lse_ = torch::stable::new_empty(a_.q, {lse_size, 2}, accumulate);
      r_.head[O] = {p_.Hq, p_.Dv}, r_.row[O] = {r_.row[Q].size, int64_t(p_.Hq) * p_.Dv};
      r_.head[LSE] = {p_.Hq, r_.row[Q].size};
      return;
    }
    const int n = int(r_.rank);
    for (int d = 0; d < r_.batch.count; ++d) size[d] = r_.batch.size[d];
    if (n >= 3) size[n - 3] = p_.Hq;
    size[n - 2] = p_.Sq, size[n - 1] = p_.Dv;
    lse_ = torch::stable::new_empty(a_.q, {size, size_t(n - 1)}, accumulate);
    if (n == 4 && a_.q.dim() == 4 && a_.q.stride(1) < a_.q.stride(2)) {
      std::swap(size[1], size[2]);
      o_ = torch::stable::transpose(torch::stable::new_empty(a_.q, {size, 4}), 1, 2);
    } else {
      o_ = torch::stable::new_empty(a_.q, {size, size_t(n)});
    }
    r_.head[O] = dim_from_end(*o_, 3), r_.row[O] = dim_from_end(*o_, 2);
    r_.head[LSE] = dim_from_end(*lse_, 2);
    for (int d = 0; d < r_.batch.count; ++d) {
      r_.batch.stride[O][d] = dim_from_end(*o_, r_.rank - d).stride;
      r_.batch.stride[LSE][d] = dim_from_end(*lse_, r_.rank - 1 - d).stride;
    }
  }

  void launch_each() {
    p_.q = a_.q.const_data_ptr(), p_.k = a_.k.const_data_ptr(), p_.v = a_.v.const_data_ptr();
    p_.o = o_->mutable_data_ptr(), p_.lse = lse_->mutable_data_ptr();
    r_.batch.coalesce();
    const int inner = r_.batch.count - 1;
    auto stride = [&](Operand i) { return inner < 0 ? 0 : r_.batch.stride[i][inner]; };
    auto strides = [&](Operand i) {
      return Strides{stride(i), r_.head[i].stride, r_.row[i].stride};
    };
    p_.B = inner < 0 ? 1 : int(r_.batch.size[inner]);
    p_.q_stride = strides(Q), p_.k_stride = strides(K), p_.v_stride = strides(V),
    p_.o_stride = strides(O);
    p_.lse_batch = stride(LSE), p_.lse_head = r_.head[LSE].stride;
    p_.mask.batch = stride(MASK), p_.alibi_slopes.batch = stride(ALIBI),
    p_.sinks.batch = stride(SINKS);
    int64_t index[MAX_BATCH_DIMS] = {};
    take_workspace();
    const int64_t launches = inner <= 0 ? 1 : r_.batch.total() / r_.batch.size[inner];
    for (int64_t i = 0; i < launches; ++i) {
      launch(index);
      for (int d = inner - 1; d >= 0 && ++index[d] == r_.batch.size[d]; --d) index[d] = 0;
    }
  }

  // One for all launches, which follow one another on one stream.
  void take_workspace() {
    const auto floats_for = r_.kernels->attention_fwd_workspace;
    const int64_t floats = floats_for ? floats_for(p_) : 0;
    if (floats == 0) return;
    workspace_ = torch::stable::new_empty(a_.q, {&floats, 1}, ScalarType::Float);
    p_.workspace = static_cast<float*>(workspace_->mutable_data_ptr());
  }

  // The kernel on the slice at `index` of the batch dimensions around the kernel's own.
  void launch(const int64_t* index) {
    AttentionParams p = p_;
    auto shift = [&](auto*& data, Operand i, int64_t bytes) {
      using Byte = std::conditional_t<
          std::is_const_v<std::remove_pointer_t<std::remove_reference_t<decltype(data)>>>,
          const char, char>;
      for (int d = 0; d + 1 < r_.batch.count; ++d)
        data = static_cast<Byte*>(data) + index[d] * r_.batch.stride[i][d] * bytes;
    };
    const int64_t bytes = int64_t(a_.q.element_size()),
                  accumulate_bytes = p.dtype == DType::f64 ? 8 : 4;
    shift(p.q, Q, bytes), shift(p.k, K, bytes), shift(p.v, V, bytes), shift(p.o, O, bytes);
    shift(p.lse, LSE, accumulate_bytes);
    p.batch_step = r_.batch.count ? r_.batch.stride[NUMBER][r_.batch.count - 1] : 0;
    for (int d = 0; d + 1 < r_.batch.count; ++d)
      p.first_batch += index[d] * r_.batch.stride[NUMBER][d];
    if (p.mask.data) shift(p.mask.data, MASK, int64_t(a_.mask->element_size()));
    if (p.alibi_slopes.data) shift(p.alibi_slopes.data, ALIBI, accumulate_bytes);
    if (p.sinks.data) shift(p.sinks.data, SINKS, accumulate_bytes);
    const std::vector<Buffer> buffers =
        wants_buffers() ? forward_buffers(a_, r_, p, true) : std::vector<Buffer>();
    const Status failed =
        r_.kernels->attention_fwd(p, exec_for(a_.q.is_cuda(), a_.q.get_device_index(), buffers));
    if (failed)
      throw std::runtime_error(std::string(a_.op) + ": the kernel launch failed: " + failed);
  }

  const Arguments& a_;
  AttentionRequest r_;
  AttentionParams& p_;
  std::optional<Tensor> o_, lse_, workspace_;
};

Arguments dense(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                const OptionalTensor& seed, double dropout, double scale, double softcap,
                int64_t window_left, int64_t window_right, bool bottom_right, bool enable_gqa) {
  return {.op = "attention",
          .q = q,
          .k = k,
          .v = v,
          .mask = mask,
          .alibi_slopes = alibi_slopes,
          .sinks = sinks,
          .seed = seed,
          .dropout = dropout,
          .scale = scale,
          .softcap = softcap,
          .window_left = window_left,
          .window_right = window_right,
          .bottom_right = bottom_right,
          .enable_gqa = enable_gqa};
}

Arguments packed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, const OptionalTensor& alibi_slopes,
                 const OptionalTensor& sinks, const OptionalTensor& seed, double dropout,
                 int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, double softcap,
                 int64_t window_left, int64_t window_right, bool bottom_right) {
  return {.op = "varlen_attention",
          .q = q,
          .k = k,
          .v = v,
          .alibi_slopes = alibi_slopes,
          .sinks = sinks,
          .seed = seed,
          .cu_seqlens_q = &cu_seqlens_q,
          .cu_seqlens_k = &cu_seqlens_k,
          .max_seqlen_q = max_seqlen_q,
          .max_seqlen_k = max_seqlen_k,
          .dropout = dropout,
          .scale = scale,
          .softcap = softcap,
          .window_left = window_left,
          .window_right = window_right,
          .bottom_right = bottom_right,
          .enable_gqa = true};
}

std::tuple<Tensor, Tensor> run(const Arguments& a) {
  Reasons reasons(a.op);
  AttentionRequest request = read_attention(a, reasons, Serves::ATTENTION);
  reasons.raise_first();
  return Call(a, std::move(request)).run();
}

std::string why_not(const Arguments& a) {
  Reasons reasons(a.op);
  read_attention(a, reasons, Serves::ATTENTION);
  return reasons.joined();
}

// An op: a schema's parameters, read as Arguments, then run or explained.
template <auto READ, auto DO>
struct Op;
template <class... Parameters, Arguments (*READ)(Parameters...), class Result,
          Result (*DO)(const Arguments&)>
struct Op<READ, DO> {
  static Result call(Parameters... parameters) { return DO(READ(parameters...)); }
};

template <auto DO>
auto sparse(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visited,
            const Tensor& full, const Tensor& visited_t, const Tensor& first_part,
            const Tensor& bits, const OptionalTensor& sinks, const OptionalTensor& seed,
            double dropout, int64_t block_q, int64_t block_kv, double scale, double softcap) {
  const BlockTensors blocks = {visited, full, visited_t, first_part, bits, block_q, block_kv};
  return DO({.op = "block_sparse_attention",
             .q = q,
             .k = k,
             .v = v,
             .sinks = sinks,
             .seed = seed,
             .blocks = &blocks,
             .dropout = dropout,
             .scale = scale,
             .softcap = softcap});
}

template <auto DO>
auto forgetting(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sums, double scale,
                int64_t window_left, bool bottom_right) {
  return DO({.op = "forgetting_attention",
             .q = q,
             .k = k,
             .v = v,
             .sums = &sums,
             .scale = scale,
             .window_left = window_left,
             .window_right = 0,
             .bottom_right = bottom_right});
}

void register_attention(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_fwd", TORCH_BOX(&(Op<dense, run>::call)));
  m.impl("attention_why_not", TORCH_BOX(&(Op<dense, why_not>::call)));
  m.impl("varlen_attention_fwd", TORCH_BOX(&(Op<packed, run>::call)));
  m.impl("varlen_attention_why_not", TORCH_BOX(&(Op<packed, why_not>::call)));
  m.impl("block_sparse_attention_fwd", TORCH_BOX(&sparse<run>));
  m.impl("block_sparse_attention_why_not", TORCH_BOX(&sparse<why_not>));
  m.impl("forgetting_attention_fwd", TORCH_BOX(&forgetting<run>));
  m.impl("forgetting_attention_why_not", TORCH_BOX(&forgetting<why_not>));
}

}  // namespace
}  // namespace atx::ops

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) { atx::ops::register_attention(m); }
STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) { atx::ops::register_attention(m); }
