// attention_fwd, policy Full, f16.
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd<atx::f16, atx::ATX_TARGET::Full<float>>(
    const AttentionParams&, const Exec&);
