// attention_fwd, policy General, tf32.
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_tf32<atx::ATX_TARGET::General<float>>(
    const AttentionParams&, const Exec&);
