// Attention backward with tile registers: what they multiply is computed on them, the rest as on
// AVX-512.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"

namespace atx::avx512 {
Status attention_bwd(const AttentionBwdParams& p, const Exec& exec);
}

namespace atx::ATX_TARGET {
// Rows of a tile and keys of a block: the depths of the sums over rows and over keys.
constexpr int TILE_BWD_BLOCK_Q = 128, TILE_BWD_BLOCK_KV = 256;

// bf16 in tiles.
Status attention_bwd_bf16(const AttentionBwdParams& p, const Exec& exec);
// bf16 and f16 in tiles.
Status attention_bwd_bf16_f16(const AttentionBwdParams& p, const Exec& exec);
}  // namespace atx::ATX_TARGET
