// topk_attention, forward and backward.
#include "csrc/cuda/topk_attention_bwd.cuh"
#include "csrc/cuda/topk_attention_fwd.cuh"
namespace atx::ATX_TARGET {
template Status launch_topk_attention_fwd<bf16>(const TopkAttentionParams&, const Exec&);
template Status launch_topk_attention_fwd<f16>(const TopkAttentionParams&, const Exec&);
template Status launch_topk_attention_fwd<float>(const TopkAttentionParams&, const Exec&);
template Status launch_topk_attention_bwd<bf16>(const TopkAttentionBwdParams&, const Exec&);
template Status launch_topk_attention_bwd<f16>(const TopkAttentionBwdParams&, const Exec&);
template Status launch_topk_attention_bwd<float>(const TopkAttentionBwdParams&, const Exec&);
}  // namespace atx::ATX_TARGET
