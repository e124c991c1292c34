// topk_attention_fwd, topk_attention_bwd and transposed_lists: attention over listed keys. The
// wrapper (attn_ext/variants/topk_attention.py) has brought every tensor to one batch dimension.
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

enum Result { D_Q, D_K, D_V, D_SINKS, RESULTS };

// The first entry of [B, H, Sq, length] lists that is neither a key nor -1; null: there is none.
const int32_t* find_stranger(const Tensor& indices, int sk) {
  const auto* const data = static_cast<const int32_t*>(indices.const_data_ptr());
  const int64_t length = indices.size(3);
  for (int64_t b = 0; b < indices.size(0); ++b)
    for (int64_t h = 0; h < indices.size(1); ++h)
      for (int64_t i = 0; i < indices.size(2); ++i) {
        const int32_t* const list =
            data + b * indices.stride(0) + h * indices.stride(1) + i * indices.stride(2);
        bool known = true;
        for (int64_t n = 0; n < length; ++n) known &= list[n] >= -1 && list[n] < sk;
        if (known) continue;
        for (int64_t n = 0;; ++n)
          if (list[n] < -1 || list[n] >= sk) return list + n;
      }
  return nullptr;
}

class Call {
 public:
  Call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
       const OptionalTensor& sinks, double scale)
      : arguments_{.op = op, .q = q, .k = k, .v = v, .sinks = sinks, .scale = scale},
        indices_(indices),
        reasons_(op),
        request_(read_attention(arguments_, reasons_)),
        params_(request_.params) {
    if (reasons_.joined().empty() && set_one_batch(arguments_, request_, &params_, reasons_))
      read_lists();
  }

  void raise_first() const { reasons_.raise_first(); }
  std::string joined() const { return reasons_.joined(); }

  std::tuple<Tensor, Tensor> forward() {
    Tensor o = empty_as(arguments_.q, params_.Dv), lse = empty_lse();
    TopkAttentionParams p = {params_, lists_};
    p.fwd.o = o.mutable_data_ptr(), p.fwd.o_stride = strides_of(o);
    p.fwd.lse = lse.mutable_data_ptr();
    if (o.numel() == 0) return {o, lse};
    std::vector<Buffer> buffers;
    if (wants_buffers()) {
      buffers = forward_buffers(arguments_, request_, p.fwd, true);
      buffers.push_back(list_buffer());
    }
    launch(&Kernels::topk_attention_fwd, p, buffers);
    return {o, lse};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& o, const Tensor& lse,
      const OptionalTensor& first_reader, const OptionalTensor& readers, int64_t wanted) {
    check_output(arguments_, request_, params_, "o", o, reasons_);
    check_output(arguments_, request_, params_, "d_o", d_o, reasons_);
    check_row_numbers(arguments_, request_, params_, "lse", lse, reasons_);
    if (d_lse) check_row_numbers(arguments_, request_, params_, "d_lse", *d_lse, reasons_);
    const auto wants = [&](Result i) { return wanted >> i & 1; };
    reasons_.check(!wants(D_SINKS) || arguments_.sinks, ErrorKind::value,
                   [] { return std::string("wanted asks for the gradient of absent sinks"); });
    TopkAttentionBwdParams p = {{}, lists_, {}};
    if (wants(D_K) || wants(D_V)) p.readers = read_readers(first_reader, readers);
    reasons_.raise_first();

    const int64_t none[] = {0}, per_head[] = {params_.B, params_.Hq};
    const Tensor& q = arguments_.q;
    std::vector<Tensor> results;
    for (const auto& [result, like, width] :
         {std::tuple<Result, const Tensor&, int>{D_Q, q, params_.D},
          {D_K, arguments_.k, params_.D},
          {D_V, arguments_.v, params_.Dv}})
      results.push_back(wants(result) ? empty_as(like, width)
                                      : torch::stable::new_empty(q, {none, 1}));
    results.push_back(wants(D_SINKS) ? torch::stable::new_empty(q, {per_head, 2}, accumulation())
                                     : torch::stable::new_empty(q, {none, 1}));
    Tensor delta = empty_lse();

    AttentionBwdParams& b = p.bwd;
    b.fwd = params_;
    b.fwd.o = const_cast<void*>(o.const_data_ptr()), b.fwd.o_stride = strides_of(o);
    b.fwd.lse = const_cast<void*>(lse.const_data_ptr());
    b.d_o = d_o.const_data_ptr(), b.d_o_stride = strides_of(d_o);
    b.d_lse = d_lse ? d_lse->const_data_ptr() : nullptr;
    const auto data = [&](Result i) { return wants(i) ? results[i].mutable_data_ptr() : nullptr; };
    const auto strides = [&](Result i) { return wants(i) ? strides_of(results[i]) : Strides{}; };
    b.d_q = data(D_Q), b.d_q_stride = strides(D_Q);
    b.d_k = data(D_K), b.d_k_stride = strides(D_K);
    b.d_v = data(D_V), b.d_v_stride = strides(D_V);
    b.d_sinks = data(D_SINKS);
    b.delta = delta.mutable_data_ptr();
    std::vector<Buffer> buffers;
    if (wants_buffers()) {
      buffers = backward_buffers(arguments_, request_, b);
      buffers.push_back(list_buffer());
      if (p.readers.first) {
        buffers.push_back(
            {"first_reader", p.readers.first, 8, 1, {first_reader->numel()}, {1}, false});
        buffers.push_back({"readers", p.readers.query, 4, 1, {readers->numel()}, {1}, false});
      }
    }
    launch(&Kernels::topk_attention_bwd, p, buffers);
    return {results[D_Q], results[D_K], results[D_V], results[D_SINKS]};
  }

 private:
  void read_lists() {
    const Tensor& t = indices_;
    const int64_t heads = t.dim() == 4 ? t.size(1) : 0;
    const bool fits = t.dim() == 4 && (t.size(0) == 1 || t.size(0) == params_.B) &&
                      (heads == 1 || heads == params_.Hkv || heads == params_.Hq) &&
                      t.size(2) == params_.Sq && t.size(3) <= MAX_LENGTH &&
                      (t.size(3) <= 1 || t.stride(3) == 1);
    if (!reasons_.check(fits, ErrorKind::value, [&] {
          return "expected indices [batch or 1, 1, key heads or query heads, query length, keys] "
                 "for q " +
                 shape(arguments_.q) + " and k " + shape(arguments_.k) + "; got " + shape(t);
        }))
      return;
    reasons_.check(t.scalar_type() == ScalarType::Int, ErrorKind::type, [&] {
      return std::string("expected int32 or int64 indices; got ") +
             torch::headeronly::toString(t.scalar_type());
    });
    reasons_.check(same_device(t, arguments_.q), ErrorKind::runtime, [] {
      return std::string(
          "expected every tensor on q's device; indices is on another one. Move it with "
          ".to(q.device).");
    });
    if (!reasons_.joined().empty()) return;
    lists_.keys = static_cast<const int32_t*>(t.const_data_ptr());
    const auto stride = [&](int d) { return t.size(d) == 1 ? 0 : t.stride(d); };
    lists_.batch = stride(0), lists_.head = stride(1), lists_.row = stride(2);
    lists_.length = int(t.size(3));
    lists_.sharing = params_.Hq == 0 ? 1 : int(params_.Hq / heads);
    if (!t.is_cpu()) return;  // the wrapper has the device check them
    const int32_t* const stranger = find_stranger(t, params_.Sk);
    reasons_.check(!stranger, ErrorKind::value, [&] {
      return "expected indices from 0 to " + std::to_string(params_.Sk - 1) +
             ", the keys, or -1 for padding; got " + std::to_string(*stranger);
    });
  }

  KeyReaders read_readers(const OptionalTensor& first, const OptionalTensor& readers) {
    const int64_t planes = indices_.size(0) * indices_.size(1);
    const int64_t entries = planes * indices_.size(2) * indices_.size(3);
    const bool fits = first && readers && first->scalar_type() == ScalarType::Long &&
                      readers->scalar_type() == ScalarType::Int && first->is_contiguous() &&
                      readers->is_contiguous() && readers->numel() == entries &&
                      first->numel() == planes * (int64_t(params_.Sk) + 1);
    if (!reasons_.check(fits, ErrorKind::value, [] {
          return std::string("expected first_reader and readers of transposed_lists(indices, Sk)");
        }))
      return {};
    return {static_cast<const int64_t*>(first->const_data_ptr()),
            static_cast<const int32_t*>(readers->const_data_ptr()),
            indices_.size(0) == 1 ? 0 : indices_.size(1)};
  }

  Buffer list_buffer() const {
    return {"indices",
            lists_.keys,
            4,
            4,
            {indices_.size(0), indices_.size(1), indices_.size(2), indices_.size(3)},
            {lists_.batch, lists_.head, lists_.row, 1},
            false};
  }

  ScalarType accumulation() const { return accumulation_type(params_.dtype); }
  Tensor empty_lse() const {
    const int64_t size[] = {params_.B, params_.Hq, params_.Sq};
    return torch::stable::new_empty(arguments_.q, {size, 3}, accumulation());
  }
  // As t, of another width: a transposed [B, S, H, D] tensor if that is one, else contiguous.
  static Tensor empty_as(const Tensor& t, int64_t width) {
    const bool transposed = t.stride(1) < t.stride(2);
    const int64_t size[] = {t.size(0), t.size(transposed ? 2 : 1), t.size(transposed ? 1 : 2),
                            width};
    const Tensor made = torch::stable::new_empty(t, {size, 4});
    return transposed ? torch::stable::transpose(made, 1, 2) : made;
  }

  template <class Params>
  void launch(Status (*Kernels::*family)(const Params&, const Exec&), const Params& params,
              const std::vector<Buffer>& buffers) {
    const Tensor& q = arguments_.q;
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (q.is_cuda()) guard.emplace(q.get_device_index());
    const Status failed =
        (request_.kernels->*family)(params, exec_for(q.is_cuda(), q.get_device_index(), buffers));
    if (failed)
      throw std::runtime_error(std::string(arguments_.op) +
                               ": the kernel launch failed: " + failed);
  }

  const Arguments arguments_;
  const Tensor& indices_;
  Reasons reasons_;
  AttentionRequest request_;
  AttentionParams params_;
  KeyLists lists_{};
};

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& indices, const OptionalTensor& sinks, double scale) {
  Call call("topk_attention", q, k, v, indices, sinks, scale);
  call.raise_first();
  return call.forward();
}

