// attention_bwd, policy General, f32 and tf32.
#include "csrc/cuda/attention_bwd_mask.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_bwd<float, General<float>>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd<tf32, General<float>>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd_mask<float>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd_mask<tf32>(const AttentionBwdParams&, const Exec&);
}  // namespace atx::ATX_TARGET
