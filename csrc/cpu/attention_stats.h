// What the weights of attention look like: entropy, top weight, sums over queries.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/gemm.h"

namespace atx::ATX_TARGET {

Status attention_stats(const AttentionStatsParams& p, const Exec& exec);

// Keys that rows are converted for, and packed, at a time; the statistics of a row stay in cache
// for as long.
constexpr int STATS_BLOCK_KV = 384;
// Rows (queries times heads of the group) that meet them at a time: few, so that a window or the
// causal diagonal cuts through few tiles, and whole strips.
constexpr int STATS_TILE_ROWS = 8 * STRIP_ROWS;

}  // namespace atx::ATX_TARGET
