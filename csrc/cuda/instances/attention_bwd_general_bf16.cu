// attention_bwd, policy General, bf16.
#include "csrc/cuda/attention_bwd_mask.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::bf16, atx::ATX_TARGET::General<float>>(const AttentionBwdParams&, const Exec&);
template atx::Status atx::ATX_TARGET::launch_attention_bwd_mask<atx::bf16>(
    const AttentionBwdParams&, const Exec&);