std::string why_not(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
                    const OptionalTensor& sinks, double scale) {
  return Call("topk_attention", q, k, v, indices, sinks, scale).joined();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& o, const Tensor& lse, const Tensor& indices,
    const OptionalTensor& first_reader, const OptionalTensor& readers, const OptionalTensor& sinks,
    double scale, int64_t wanted) {
  Call call("topk_attention_bwd", q, k, v, indices, sinks, scale);
  call.raise_first();
  return call.backward(d_o, d_lse, o, lse, first_reader, readers, wanted);
}

// A counting sort of a plane of lists by key, queries in ascending order. The first key's readers
// begin at 0; what padding leaves at the end is -1.
void transpose_plane(const int32_t* lists, int64_t row, int64_t queries, int64_t length,
                     int64_t keys, int64_t* first, int32_t* readers) {
  const auto each = [&](const auto& f) {
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t n = 0; n < length; ++n) {
        const int64_t key = lists[i * row + n];
        if (key >= 0 && key < keys) f(key, i);
      }
  };
  // first[key + 1] counts a key's readers, then is where they begin, then where they end.
  for (int64_t key = 0; key <= keys; ++key) first[key] = 0;
  if (keys == 0) return;
  std::vector<int64_t> next(keys, 0);
  each([&](int64_t key, int64_t) { ++first[key + 1]; });
  for (int64_t key = 0; key < keys; ++key) first[key + 1] += next[key] = first[key];
  each([&](int64_t key, int64_t i) { readers[next[key]++] = int32_t(i); });
  for (int64_t at = first[keys]; at < queries * length; ++at) readers[at] = -1;
}

