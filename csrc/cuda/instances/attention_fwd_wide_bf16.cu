// attention_fwd beyond a head dimension of 256, bf16: Window, General, and GeneralBlocks,
// which does for Blocks; the first two also of few queries.
#include "csrc/core/blocks.h"
#include "csrc/cuda/attention_fwd_wide.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_fwd_wide<bf16, Window<float>>(const AttentionParams&, const Exec&);
template Status launch_attention_fwd_wide<bf16, General<float>>(const AttentionParams&,
                                                                const Exec&);
template Status launch_attention_fwd_wide<bf16, GeneralBlocks<float>>(const AttentionParams&,
                                                                      const Exec&);
template Status launch_attention_fwd_wide_split<bf16, Window<float>>(const AttentionParams&,
                                                                     const Exec&);
template Status launch_attention_fwd_wide_split<bf16, General<float>>(const AttentionParams&,
                                                                      const Exec&);
}  // namespace atx::ATX_TARGET
