// attention_stats, policies Window and General, f16.
#include "csrc/cuda/attention_stats.cuh"
namespace atx::ATX_TARGET {
template Status launch_attention_stats<f16, Window<float>>(const AttentionStatsParams&,
                                                           const Exec&);
template Status launch_attention_stats<f16, General<float>>(const AttentionStatsParams&,
                                                            const Exec&);
}  // namespace atx::ATX_TARGET
