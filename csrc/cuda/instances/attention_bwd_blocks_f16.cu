// attention_bwd, policy Blocks, f16.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_bwd<
    atx::f16, atx::ATX_TARGET::Blocks<float>>(const AttentionBwdParams&, const Exec&);
