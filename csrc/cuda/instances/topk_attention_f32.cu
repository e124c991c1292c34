// topk_attention, forward and backward, f32.
#include "csrc/cuda/topk_attention_bwd.cuh"
#include "csrc/cuda/topk_attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_topk_attention_fwd<float>(const TopkAttentionParams&,
                                                                       const Exec&);
template atx::Status atx::ATX_TARGET::launch_topk_attention_bwd<float>(
    const TopkAttentionBwdParams&, const Exec&);
