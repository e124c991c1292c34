// attention_fwd of few queries, policies Window and General, bf16.
#include "csrc/cuda/attention_fwd.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_fwd_split<bf16, Window<float>>(const AttentionParams&,
                                                                const Exec&);
template Status launch_attention_fwd_split<bf16, General<float>>(const AttentionParams&,
                                                                 const Exec&);
}  // namespace atx::ATX_TARGET
