// attention_bwd, policy Window, f16.
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::f16, atx::ATX_TARGET::Window<float>>(const AttentionBwdParams&, const Exec&);
