// attention_bwd, policy Blocks, f32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<float, atx::ATX_TARGET::Blocks<float>>(
    const AttentionBwdParams&, const Exec&);
