// Merging of two partial attention results, and its gradients.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

Status merge_states(const MergeStatesParams& p, const Exec& exec);
Status merge_states_bwd(const MergeStatesBwdParams& p, const Exec& exec);

}  // namespace atx::ATX_TARGET
