// attention_bwd, policy GeneralBlocks, tf32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::tf32, atx::ATX_TARGET::GeneralBlocks<float>>(const AttentionBwdParams&, const Exec&);
