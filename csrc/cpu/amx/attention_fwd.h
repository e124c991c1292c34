// Attention forward with tile registers: what they multiply is computed on them, the rest as on
// AVX-512.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"

namespace atx::avx512 {
Status attention_fwd(const AttentionParams& p, const Exec& exec);
}

namespace atx::ATX_TARGET {
// Rows of a task; more than csrc/cpu/attention_fwd.h's, for transposing the values costs more here.
constexpr int TILE_BLOCK_ROWS = 768;

// bf16 in tiles.
Status attention_fwd_bf16(const AttentionParams& p, const Exec& exec);
// bf16 and f16 in tiles.
Status attention_fwd_bf16_f16(const AttentionParams& p, const Exec& exec);
}  // namespace atx::ATX_TARGET
