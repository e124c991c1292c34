// topk_attention, forward and backward, f16.
#include "csrc/cuda/topk_attention_bwd.cuh"
#include "csrc/cuda/topk_attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_topk_attention_fwd<atx::f16>(
    const TopkAttentionParams&, const Exec&);
template atx::Status atx::ATX_TARGET::launch_topk_attention_bwd<atx::f16>(
    const TopkAttentionBwdParams&, const Exec&);
