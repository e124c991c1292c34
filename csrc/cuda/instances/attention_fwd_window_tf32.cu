// attention_fwd, policy Window, tf32.
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_tf32<atx::ATX_TARGET::Window<float>>(
    const AttentionParams&, const Exec&);
