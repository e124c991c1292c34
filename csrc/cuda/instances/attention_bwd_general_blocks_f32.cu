// attention_bwd, policy GeneralBlocks, f32 and tf32.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_bwd<float, GeneralBlocks<float>>(const AttentionBwdParams&,
                                                                  const Exec&);
template Status launch_attention_bwd<tf32, GeneralBlocks<float>>(const AttentionBwdParams&,
                                                                 const Exec&);
}  // namespace atx::ATX_TARGET
