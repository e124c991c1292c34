// attention_stats, policy Full, f32.
#include "csrc/cuda/attention_stats.cuh"
template atx::Status atx::ATX_TARGET::launch_attention_stats<float, atx::ATX_TARGET::Full<float>>(
    const AttentionStatsParams&, const Exec&);
