// Reading and checking the tensors of an attention call: shapes, broadcasting, types, options,
// target.
#include "attention_request.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "targets.h"

namespace atx::ops {
namespace {

class Reader {
 public:
  Reader(const Arguments& a, Reasons& reasons, Serves serves, AttentionRequest& request)
      : a_(a), reasons_(reasons), serves_(serves), r_(request), p_(request.params) {}

  void read() {
    check_dtypes_and_device();
    if (a_.varlen() ? read_packed() : read_dense()) {
      check_heads();
      check_head_dims();
      check_lengths();
      if (a_.varlen()) check_cu_seqlens();
      read_mask();
      const int64_t one_batch = r_.rank == 4 ? r_.batch.size[0] : -1;
      if (a_.blocks) read_block_mask(a_, one_batch, &p_, reasons_);
      if (a_.sums) read_forgetting(a_, one_batch, &p_, reasons_);
      read_per_head(a_.alibi_slopes, "alibi_slopes", ALIBI, &p_.alibi_slopes);
      read_per_head(a_.sinks, "sinks", SINKS, &p_.sinks);
      check_options();
    }
    check_target();
  }

 private:
  using Kind = ErrorKind;

  std::string shapes() const {
    return "q is " + shape(a_.q) + ", k is " + shape(a_.k) + ", v is " + shape(a_.v);
  }

  void check_dtypes_and_device() {
    DType k_dtype = DType::boolean, v_dtype = DType::boolean;
    const bool known = to_dtype(a_.q.scalar_type(), &p_.dtype) &&
                       to_dtype(a_.k.scalar_type(), &k_dtype) &&
                       to_dtype(a_.v.scalar_type(), &v_dtype) && p_.dtype != DType::boolean;
    reasons_.check(known && k_dtype == p_.dtype && v_dtype == p_.dtype, Kind::type, [&] {
      return std::string(
                 "expected q, k and v of one type among float64, float32, float16 and bfloat16; "
                 "got ") +
             torch::headeronly::toString(a_.q.scalar_type()) + ", " +
             torch::headeronly::toString(a_.k.scalar_type()) + " and " +
             torch::headeronly::toString(a_.v.scalar_type()) + ". Convert them with .to(dtype).";
    });
    auto on_device = [&](const Tensor* t, const char* what) {
      if (t)
        reasons_.check(same_device(a_.q, *t), Kind::runtime, [&] {
          return std::string("expected every tensor on q's device; ") + what +
                 " is on another one. Move it with .to(q.device).";
        });
    };
    on_device(&a_.k, "k");
    on_device(&a_.v, "v");
    on_device(a_.mask ? &*a_.mask : nullptr, "attn_mask");
    on_device(a_.alibi_slopes ? &*a_.alibi_slopes : nullptr, "alibi_slopes");
    on_device(a_.sinks ? &*a_.sinks : nullptr, "sinks");
    on_device(a_.seed ? &*a_.seed : nullptr, "seed");
    if (a_.blocks)
      for (const Tensor* t : {&a_.blocks->visited, &a_.blocks->full, &a_.blocks->visited_t,
                              &a_.blocks->first_part, &a_.blocks->bits})
        on_device(t, "block_mask");
    on_device(a_.sums, "sums");
    on_device(a_.cu_seqlens_q, "cu_seqlens_q");
    on_device(a_.cu_seqlens_k, "cu_seqlens_k");
  }

  // [..., H, S, D] with SDPA's broadcasting of the leading dimensions.
  bool read_dense() {
    const Tensor* tensors[] = {&a_.q, &a_.k, &a_.v};
    for (const Tensor* t : tensors)
      if (!reasons_.check(t->dim() >= 2 && t->dim() <= MAX_BATCH_DIMS + 3, Kind::value, [&] {
            return "expected q, k and v of 2 to " + std::to_string(MAX_BATCH_DIMS + 3) +
                   " dimensions, [..., heads, length, head_dim]; got " + shapes();
          }))
        return false;
    r_.rank = std::max({a_.q.dim(), a_.k.dim(), a_.v.dim()});
    r_.batch.count = int(std::max<int64_t>(r_.rank - 3, 0));
    for (int d = 0; d < r_.batch.count; ++d) r_.batch.size[d] = 1;
    for (int i : {Q, K, V})
      for (int d = 0; d < r_.batch.count; ++d) {
        const Dim dim = dim_from_end(*tensors[i], r_.rank - d);
        if (!reasons_.check(dim.size == r_.batch.size[d] || dim.size == 1 || r_.batch.size[d] == 1,
                            Kind::value, [&] {
                              return "expected batch dimensions that broadcast; got " + shapes() +
                                     ". Leading dimensions must be equal or 1.";
                            }))
          return false;
        if (dim.size != 1) r_.batch.size[d] = dim.size;
        r_.batch.stride[i][d] = dim.stride;
      }
    for (int i : {Q, K, V}) {
      r_.head[i] = dim_from_end(*tensors[i], 3);
      r_.row[i] = dim_from_end(*tensors[i], 2);
    }
    int64_t inner = 1;
    for (int d = r_.batch.count - 1; d >= 0; inner *= r_.batch.size[d--])
      r_.batch.stride[NUMBER][d] = inner;
    p_.B = 1;
    return true;
  }

