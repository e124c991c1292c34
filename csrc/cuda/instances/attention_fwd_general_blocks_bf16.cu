// attention_fwd, policy GeneralBlocks, bf16.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_fwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd<
    atx::bf16, atx::ATX_TARGET::GeneralBlocks<float>>(const AttentionParams&, const Exec&);
