// attention_bwd, policy Window, f32 and tf32.
#include "csrc/cuda/attention_bwd.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_bwd<float, Window<float>>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd<tf32, Window<float>>(const AttentionBwdParams&, const Exec&);
}  // namespace atx::ATX_TARGET