  // [total, H, D]: the rows of all sequences, one after the other.
  bool read_packed() {
    const Tensor* tensors[] = {&a_.q, &a_.k, &a_.v};
    for (const Tensor* t : tensors)
      if (!reasons_.check(t->dim() == 3, Kind::value, [&] {
            return "expected packed q, k and v, [total, heads, head_dim]; got " + shapes();
          }))
        return false;
    for (int i : {Q, K, V}) {
      r_.head[i] = dim_from_end(*tensors[i], 2);
      r_.row[i] = dim_from_end(*tensors[i], 3);
    }
    const bool fits = a_.cu_seqlens_q->dim() == 1 && a_.cu_seqlens_k->dim() == 1 &&
                      a_.cu_seqlens_q->numel() >= 1 &&
                      a_.cu_seqlens_q->numel() == a_.cu_seqlens_k->numel();
    if (!reasons_.check(fits, Kind::value, [&] {
          return "expected cu_seqlens_q and cu_seqlens_k of one shape, [batch + 1]; got " +
                 shape(*a_.cu_seqlens_q) + " and " + shape(*a_.cu_seqlens_k);
        }))
      return false;
    r_.rank = 3;
    r_.batch.count = 1;
    r_.batch.size[0] = a_.cu_seqlens_q->numel() - 1;
    r_.batch.stride[NUMBER][0] = 1;
    p_.B = 1;
    return true;
  }

  void check_heads() {
    const int64_t hq = r_.head[Q].size, hk = r_.head[K].size, hv = r_.head[V].size;
    if (!reasons_.check(hk == hv || hk == 1 || hv == 1, Kind::value, [&] {
          return "key heads (" + std::to_string(hk) + ") must equal value heads (" +
                 std::to_string(hv) + "); " + shapes();
        }))
      return;
    const int64_t hkv = std::min(hk, hv) == 0 ? 0 : std::max(hk, hv);
    const auto counts = [&] { return "query heads (" + std::to_string(hq) + ") must "; };
    if (a_.enable_gqa || a_.varlen()) {
      reasons_.check(hkv > 0 ? hq % hkv == 0 : hq == 0, Kind::value, [&] {
        return counts() + "be a multiple of key heads (" + std::to_string(hkv) + "); " + shapes();
      });
    } else {
      reasons_.check(hq == hkv || hq == 1 || hkv == 1, Kind::value, [&] {
        return counts() + "equal key heads (" + std::to_string(hkv) + "); " + shapes() +
               ". For grouped queries pass enable_gqa=True.";
      });
    }
    p_.Hq = int(hkv == 0 ? 0 : std::max(hq, hkv) * (hq > 0));
    p_.Hkv = int(hkv);
  }

  void check_head_dims() {
    const Dim q = dim_from_end(a_.q, 1), k = dim_from_end(a_.k, 1), v = dim_from_end(a_.v, 1);
    reasons_.check(q.size == k.size && q.size >= 1 && v.size >= 1, Kind::value, [&] {
      return "expected q and k of one head_dim, and head dimensions of at least 1; got " + shapes();
    });
    p_.D = int(q.size);
    p_.Dv = int(v.size);
    for (const auto& [dim, what] : {std::pair{q, "q"}, {k, "k"}, {v, "v"}})
      reasons_.check(dim.stride <= 1 && (dim.size == 1 || dim.stride == 1), Kind::value,
                     [&, what = what, stride = dim.stride] {
                       return std::string("expected a contiguous last dimension; ") + what +
                              " has stride " + std::to_string(stride) + " there. Call " + what +
                              ".contiguous().";
                     });
  }

  void check_lengths() {
    if (!reasons_.check(r_.row[K].size == r_.row[V].size, Kind::value,
                        [&] { return "k and v must have one length; got " + shapes(); }))
      return;
    const int64_t longest = std::max(r_.row[Q].size, r_.row[K].size);
    reasons_.check(longest <= MAX_LENGTH, Kind::value,
                   [&] { return "expected lengths of at most 2^30; got " + shapes(); });
    p_.Sq = int(std::min<int64_t>(r_.row[Q].size, MAX_LENGTH));
    p_.Sk = int(std::min<int64_t>(r_.row[K].size, MAX_LENGTH));
  }

