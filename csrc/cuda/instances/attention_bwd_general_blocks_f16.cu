// attention_bwd, policy GeneralBlocks, f16.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::f16, atx::ATX_TARGET::GeneralBlocks<float>>(const AttentionBwdParams&, const Exec&);
