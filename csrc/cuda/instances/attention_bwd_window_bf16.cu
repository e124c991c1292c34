// attention_bwd, policy Window, bf16.
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::bf16, atx::ATX_TARGET::Window<float>>(const AttentionBwdParams&, const Exec&);