  void check_cu_seqlens() {
    const Tensor* cu[] = {a_.cu_seqlens_q, a_.cu_seqlens_k};
    for (const Tensor* t : cu)
      if (!reasons_.check(
              t->scalar_type() == ScalarType::Int && t->is_contiguous(), Kind::type, [&] {
                return std::string(
                           "expected contiguous int32 cu_seqlens_q and cu_seqlens_k; got ") +
                       torch::headeronly::toString(t->scalar_type());
              }))
        return;
    p_.cu_seqlens_q = static_cast<const int32_t*>(cu[0]->const_data_ptr());
    p_.cu_seqlens_k = static_cast<const int32_t*>(cu[1]->const_data_ptr());
    // A GPU's lengths are not read back (that would wait for the stream); there the packed length
    // bounds them.
    const int64_t asked[] = {a_.max_seqlen_q, a_.max_seqlen_k};
    int* longest[] = {&p_.Sq, &p_.Sk};
    for (int i = 0; i < 2; ++i) {
      const int total = *longest[i];
      if (cu[i]->is_cpu()) {
        const int found = longest_sequence(static_cast<const int32_t*>(cu[i]->const_data_ptr()),
                                           cu[i]->numel(), total);
        const char* side = i ? "k" : "q";
        if (!reasons_.check(found >= 0, Kind::value, [&] {
              return std::string("expected cu_seqlens_") + side +
                     " that starts at 0, never falls and ends at the packed length (" +
                     std::to_string(total) + ")";
            }))
          return;
        if (!reasons_.check(asked[i] < 0 || asked[i] >= found, Kind::value, [&] {
              return std::string("expected max_seqlen_") + side + " of at least " +
                     std::to_string(found) + ", the longest sequence; got " +
                     std::to_string(asked[i]);
            }))
          return;
        *longest[i] = found;
      } else if (asked[i] >= 0) {
        *longest[i] = int(std::min<int64_t>(asked[i], total));
      }
    }
  }

  // The longest sequence, or -1 where the offsets are not 0 = c[0] <= c[1] <= ... = total.
  static int longest_sequence(const int32_t* cu, int64_t n, int total) {
    if (cu[0] != 0 || cu[n - 1] != total) return -1;
    int longest = 0;
    for (int64_t i = 0; i + 1 < n; ++i) {
      if (cu[i + 1] < cu[i]) return -1;
      longest = std::max(longest, cu[i + 1] - cu[i]);
    }
    return longest;
  }

  // The batch strides of a tensor that broadcasts to [batch..., last `inner` dimensions]; false if
  // it does not.
  bool read_batch(const Tensor& t, int inner, Operand operand) {
    if (t.dim() > std::max<int64_t>(r_.batch.count + inner, r_.rank - 3 + inner)) return false;
    for (int d = 0; d < r_.batch.count; ++d) {
      const Dim dim = dim_from_end(t, r_.batch.count - d + inner);
      if (dim.size != 1 && dim.size != r_.batch.size[d]) return false;
      r_.batch.stride[operand][d] = dim.stride;
    }
    return true;
  }

  void read_mask() {
    if (!a_.mask) return;
    const Tensor& t = *a_.mask;
    Mask& m = p_.mask;
    reasons_.check(to_dtype(t.scalar_type(), &m.dtype), Kind::type, [&] {
      return std::string("expected a bool, float64, float32, float16 or bfloat16 attn_mask; got ") +
             torch::headeronly::toString(t.scalar_type());
    });
    const Dim head = dim_from_end(t, 3), row = dim_from_end(t, 2), col = dim_from_end(t, 1);
    const bool fits = (head.size == 1 || head.size == p_.Hq) &&
                      (row.size == 1 || row.size == p_.Sq) && (col.size == 1 || col.size == p_.Sk);
    reasons_.check(fits && read_batch(t, 3, MASK), Kind::value, [&] {
      return "expected an attn_mask that broadcasts to [..., query heads, query length, key "
             "length] = [..., " +
             std::to_string(p_.Hq) + ", " + std::to_string(p_.Sq) + ", " + std::to_string(p_.Sk) +
             "]; got " + shape(t) + "; " + shapes();
    });
    m.data = t.const_data_ptr();
    m.head = head.stride, m.row = row.stride, m.col = col.stride;
  }

