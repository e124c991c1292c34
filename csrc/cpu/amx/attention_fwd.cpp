// o = softmax(score(q kᵀ)) v of 16-bit tensors on the tile registers (panels.h). Calls of few rows
// (decoding) read k and v once either way, and take csrc/cpu/rows.h.
#include "csrc/cpu/amx/attention_fwd.h"

#include "csrc/cpu/amx/panels.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/tasks.h"

namespace atx::ATX_TARGET {

Status attention_fwd_bf16(const AttentionParams& p, const Exec& exec) {
  if (p.dtype != DType::bf16 || p.dropout > 0) return avx512::attention_fwd(p, exec);
  if (p.B != 0 && p.Hq != 0 && p.Sq != 0) run_by_score<TilePanels<bf16>, FewRows<float>>(p, exec);
  return nullptr;
}

Status attention_fwd_bf16_f16(const AttentionParams& p, const Exec& exec) {
  if (p.dtype != DType::f16 || p.dropout > 0) return attention_fwd_bf16(p, exec);
  if (p.B != 0 && p.Hq != 0 && p.Sq != 0) run_by_score<TilePanels<f16>, FewRows<float>>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
