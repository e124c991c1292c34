// attention_bwd, policy General, f32.
#include "csrc/cuda/attention_bwd_mask.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<float, atx::ATX_TARGET::General<float>>(
    const AttentionBwdParams&, const Exec&);
template atx::Status atx::ATX_TARGET::launch_attention_bwd_mask<float>(const AttentionBwdParams&,
                                                                       const Exec&);
