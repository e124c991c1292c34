// attention_fwd, policy General, f32 and tf32.
#include "csrc/cuda/attention_fwd.cuh"
#include "csrc/cuda/attention_fwd_f32.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_fwd_f32<General<float>>(const AttentionParams&, const Exec&);
template Status launch_attention_fwd_tf32<General<float>>(const AttentionParams&, const Exec&);
}  // namespace atx::ATX_TARGET
