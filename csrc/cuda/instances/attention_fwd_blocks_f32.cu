// attention_fwd, policy Blocks, f32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_fwd_f32.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_f32<atx::ATX_TARGET::Blocks<float>>(
    const AttentionParams&, const Exec&);
