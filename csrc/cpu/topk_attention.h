// Attention over listed keys, and its gradients.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

Status topk_attention_fwd(const TopkAttentionParams& p, const Exec& exec);
Status topk_attention_bwd(const TopkAttentionBwdParams& p, const Exec& exec);

// Listed rows whose products with a task's rows are formed at a time: they stay in the L1 cache for
// all the rows that share the list, and sums of as many join the rest (for their error).
constexpr int LISTED_BLOCK = 64;

}  // namespace atx::ATX_TARGET