std::tuple<Tensor, Tensor> transposed_lists(const Tensor& indices, int64_t keys) {
  Reasons reasons("transposed_lists");
  reasons.check(indices.dim() == 4 && indices.scalar_type() == ScalarType::Int && keys >= 0 &&
                    (indices.size(3) <= 1 || indices.stride(3) == 1),
                ErrorKind::value,
                [&] { return "expected int32 indices [B, H, Sq, keys]; got " + shape(indices); });
  reasons.raise_first();
  const int64_t b = indices.size(0), h = indices.size(1), sq = indices.size(2),
                length = indices.size(3);
  const int64_t first_size[] = {b, h, keys + 1}, reader_size[] = {b, h, sq * length};
  Tensor first = torch::stable::new_empty(indices, {first_size, 3}, ScalarType::Long);
  Tensor readers = torch::stable::new_empty(indices, {reader_size, 3}, ScalarType::Int);
  const auto* const lists = static_cast<const int32_t*>(indices.const_data_ptr());
  auto* const first_data = static_cast<int64_t*>(first.mutable_data_ptr());
  auto* const reader_data = static_cast<int32_t*>(readers.mutable_data_ptr());
  torch::stable::parallel_for(0, b * h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      transpose_plane(lists + plane / h * indices.stride(0) + plane % h * indices.stride(1),
                      indices.stride(2), sq, length, keys, first_data + plane * (keys + 1),
                      reader_data + plane * sq * length);
  });
  return {first, readers};
}

void register_topk_attention(torch::stable::detail::StableLibrary& m) {
  m.impl("topk_attention_fwd", TORCH_BOX(&fwd));
  m.impl("topk_attention_why_not", TORCH_BOX(&why_not));
  m.impl("topk_attention_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace atx::ops

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) {
  atx::ops::register_topk_attention(m);
  m.impl("transposed_lists", TORCH_BOX(&atx::ops::transposed_lists));
}
STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) { atx::ops::register_topk_attention(m); }
