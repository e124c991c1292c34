// attention_bwd, policy General, tf32.
#include "csrc/cuda/attention_bwd_mask.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::tf32, atx::ATX_TARGET::General<float>>(const AttentionBwdParams&, const Exec&);
template atx::Status atx::ATX_TARGET::launch_attention_bwd_mask<atx::tf32>(
    const AttentionBwdParams&, const Exec&);
