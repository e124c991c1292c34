// attention_bwd, policy Window, tf32.
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::tf32, atx::ATX_TARGET::Window<float>>(const AttentionBwdParams&, const Exec&);
