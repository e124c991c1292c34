// attention_stats, policy General, bf16.
#include "csrc/cuda/attention_stats.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_stats<
    atx::bf16, atx::ATX_TARGET::General<float>>(const AttentionStatsParams&, const Exec&);
