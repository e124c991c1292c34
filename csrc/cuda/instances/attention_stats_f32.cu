// attention_stats, policies Window and General, f32.
#include "csrc/cuda/attention_stats.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_stats<float, Window<float>>(const AttentionStatsParams&,
                                                             const Exec&);
template Status launch_attention_stats<float, General<float>>(const AttentionStatsParams&,
                                                              const Exec&);
}  // namespace atx::ATX_TARGET
