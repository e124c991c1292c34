// attention_bwd, policy Full, f16.
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<atx::f16, atx::ATX_TARGET::Full<float>>(
    const AttentionBwdParams&, const Exec&);