  // alibi_slopes and sinks: [Hq] or [B, Hq], in the accumulation type.
  void read_per_head(const OptionalTensor& given, const char* what, Operand operand, PerHead* out) {
    if (!given) return;
    DType dtype;
    if (!reasons_.check(to_dtype(given->scalar_type(), &dtype) && dtype != DType::boolean,
                        Kind::type, [&] {
                          return std::string("expected floating-point ") + what + "; got " +
                                 torch::headeronly::toString(given->scalar_type());
                        }))
      return;
    const ScalarType accumulate = p_.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    const Tensor t =
        given->scalar_type() == accumulate ? *given : torch::stable::to(*given, accumulate);
    const Dim head = dim_from_end(t, 1);
    reasons_.check(
        t.dim() >= 1 && head.size == p_.Hq && read_batch(t, 1, operand), Kind::value, [&] {
          return std::string("expected ") + what + " [query heads] or [batch, query heads], with " +
                 std::to_string(p_.Hq) + " query heads; got " + shape(t);
        });
    out->data = t.const_data_ptr();
    out->head = head.stride;
    r_.kept.push_back(t);
  }

  void check_options() {
    reasons_.check(std::isfinite(a_.scale), Kind::value,
                   [&] { return "expected a finite scale; got " + std::to_string(a_.scale); });
    reasons_.check(a_.softcap >= 0 && std::isfinite(a_.softcap), Kind::value, [&] {
      return "expected a softcap of 0 (off) or more; got " + std::to_string(a_.softcap);
    });
    reasons_.check(a_.window_left >= -1 && a_.window_right >= -1, Kind::value, [&] {
      return "expected a window_size of -1 (unlimited) or more on each side; got (" +
             std::to_string(a_.window_left) + ", " + std::to_string(a_.window_right) + ")";
    });
    reasons_.check(a_.dropout >= 0 && a_.dropout <= 1, Kind::value, [&] {
      return "expected a dropout probability of 0 to 1; got " + std::to_string(a_.dropout);
    });
    if (a_.dropout > 0 &&
        reasons_.check(
            a_.seed && a_.seed->numel() == 1 && a_.seed->scalar_type() == ScalarType::Long,
            Kind::value, [&] {
              return "expected, with dropout, an int64 seed of one element; got " +
                     (a_.seed ? shape(*a_.seed) : std::string("none"));
            }))
      p_.seed = static_cast<const int64_t*>(a_.seed->const_data_ptr());
    p_.dropout = a_.dropout;
    p_.scale = a_.scale;
    p_.softcap = a_.softcap;
    auto bound = [](int64_t w) { return int(w < 0 || w >= NO_WINDOW ? NO_WINDOW : w); };
    p_.window_left = bound(a_.window_left);
    p_.window_right = bound(a_.window_right);
    p_.bottom_right = a_.bottom_right;
  }

  void check_target() {
    std::string reason;
    r_.kernels = kernels_for(a_.q.is_cuda(), a_.q.get_device_index(), &reason);
    if (!reasons_.check(r_.kernels != nullptr, Kind::runtime, [&] { return reason; })) return;
    p_.tf32 = p_.dtype == DType::f32 && r_.kernels->tf32 && tf32_allowed();
    if (p_.dtype != DType::boolean)
      reasons_.check(r_.kernels->dtypes & bit(p_.dtype), Kind::type, [&] {
        return std::string("target ") + r_.kernels->target + " has no " + name(p_.dtype) +
               " kernel. Convert q, k and v.";
      });
    reasons_.check(serves_head_dims(), Kind::value, [&] { return served_head_dims(); });
  }

  bool serves_head_dims() const {
    const Kernels& has = *r_.kernels;
    if (p_.D <= has.max_head_dim && p_.Dv <= has.max_head_dim) return true;
    const bool is_short = p_.dtype == DType::f16 || p_.dtype == DType::bf16;
    return serves_ == Serves::ATTENTION && is_short && p_.D <= has.max_wide_head_dim &&
           p_.Dv <= has.max_wide_head_dim_v;
  }
  std::string served_head_dims() const {
    const Kernels& has = *r_.kernels;
    std::string text = std::string("target ") + has.target +
                       " has kernels for head dimensions up to " + std::to_string(has.max_head_dim);
    if (has.max_wide_head_dim)
      text += ", and of attention in float16 and bfloat16, but for its statistics, up to " +
              std::to_string(has.max_wide_head_dim) + " of q and k and " +
              std::to_string(has.max_wide_head_dim_v) + " of v";
    return text + "; " + shapes();
  }

  const Arguments& a_;
  Reasons& reasons_;
  const Serves serves_;
  AttentionRequest& r_;
  AttentionParams& p_;
};

}  // namespace

AttentionRequest read_attention(const Arguments& a, Reasons& reasons, Serves serves) {
  AttentionRequest request;
  Reader(a, reasons, serves, request).read();
  return request;
}

}  // namespace atx::ops
