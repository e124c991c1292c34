// attention_bwd, what is computed per row and per head.
#include "csrc/cuda/attention_bwd_rows.cuh"

namespace atx::ATX_TARGET {

template Status launch_attention_bwd_delta<bf16>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd_delta<f16>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd_delta<float>(const AttentionBwdParams&, const Exec&);
template Status launch_attention_bwd_heads<float>(const AttentionBwdParams&, const Exec&);

}  // namespace atx::ATX_TARGET
