// attention_fwd, policy GeneralBlocks, f32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_fwd_f32.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_f32<
    atx::ATX_TARGET::GeneralBlocks<float>>(const AttentionParams&, const Exec&);
