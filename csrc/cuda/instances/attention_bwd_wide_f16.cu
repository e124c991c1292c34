// attention_bwd beyond a head dimension of 256, f16: Window, General, and GeneralBlocks, which does
// for Blocks.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_bwd_mask.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_bwd_wide<f16, Window<float>>(const AttentionBwdParams&,
                                                              const Exec&);
template Status launch_attention_bwd_wide<f16, General<float>>(const AttentionBwdParams&,
                                                               const Exec&);
template Status launch_attention_bwd_wide<f16, GeneralBlocks<float>>(const AttentionBwdParams&,
                                                                     const Exec&);
template Status launch_attention_bwd_wide_mask<f16>(const AttentionBwdParams&, const Exec&);
}  // namespace atx::ATX_TARGET
