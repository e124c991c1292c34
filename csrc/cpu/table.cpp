// One row of the function table: what this instruction set offers.
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/attention_stats.h"
#include "csrc/cpu/merge_states.h"
#include "csrc/cpu/topk_attention.h"

#define ATX_NAME_OF(target) #target
#define ATX_TARGET_NAME(target) ATX_NAME_OF(target)

namespace atx::ATX_TARGET {

constexpr KernelInfo CATALOGUE[] = {
    {"attention_fwd", "f64 f32 f16 bf16", "Window General", 576, BLOCK_ROWS, BLOCK_KV, 1, 0},
    {"attention_bwd", "f64 f32 f16 bf16", "Window General", 576, BWD_TILE_ROWS, BWD_BLOCK_KV, 1, 0},
    {"attention_stats", "f64 f32 f16 bf16", "Window General", 576, STATS_TILE_ROWS, STATS_BLOCK_KV,
     1, 0},
    {"topk_attention_fwd", "f64 f32 f16 bf16", "lists", 576, 1, LISTED_BLOCK, 1, 0},
    {"topk_attention_bwd", "f64 f32 f16 bf16", "lists", 576, 1, LISTED_BLOCK, 1, 0}};

extern const Kernels kernels;
constinit const Kernels kernels = {
    .target = ATX_TARGET_NAME(ATX_TARGET),
    .dtypes = bit(DType::f64) | bit(DType::f32) | bit(DType::f16) | bit(DType::bf16),
    .max_head_dim = 576,
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .attention_stats = attention_stats,
    .topk_attention_fwd = topk_attention_fwd,
    .topk_attention_bwd = topk_attention_bwd,
    .merge_states = merge_states,
    .merge_states_bwd = merge_states_bwd,
    .catalogue = CATALOGUE,
    .catalogue_size = sizeof CATALOGUE / sizeof CATALOGUE[0],
};

}  // namespace atx::ATX_TARGET
