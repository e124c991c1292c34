// attention_bwd, policy Window, f32.
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<float, atx::ATX_TARGET::Window<float>>(
    const AttentionBwdParams&, const Exec&);
