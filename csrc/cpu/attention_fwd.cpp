// o = softmax(score(q kᵀ)) v, tiled online softmax (FlashAttention-2, algorithm 1: queries outside,
// keys inside). tasks.h cuts a call into tasks; many rows: panels.h, few (decoding): rows.h.
#include "csrc/cpu/attention_fwd.h"

#include "csrc/cpu/panels.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/tasks.h"

namespace atx::ATX_TARGET {

Status attention_fwd(const AttentionParams& p, const Exec& exec) {
  if (p.B == 0 || p.Hq == 0 || p.Sq == 0) return nullptr;
  p.dtype == DType::f64 ? run_by_score<Panels<double>, FewRows<double>>(p, exec)
                        : run_by_score<Panels<float>, FewRows<float>>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
