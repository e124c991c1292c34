// attention_fwd, policy GeneralBlocks, tf32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_tf32<
    atx::ATX_TARGET::GeneralBlocks<float>>(const AttentionParams&, const Exec&);
