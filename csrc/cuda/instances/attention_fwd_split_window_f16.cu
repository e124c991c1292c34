// attention_fwd of few queries, policy Window, f16.
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_split<
    atx::f16, atx::ATX_TARGET::Window<float>>(const AttentionParams&, const Exec&);
