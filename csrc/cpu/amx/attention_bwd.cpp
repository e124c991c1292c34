// The gradients of attention of 16-bit tensors on the tile registers (attention_bwd_products.h).
// The gradient of a mask is a table of dY, for which no sums of products are wanted but its own: it
// stays AVX-512's.
#include "csrc/cpu/amx/attention_bwd.h"

#include "csrc/cpu/amx/attention_bwd_products.h"
#include "csrc/cpu/attention_bwd_gradients.h"
#include "csrc/cpu/attention_bwd_tasks.h"

namespace atx::ATX_TARGET {
namespace {

template <class T>
Status run_all(const AttentionBwdParams& p, const Exec& exec) {
  AttentionBwdParams but_mask = p;
  but_mask.d_mask = nullptr;
  run_by_score<Gradients<TileProducts<T>>>(but_mask, exec);
  if (!p.d_mask) return nullptr;
  AttentionBwdParams mask_only = p;
  mask_only.d_q = mask_only.d_k = mask_only.d_v = nullptr;
  mask_only.d_alibi = mask_only.d_sinks = mask_only.row_shares = nullptr;
  return avx512::attention_bwd(mask_only, exec);
}

}  // namespace

Status attention_bwd_bf16(const AttentionBwdParams& p, const Exec& exec) {
  return p.fwd.dtype == DType::bf16 ? run_all<bf16>(p, exec) : avx512::attention_bwd(p, exec);
}

Status attention_bwd_bf16_f16(const AttentionBwdParams& p, const Exec& exec) {
  return p.fwd.dtype == DType::f16 ? run_all<f16>(p, exec) : attention_bwd_bf16(p, exec);
}

}  // namespace atx::ATX_TARGET
