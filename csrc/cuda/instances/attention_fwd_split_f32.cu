// attention_fwd of few queries, policies Window and General, f32.
#include "csrc/cuda/attention_fwd_f32.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_fwd_split_f32<Window<float>>(const AttentionParams&, const Exec&);
template Status launch_attention_fwd_split_f32<General<float>>(const AttentionParams&, const Exec&);
}  // namespace atx::ATX_TARGET
