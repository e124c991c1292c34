// attention_fwd, policy Full, f32.
#include "csrc/cuda/attention_fwd_f32.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_f32<atx::ATX_TARGET::Full<float>>(
    const AttentionParams&, const Exec&);
