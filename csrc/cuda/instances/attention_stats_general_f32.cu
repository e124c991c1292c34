// attention_stats, policy General, f32.
#include "csrc/cuda/attention_stats.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_stats<
    float, atx::ATX_TARGET::General<float>>(const AttentionStatsParams&, const Exec&);
