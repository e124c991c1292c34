// Reading the calls that take the forward's results beside its arguments: backward and statistics.
#include <string>
#include <vector>

#include "attention_request.h"

namespace atx::ops {
namespace {

void check_result(const char* what, const Tensor& t, const std::vector<int64_t>& size,
                  ScalarType dtype, bool contiguous, const Tensor& q, Reasons& reasons) {
  bool fits = t.scalar_type() == dtype && same_device(t, q) && t.dim() == int64_t(size.size());
  for (size_t d = 0; fits && d < size.size(); ++d) fits = t.size(d) == size[d];
  if (fits && contiguous) fits = t.is_contiguous();
  // torch calls an expanded tensor without elements contiguous, and leaves its strides at 0
  if (fits && !contiguous) fits = size.back() == 1 || t.stride(t.dim() - 1) == 1 || t.numel() == 0;
  reasons.check(fits, ErrorKind::value, [&] {
    return std::string("expected ") + what + " as the forward gives it, on q's device; got " +
           shape(t) + " of " + torch::headeronly::toString(t.scalar_type());
  });
}

}  // namespace

bool set_one_batch(const Arguments& a, const AttentionRequest& r, AttentionParams* p,
                   Reasons& reasons) {
  const bool fits = a.varlen() || (a.q.dim() == 4 && a.k.dim() == 4 && a.v.dim() == 4 &&
                                   a.q.size(0) == a.k.size(0) && a.q.size(0) == a.v.size(0) &&
                                   a.k.size(1) == a.v.size(1) && a.q.size(1) == p->Hq);
  if (!reasons.check(fits, ErrorKind::value, [&] {
        return "expected q, k and v [batch, heads, length, head_dim] of one batch; got q " +
               shape(a.q) + ", k " + shape(a.k) + ", v " + shape(a.v);
      }))
    return false;
  p->B = int(a.varlen() ? a.cu_seqlens_q->numel() - 1 : a.q.size(0));
  p->q = a.q.const_data_ptr(), p->q_stride = strides_of(a.q);
  p->k = a.k.const_data_ptr(), p->k_stride = strides_of(a.k);
  p->v = a.v.const_data_ptr(), p->v_stride = strides_of(a.v);
  p->lse_head = r.row[Q].size;
  p->lse_batch = a.varlen() ? 0 : p->Hq * p->lse_head;
  p->mask.batch = r.batch.stride[MASK][0];
  p->alibi_slopes.batch = r.batch.stride[ALIBI][0];
  p->sinks.batch = r.batch.stride[SINKS][0];
  p->batch_step = 1;
  return true;
}

void check_output(const Arguments& a, const AttentionRequest& r, const AttentionParams& p,
                  const char* what, const Tensor& t, Reasons& reasons) {
  const int64_t rows = r.row[Q].size;
  const std::vector<int64_t> dense = {p.B, p.Hq, rows, p.Dv}, packed = {rows, p.Hq, p.Dv};
  check_result(what, t, a.varlen() ? packed : dense, a.q.scalar_type(), false, a.q, reasons);
}

void check_row_numbers(const Arguments& a, const AttentionRequest& r, const AttentionParams& p,
                       const char* what, const Tensor& t, Reasons& reasons) {
  const int64_t rows = r.row[Q].size;
  const std::vector<int64_t> dense = {p.B, p.Hq, rows}, packed = {p.Hq, rows};
  check_result(what, t, a.varlen() ? packed : dense, accumulation_type(p.dtype), true, a.q,
               reasons);
}

}  // namespace atx::ops
