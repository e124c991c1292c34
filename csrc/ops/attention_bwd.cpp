// attention_bwd and varlen_attention_bwd: allocate the gradients and hand the params to the target
// that serves the call. The formula that calls them (attn_ext/ops/attention.py) has brought every
// tensor to one batch dimension.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_buffers.h"
#include "attention_request.h"
#include "targets.h"

namespace atx::ops {
namespace {

// D_COLUMN, D_ROW: of forgetting, the sums of the logits' gradients per key and per query.
enum Result { D_Q, D_K, D_V, D_MASK, D_ALIBI, D_SINKS, D_COLUMN, D_ROW, RESULTS };

// Asks Linux for huge pages where t, new memory of the host, is large: the first touch of a page
// costs more than its 4 KB of gradients, and rows a page apart leave the TLB before their next use.
// What cannot be had is not missed, so the answer is not looked at.
void prefer_huge_pages([[maybe_unused]] const Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 4096, LARGE = 4 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t bytes = t.numel() * t.element_size(), first = (begin + PAGE - 1) & -PAGE;
  if (t.is_cpu() && bytes >= LARGE)
    madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
#endif
}

// What the backward takes beside the forward's arguments.
struct Cotangents {
  const Tensor& d_o;
  const OptionalTensor& d_lse;
  const Tensor &o, &lse;
  int64_t wanted;  // one bit per Result

  bool wants(Result i) const { return wanted >> i & 1; }
};

class Call {
 public:
  Call(const Arguments& a, const Cotangents& c, AttentionRequest& request)
      : a_(a), c_(c), r_(request), f_(p_.fwd) {}

  // Completes the reading: what only the backward asks for.
  void read(Reasons& reasons) {
    f_ = r_.params;
    if (!set_one_batch(a_, r_, &f_, reasons)) return;
    check_row_numbers(a_, r_, f_, "lse", c_.lse, reasons);
    if (c_.d_lse) check_row_numbers(a_, r_, f_, "d_lse", *c_.d_lse, reasons);
    check_output(a_, r_, f_, "o", c_.o, reasons);
    check_output(a_, r_, f_, "d_o", c_.d_o, reasons);
    reasons.check(!c_.wants(D_MASK) || (a_.mask && f_.mask.dtype != DType::boolean),
                  ErrorKind::value,
                  [] { return std::string("a gradient of attn_mask needs a floating-point one"); });
    reasons.check((!c_.wants(D_ALIBI) || a_.alibi_slopes) && (!c_.wants(D_SINKS) || a_.sinks),
                  ErrorKind::value,
                  [] { return std::string("wanted asks for the gradient of an absent input"); });
  }

  std::vector<Tensor> run() {
    allocate();
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (a_.q.is_cuda()) guard.emplace(a_.q.get_device_index());
    set_params();
    const std::vector<Buffer> buffers =
        wants_buffers() ? backward_buffers(a_, r_, p_) : std::vector<Buffer>();
    const Status failed =
        r_.kernels->attention_bwd(p_, exec_for(a_.q.is_cuda(), a_.q.get_device_index(), buffers));
    if (failed)
      throw std::runtime_error(std::string(a_.op) + ": the kernel launch failed: " + failed);
    return results_;
  }

 private:
  // Like t, laid out as t is when that is a transposed [B, S, H, D] tensor.
  Tensor empty_as(const Tensor& t) const {
    if (t.dim() == 3 || t.stride(1) >= t.stride(2)) return torch::stable::new_empty(t, t.sizes());
    const int64_t size[] = {t.size(0), t.size(2), t.size(1), t.size(3)};
    return torch::stable::transpose(torch::stable::new_empty(t, {size, 4}), 1, 2);
  }
  Tensor per_head() const {
    const int64_t size[] = {f_.B, f_.Hq};
    return torch::stable::new_empty(a_.q, {size, 2}, accumulation_type(f_.dtype));
  }
  Tensor per_key() const {
    const int64_t size[] = {f_.B, f_.Hq, 1, f_.Sk};
    return torch::stable::new_empty(a_.q, {size, 4}, accumulation_type(f_.dtype));
  }
  Tensor like_mask() const {
    int64_t size[4];
    for (int d = 0; d < 4; ++d) size[d] = dim_from_end(*a_.mask, 4 - d).size;
    const Tensor made = torch::stable::new_empty(*a_.mask, {size, 4});
    prefer_huge_pages(made);
    return made;
  }

  void allocate() {
    for (int i = 0; i < RESULTS; ++i) {
      const Result result = Result(i);
      const int64_t none[] = {0};
      if (!c_.wants(result)) {
        results_.push_back(torch::stable::new_empty(a_.q, {none, 1}));
        continue;
      }
      results_.push_back(result == D_Q        ? empty_as(a_.q)
                         : result == D_K      ? empty_as(a_.k)
                         : result == D_V      ? empty_as(a_.v)
                         : result == D_MASK   ? like_mask()
                         : result == D_COLUMN ? per_key()
                         : result == D_ROW    ? torch::stable::empty_like(c_.lse)
                                              : per_head());
    }
    workspace_.push_back(torch::stable::empty_like(c_.lse));
    if (c_.wants(D_ALIBI)) workspace_.push_back(torch::stable::empty_like(c_.lse));
  }

  void* data(Result i) { return c_.wants(i) ? results_[i].mutable_data_ptr() : nullptr; }
  Strides strides(Result i) { return c_.wants(i) ? strides_of(results_[i]) : Strides{}; }

