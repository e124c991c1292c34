// Which tile a problem runs on: the only place that chooses. It looks at the dtype, the head
// dimension and the score policy, never at batch or length, so that a row's bits do not depend on
// what it is batched with.
#pragma once
#include "csrc/core/numeric.h"
#include "csrc/core/params.h"

namespace atx::ATX_TARGET {

// Head dimensions compiled: a problem runs on the smallest that holds both D and Dv, the rest being
// zeros.
constexpr int HEAD_DIMS[] = {32, 64, 96, 128, 192, 256};

template <int D>
struct HeadDim {};

// use(HeadDim<D>{}) of the tile that d runs on.
template <int I = 0, class Use>
constexpr auto with_head_dim(int d, Use use) {
  if constexpr (HEAD_DIMS[I] == 256)
    return use(HeadDim<HEAD_DIMS[I]>{});
  else
    return d <= HEAD_DIMS[I] ? use(HeadDim<HEAD_DIMS[I]>{}) : with_head_dim<I + 1>(d, use);
}

// Tensor cores (bf16, f16). A warp owns 16 M query rows.
template <class T_, int D_, bool LINEAR>
struct FwdTile {
  using T = T_;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS;
  // Every K or V fragment that a warp reads serves all its rows: 32 rows halve the shared-memory
  // reads per product, which at 16 rows take as long as the products themselves. It needs 2 D / 16
  // · 8 accumulators, too many registers from D 192 on; and the logits of General (mask addresses,
  // soft-cap) want the registers more than the bandwidth.
  static constexpr int M = LINEAR && D <= 128 ? 2 : 1;
  static constexpr int BLOCK_Q = 16 * M * WARPS;
  // As many keys as fit a warp's registers as logits, beside its accumulators, without a spill.
  // The largest block, of D 256, then takes 64 KB of the 99 that sm_86 has.
  static constexpr int BLOCK_KV = D <= 64 || (M == 1 && D <= 128) ? 64 : 32;
  // Q's fragments stay in registers where accumulators and logits leave room; otherwise they are
  // reread per tile.
  static constexpr bool Q_IN_REGISTERS = M * D <= 128;
  static constexpr int SHARED_BYTES = (BLOCK_Q + 2 * BLOCK_KV) * D * 2;
};

// FMA units (f32). A warp of 2 x 16 lanes owns rows; a lane multiplies BLOCK_Q / 8 of them with
// BLOCK_KV / 16 keys.
template <int D_>
struct F32Tile {
  using T = float;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS;
  // 8 x 2 products per lane and head dimension cost 12 cycles of shared memory and 16 of FMA units.
  // Larger dimensions keep within the 99 KB that a block may have on sm_86.
  static constexpr int BLOCK_Q = D <= 128 ? 64 : 32;
  static constexpr int BLOCK_KV = D <= 192 ? 32 : 16;
  static constexpr int P_COLS = 32;  // whole lines of 32 banks, though BLOCK_KV may be less
  static constexpr int SHARED_BYTES = ((BLOCK_Q + 2 * BLOCK_KV) * D + BLOCK_Q * P_COLS) * 4;
};

}  // namespace atx::ATX_TARGET
