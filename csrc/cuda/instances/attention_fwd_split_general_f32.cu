// attention_fwd of few queries, policy General, f32.
#include "csrc/cuda/attention_fwd_f32.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_fwd_split_f32<
    atx::ATX_TARGET::General<float>>(const AttentionParams&, const Exec&);