  void set_params() {
    f_.o = const_cast<void*>(c_.o.const_data_ptr()), f_.o_stride = strides_of(c_.o);
    f_.lse = const_cast<void*>(c_.lse.const_data_ptr());
    p_.d_o = c_.d_o.const_data_ptr(), p_.d_o_stride = strides_of(c_.d_o);
    p_.d_lse = c_.d_lse ? c_.d_lse->const_data_ptr() : nullptr;
    p_.d_q = data(D_Q), p_.d_q_stride = strides(D_Q);
    p_.d_k = data(D_K), p_.d_k_stride = strides(D_K);
    p_.d_v = data(D_V), p_.d_v_stride = strides(D_V);
    const Result added = a_.sums ? D_COLUMN : D_MASK;
    p_.d_mask = data(added);
    if (p_.d_mask) {
      int64_t* const stride[] = {&p_.d_mask_col, &p_.d_mask_row, &p_.d_mask_head, &p_.d_mask_batch};
      for (int d = 0; d < 4; ++d) *stride[d] = dim_from_end(results_[added], d + 1).stride;
      to_dtype(results_[added].scalar_type(), &p_.d_mask_dtype);
    }
    p_.d_alibi = data(D_ALIBI), p_.d_sinks = data(D_SINKS);
    p_.delta = workspace_[0].mutable_data_ptr();
    p_.row_shares = c_.wants(D_ALIBI) ? workspace_[1].mutable_data_ptr() : data(D_ROW);
  }

  const Arguments& a_;
  const Cotangents& c_;
  AttentionRequest& r_;
  AttentionBwdParams p_{};
  AttentionParams& f_;
  std::vector<Tensor> results_, workspace_;
};

std::vector<Tensor> run(const Arguments& a, const Cotangents& c) {
  Reasons reasons(a.op);
  AttentionRequest request = read_attention(a, reasons, Serves::ATTENTION);
  reasons.raise_first();
  Call call(a, c, request);
  call.read(reasons);
  reasons.raise_first();
  return call.run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& o, const Tensor& lse, const OptionalTensor& mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& seed,
    double dropout, double scale, double softcap, int64_t window_left, int64_t window_right,
    bool bottom_right, int64_t wanted) {
  const std::vector<Tensor> d = run({.op = "attention_bwd",
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
                                     .enable_gqa = true},
                                    {d_o, d_lse, o, lse, wanted});
  return {d[D_Q], d[D_K], d[D_V], d[D_MASK], d[D_ALIBI], d[D_SINKS]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& o, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& seed, double dropout, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double scale, double softcap, int64_t window_left, int64_t window_right, bool bottom_right,
    int64_t wanted) {
  // The results are those of the dense op without d_mask.
  constexpr int64_t BEFORE_MASK = (1 << D_MASK) - 1;
  const int64_t all = (wanted & BEFORE_MASK) | (wanted & ~BEFORE_MASK) << 1;
  const std::vector<Tensor> d = run({.op = "varlen_attention_bwd",
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
                                     .enable_gqa = true},
                                    {d_o, d_lse, o, lse, all});
  return {d[D_Q], d[D_K], d[D_V], d[D_ALIBI], d[D_SINKS]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& o, const Tensor& lse, const Tensor& visited, const Tensor& full,
    const Tensor& visited_t, const Tensor& first_part, const Tensor& bits,
    const OptionalTensor& sinks, const OptionalTensor& seed, double dropout, int64_t block_q,
    int64_t block_kv, double scale, double softcap, int64_t wanted) {
  const BlockTensors blocks = {visited, full, visited_t, first_part, bits, block_q, block_kv};
  // The results are those of the dense op without d_mask and d_alibi.
  constexpr int64_t BEFORE_MASK = (1 << D_MASK) - 1;
  const int64_t all = (wanted & BEFORE_MASK) | (wanted & ~BEFORE_MASK) << 2;
  const std::vector<Tensor> d = run({.op = "block_sparse_attention_bwd",
                                     .q = q,
                                     .k = k,
                                     .v = v,
                                     .sinks = sinks,
                                     .seed = seed,
                                     .blocks = &blocks,
                                     .dropout = dropout,
                                     .scale = scale,
                                     .softcap = softcap},
                                    {d_o, d_lse, o, lse, all});
  return {d[D_Q], d[D_K], d[D_V], d[D_SINKS]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forgetting(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& o, const Tensor& lse, const Tensor& sums, double scale,
    int64_t window_left, bool bottom_right, int64_t wanted) {
  // The results are q's, k's and v's gradients and the last two of the enumeration.
  constexpr int64_t BEFORE_MASK = (1 << D_MASK) - 1;
  const int64_t all = (wanted & BEFORE_MASK) | wanted >> D_MASK << D_COLUMN;
  const std::vector<Tensor> d = run({.op = "forgetting_attention_bwd",
                                     .q = q,
                                     .k = k,
                                     .v = v,
                                     .sums = &sums,
                                     .scale = scale,
                                     .window_left = window_left,
                                     .window_right = 0,
                                     .bottom_right = bottom_right},
                                    {d_o, d_lse, o, lse, all});
  return {d[D_Q], d[D_K], d[D_V], d[D_COLUMN], d[D_ROW]};
}

void register_attention_bwd(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_bwd", TORCH_BOX(&dense));
  m.impl("varlen_attention_bwd", TORCH_BOX(&packed));
  m.impl("block_sparse_attention_bwd", TORCH_BOX(&sparse));
  m.impl("forgetting_attention_bwd", TORCH_BOX(&forgetting));
}

}  // namespace
}  // namespace atx::ops

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) { atx::ops::register_attention_bwd(m); }
STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) { atx::ops::register_attention_bwd(m); }
