// Which tile a problem runs on: the only place that chooses. It looks at the dtype, the head
// dimension and the score policy, for few queries at the lengths of a dense call, never at the
// batch, so that a row's bits do not depend on what it is batched with.
#pragma once
#include <type_traits>

#include "csrc/core/numeric.h"
#include "csrc/core/params.h"

namespace atx::ATX_TARGET {

template <int D, int DV = D>
struct HeadDim {};

// Head dimensions compiled: a problem runs on the smallest that holds both D and Dv, the rest being
// zeros. Fewer where zeros cost little, as memory sets the pace (few queries, lists), and where the
// products they do cost are worth a shorter build (statistics, combinations of options).
inline constexpr int ALL_HEAD_DIMS[] = {32, 64, 96, 128, 192, 256},
                     COARSE_HEAD_DIMS[] = {64, 128, 256};

// Whether a policy needs no more of a pair than where it is: it leaves registers for larger tiles.
template <class Score>
constexpr bool ONLY_SCALES = Score::LINEAR && !Score::SPARSE;

// Those of a type and a policy. All have what most calls ask for: in 16 bits everything but block
// masks with a soft-cap or dropout; in f32, on FMA units, only Window.
template <class T, class Score>
constexpr bool IS_COMMON = int(!Score::LINEAR) + int(Score::SPARSE) <= (sizeof(T) == 2 ? 1 : 0);
template <class T, class Score, bool = IS_COMMON<T, Score>>
constexpr const auto& DIMS = ALL_HEAD_DIMS;
template <class T, class Score>
constexpr const auto& DIMS<T, Score, false> = COARSE_HEAD_DIMS;

template <const auto& LIST>
constexpr int LENGTH = sizeof(LIST) / sizeof(LIST[0]);
// use(HeadDim<D>{}) of the first D of LIST that holds d, which the last one does.
template <const auto& LIST, int I = 0, class Use>
constexpr auto with_dim_of(int d, Use use) {
  if constexpr (I + 1 == LENGTH<LIST>)
    return use(HeadDim<LIST[I]>{});
  else
    return d <= LIST[I] ? use(HeadDim<LIST[I]>{}) : with_dim_of<LIST, I + 1>(d, use);
}
// The same of every one.
template <const auto& LIST, int I = 0, class Use>
constexpr void each_dim_of(Use use) {
  use(HeadDim<LIST[I]>{});
  if constexpr (I + 1 < LENGTH<LIST>) each_dim_of<LIST, I + 1>(use);
}

// Multi-head latent attention has 64 columns of positions in q and k beside the 128 that v has, too
// (DeepSeek-V2, arXiv:2405.04434): a pair of its own spares a third of v's products, and its
// accumulators are fewer than those of D 192.
inline constexpr int PAIR_D = 192, PAIR_DV = 128;

// with_dim_of a list, of D of q and k, and Dv of v.
template <const auto& LIST, class Use>
constexpr auto with_pair_of(int d, int dv, Use use) {
  if (PAIR_DV < d && d <= PAIR_D && dv <= PAIR_DV) return use(HeadDim<PAIR_D, PAIR_DV>{});
  return with_dim_of<LIST>(d > dv ? d : dv, use);
}
template <class T, class Score, class Use>
constexpr auto with_head_dims(int d, int dv, Use use) {
  return with_pair_of<DIMS<T, Score>>(d, dv, use);
}

// Tensor cores (bf16, f16). A warp owns 16 M query rows. ROW_WARPS have rows of their own; others
// share these rows, and have their part of each tile's keys.
template <class T_, int D_, bool LINEAR>
struct FwdTile {
  using T = T_;
  static constexpr bool SPLIT = false;
  static constexpr int D = D_, DV = D, WARPS = 4, ROW_WARPS = WARPS, THREADS = 32 * WARPS;
  // Every K or V fragment that a warp reads serves all its rows: 32 rows halve the shared-memory
  // reads per product, which at 16 rows take as long as the products themselves. It needs 2 D / 16
  // · 8 accumulators, too many registers from D 192 on; and the logits of General (mask addresses,
  // soft-cap) want the registers more than the bandwidth.
  static constexpr int M = LINEAR && D <= 128 ? 2 : 1;
  static constexpr int BLOCK_Q = 16 * M * WARPS;
  // As many keys as fit a warp's registers as logits, beside its accumulators, without a spill.
  // The largest block, of D 256, then takes 64 KB of the 99 that sm_86 has.
  static constexpr int BLOCK_KV = D <= 64 || (M == 1 && D <= 128) ? 64
                                  : LINEAR || D <= 192            ? 32
                                                                  : 16;
  // Q's fragments stay in registers where accumulators and logits leave room; otherwise they are
  // reread per tile.
  static constexpr bool Q_IN_REGISTERS = LINEAR && M * D <= 128;
  // Whether a mask's share of a tile comes through shared memory too (mask_tile.cuh).
  static constexpr bool STAGES_MASK = !LINEAR && BLOCK_KV >= 32;
  static constexpr int SHARED_BYTES =
      (BLOCK_Q + 2 * BLOCK_KV) * D * 2 + (STAGES_MASK ? BLOCK_Q * BLOCK_KV * 2 : 0);
  // Of a multiprocessor, at least. Where General needs no more registers, a third hides latency.
  static constexpr int BLOCKS = !LINEAR && D <= 64 ? 3 : 2;
};

// Of different D and DV: rows and keys as D = DV has them, whose accumulators these are. Q is
// reread per tile.
template <class T_, int D_, int DV_, bool LINEAR>
struct FwdPairTile {
  using T = T_;
  using Narrow = FwdTile<T, DV_, LINEAR>;
  static constexpr bool SPLIT = false, Q_IN_REGISTERS = false;
  static constexpr int D = D_, DV = DV_, WARPS = Narrow::WARPS, ROW_WARPS = WARPS;
  static constexpr int THREADS = Narrow::THREADS;
  static constexpr int M = Narrow::M, BLOCK_Q = Narrow::BLOCK_Q, BLOCK_KV = Narrow::BLOCK_KV;
  static constexpr bool STAGES_MASK = Narrow::STAGES_MASK;
  static constexpr int SHARED_BYTES =
      (BLOCK_Q * D + BLOCK_KV * (D + DV)) * 2 + (STAGES_MASK ? BLOCK_Q * BLOCK_KV * 2 : 0);
  static constexpr int BLOCKS = 2;
};
// The tile of D and DV.
template <class T, int D, int DV, bool LINEAR>
struct FwdTileOf {
  using Tile = FwdPairTile<T, D, DV, LINEAR>;
};
template <class T, int D, bool LINEAR>
struct FwdTileOf<T, D, D, LINEAR> {
  using Tile = FwdTile<T, D, LINEAR>;
};

// Tensor cores (f32 that may be rounded to tf32): the same in words, for fewer rows and keys, as
// they take twice the space.
template <int D_, bool LINEAR>
struct Tf32Tile {
  using T = tf32;
  static constexpr bool SPLIT = false;
  static constexpr int D = D_, DV = D, WARPS = 4, ROW_WARPS = WARPS, THREADS = 32 * WARPS;
  static constexpr int M = LINEAR && D <= 64 ? 2 : 1;
  static constexpr int BLOCK_Q = 16 * M * WARPS;
  // The largest block, of D 256, takes 96 KB of the 99 that sm_86 has.
  static constexpr int BLOCK_KV = D <= 128 ? 32 : 16;
  static constexpr bool Q_IN_REGISTERS = M == 1 && D <= (LINEAR ? 128 : 64);
  static constexpr bool STAGES_MASK = !LINEAR && BLOCK_KV >= 32;
  static constexpr int SHARED_BYTES =
      (BLOCK_Q + 2 * BLOCK_KV) * D * 4 + (STAGES_MASK ? BLOCK_Q * BLOCK_KV * 2 : 0);
  static constexpr int BLOCKS = 2;
};

// FMA units (f32). A warp of 2 x 16 lanes owns rows; a lane multiplies BLOCK_Q / 8 of them with
// BLOCK_KV / 16 keys.
template <int D_>
struct F32Tile {
  using T = float;
  static constexpr bool SPLIT = false;
  static constexpr int D = D_, DV = D, WARPS = 4, THREADS = 32 * WARPS;
  // 8 x 2 products per lane and head dimension cost 12 cycles of shared memory and 16 of FMA units.
  // Larger dimensions keep within the 99 KB that a block may have on sm_86.
  static constexpr int BLOCK_Q = D <= 128 ? 64 : 32;
  static constexpr int BLOCK_KV = D <= 192 ? 32 : 16;
  static constexpr int P_COLS = 32;  // whole lines of 32 banks, though BLOCK_KV may be less
  static constexpr int SHARED_BYTES = ((BLOCK_Q + 2 * BLOCK_KV) * D + BLOCK_Q * P_COLS) * 4;
  static constexpr int BLOCKS = 2;
};

// Calls of few queries read K and V for a handful of rows, so memory sets the pace, if enough
// blocks ask for it: the keys are split among blocks, in chunks whose partial results a second
// kernel combines (split.cuh). Few: as many as a tensor-core product has rows; a block then has all
// queries of a head, or those of several heads that read the same K and V.
//
// A chunk depends on the lengths and the window alone, never on the batch, the heads or the GPU.
// 64 chunks of 8 key heads are four blocks for each of 128 multiprocessors, about as many as they
// have room for. A chunk is at least 128 keys: in 16-bit K and V, four times the bytes that 16 rows
// of floats cost, which are written and read again.
constexpr int FEW_QUERIES = 16, MOST_CHUNKS = 64, LEAST_CHUNK_KEYS = 128;
constexpr int CHUNK_STEP = 64;  // chunks are multiples of every tile's keys

// Tensor cores (bf16, f16). The block's warps share its 16 rows and have a quarter of each tile's
// keys each: with rows of their own, three of four would multiply nothing. GROUPED: the rows are of
// all query heads of a key head, which a linear policy does not tell apart.
template <class T_, int D_, bool LINEAR>
struct SplitTile {
  using T = T_;
  static constexpr bool SPLIT = true, GROUPED = LINEAR;
  static constexpr int D = D_, DV = D, WARPS = 4, ROW_WARPS = 1, THREADS = 32 * WARPS, M = 1;
  static constexpr int BLOCK_Q = FEW_QUERIES, BLOCK_KV = 64;
  // Bytes in flight are what counts: registers for more blocks rather than for Q.
  static constexpr bool Q_IN_REGISTERS = D <= 64;
  static constexpr bool STAGES_MASK = !LINEAR && D <= 128;  // 256 spilled 8 bytes
  static constexpr int SHARED_BYTES =
      (BLOCK_Q + 2 * BLOCK_KV) * D * 2 + (STAGES_MASK ? BLOCK_Q * BLOCK_KV * 2 : 0);
  static constexpr int BLOCKS = D <= 64 && LINEAR ? 4 : D <= 128 ? 3 : 2;
};

// Head dimensions beyond 256, on tensor cores (attention_fwd_wide.cuh says why so large).
constexpr int WIDE_D = 576, WIDE_DV = 512;
constexpr bool is_wide(int d, int dv) { return (d > dv ? d : dv) > 256; }
template <class T_, bool LINEAR, bool SPLIT_>
struct WideTile {
  using T = T_;
  static constexpr bool SPLIT = SPLIT_, GROUPED = LINEAR, Q_IN_REGISTERS = false;
  static constexpr int D = WIDE_D, DV = WIDE_DV, WARPS = 8, ROW_WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int M = 1;  // of the scores
  static constexpr int BLOCK_Q = 64, BLOCK_KV = 32;
  // Five floats a row: a base, and two for each of the two warps that share it.
  static constexpr int SHARED_BYTES =
      (BLOCK_Q + 2 * BLOCK_KV) * D * 2 + BLOCK_Q * BLOCK_KV * 2 + BLOCK_Q * 5 * 4;
  static constexpr int BLOCKS = 1;
};

// FMA units (f32): 2 x 2 products per lane and head dimension.
template <int D_, bool LINEAR>
struct F32SplitTile {
  using T = float;
  static constexpr bool SPLIT = true, GROUPED = LINEAR;
  static constexpr int D = D_, DV = D, WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int BLOCK_Q = FEW_QUERIES, BLOCK_KV = 32, P_COLS = 32;
  static constexpr int SHARED_BYTES = ((BLOCK_Q + 2 * BLOCK_KV) * D + BLOCK_Q * P_COLS) * 4;
  static constexpr int BLOCKS = D <= 128 ? 4 : 2;
};

// A pass of the backward: whose gradients its blocks own. MASK sums up the attn_mask's.
enum class Pass { Q, K, V, KV, MASK };
constexpr bool owns_keys(Pass pass) {
  return pass == Pass::K || pass == Pass::V || pass == Pass::KV;
}

// Tensor cores (bf16, f16). A block owns BLOCK rows of Q and dO, or of K and V, and walks over the
// other two in steps of STEP rows, of which two are in shared memory at a time. A warp owns 16 M
// rows of the block. WIDE: the policy leaves registers for more rows (a linear one; not a sparse
// one, which spilled 24 bytes at D 64).
template <class T_, int D_, Pass PASS_, bool WIDE>
struct BwdTile {
  using T = T_;
  static constexpr Pass PASS = PASS_;
  static constexpr int D = D_, DV = D, WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;
  // As in the forward, 32 rows halve what is read from shared memory per product, where registers
  // hold their sums: dQ, or both dK and dV.
  static constexpr int M = WIDE && D <= (PASS == Pass::Q ? 128 : 64) ? 2 : 1;
  static constexpr int BLOCK = 16 * M * WARPS;
  // How many of the block's own two stay in registers, as A operands, where there is room beside
  // the sums: what is left of reading shared memory is that of partners.
  static constexpr int HELD = !WIDE             ? 0
                              : PASS == Pass::Q ? (D <= 64    ? 2
                                                   : D <= 128 ? 0
                                                              : 1)
                                                : D > 64;
  // The largest block, of D 256, takes 96 KB of the 99 that sm_86 has.
  static constexpr int STEP = D <= 192 ? 32 : 16;
  // Products of a plain tile that are unrolled: all of them, unless that spilled (16 bytes).
  static constexpr bool SPILLED = std::is_same_v<T, f16> && D == 128 && PASS == Pass::KV;
  static constexpr int UNROLL = SPILLED ? 4 : D / 16;
  static constexpr int SHARED_BYTES =
      2 * (BLOCK + STAGES * STEP) * D * 2 + STAGES * STEP * 8;  // 8: a row's log-sum-exp and delta
  static constexpr int BLOCKS = 2;                              // of a multiprocessor, at least
};

// Of different D and DV: rows of shared memory as D = DV has them, of which dO and V fill the first
// DV columns. Of Window alone, which leaves one warp the registers for both dK and dV, though not
// for rows beside them, nor for all products unrolled.
template <class T_, int D_, int DV_, Pass PASS_>
struct BwdPairTile : BwdTile<T_, D_, PASS_, true> {
  static constexpr int DV = DV_;
  static constexpr int HELD = PASS_ == Pass::Q ? 1 : 0, UNROLL = PASS_ == Pass::Q ? D_ / 16 : 4;
};
// The tile of D and DV.
template <class T, int D, int DV, Pass PASS, bool WIDE>
struct BwdTileOf {
  using Tile = BwdPairTile<T, D, DV, PASS>;
};
template <class T, int D, Pass PASS, bool WIDE>
struct BwdTileOf<T, D, D, PASS, WIDE> {
  using Tile = BwdTile<T, D, PASS, WIDE>;
};

// Head dimensions beyond 256, on tensor cores (attention_bwd_wide_warp.cuh says who has what). What
// is in shared memory, 162 of the 163 KB that a block may have on sm_80: the block's rows, of Q and
// dO or K and V, two stages of the others, the parts of products, 2 KB for each warp, weights of
// both others, and rows' statistics. Too much for the 99 KB of sm_86 and sm_89.
template <class T_, Pass PASS_>
struct WideBwdTile {
  using T = T_;
  static constexpr Pass PASS = PASS_;
  static constexpr int D = WIDE_D, DV = WIDE_DV, WARPS = 8, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int UNROLL = 0, BLOCK = 32, STEP = 16;
  // Whether a warp keeps its quarter of the block's rows in registers, as A operands, which are two
  // thirds of what its products read: beside the sum of dQ, but not those of dK and dV.
  static constexpr int HELD = PASS == Pass::Q;
  static constexpr int SHARED_BYTES = 2 * (BLOCK + STAGES * STEP) * D * 2 +
                                      WARPS * BLOCK * STEP * 4 + 2 * BLOCK * STEP * 2 +
                                      STAGES * STEP * 8;
  static constexpr int BLOCKS = 1;
};

// Whether dK and dV, of d and dv columns, are too much for the registers of one warp.
template <class T>
constexpr bool splits_keys_pass(int d, int dv) {
  return sizeof(T) == 2 && d + dv > PAIR_D + PAIR_DV;
}

// Tensor cores (f32 that may be rounded to tf32): the same in words, of at most so many dimensions.
// Of more, rows in words and both sums are too much for a block; FMA units take those.
constexpr int MOST_TF32_BWD_DIM = 128;
template <int D_, Pass PASS_, bool WIDE>
struct Tf32BwdTile {
  using T = tf32;
  static constexpr Pass PASS = PASS_;
  static constexpr int D = D_, DV = D, WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int M = WIDE && D <= 64 ? 2 : 1;
  static constexpr int BLOCK = 16 * M * WARPS;
  static constexpr int HELD = PASS == Pass::Q && WIDE && D == 128 ? 1 : 0;
  // Where 32 rows have both sums, more partners spilled 68 bytes. The largest block, of D 128,
  // takes 97 KB of the 99 that sm_86 has.
  static constexpr int STEP = D <= 64 && !(M == 2 && PASS == Pass::KV) ? 32 : 16;
  // Products of a plain tile that are unrolled: all 16 of D 128 spilled, beside both sums.
  static constexpr int UNROLL = PASS == Pass::Q ? D / 8 : 8;
  static constexpr int SHARED_BYTES =
      2 * (BLOCK + STAGES * STEP) * D * 4 + (STAGES * STEP * 8 + 127) / 128 * 128;
  static constexpr int BLOCKS = 2;
};

inline constexpr int TF32_BWD_DIMS[] = {64, MOST_TF32_BWD_DIM};

// The head dimensions that the backward's passes are compiled for, and that of the mask's gradient.
// In f16, which few train in since there is bf16, all of them under Window only.
template <class T, class Score>
constexpr const auto& bwd_dims() {
  if constexpr (std::is_same_v<T, tf32>)
    return TF32_BWD_DIMS;
  else if constexpr (std::is_same_v<T, f16> && !ONLY_SCALES<Score>)
    return COARSE_HEAD_DIMS;
  else
    return DIMS<T, Score>;
}
template <class T, class Score>
constexpr const auto& BWD_DIMS = bwd_dims<T, Score>();
template <class T, class Score>
constexpr bool HAS_BWD_PAIR = sizeof(T) == 2 && ONLY_SCALES<Score>;
template <class T, class Score, class Use>
constexpr auto with_bwd_dims(int d, int dv, Use use) {
  if constexpr (HAS_BWD_PAIR<T, Score>)
    return with_pair_of<BWD_DIMS<T, Score>>(d, dv, use);
  else
    return with_dim_of<BWD_DIMS<T, Score>>(d > dv ? d : dv, use);
}
template <class T>
constexpr const auto& MASK_GRADIENT_DIMS = COARSE_HEAD_DIMS;
template <>
inline constexpr const auto& MASK_GRADIENT_DIMS<tf32> = TF32_BWD_DIMS;

// FMA units (f32). A lane multiplies BLOCK / 8 rows with STEP / 16.
template <int D_, Pass PASS_>
struct F32BwdTile {
  using T = float;
  static constexpr Pass PASS = PASS_;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS, STAGES = 1, HELD = 0;
  static constexpr int UNROLL = 1;
  // As many products per value read from shared memory as fit the 99 KB that a block may have on
  // sm_86.
  static constexpr int BLOCK = D <= 64 ? 64 : 32, STEP = D <= 128 ? 32 : 16;
  static constexpr int SHARED_BYTES =
      (2 * (BLOCK + STAGES * STEP) * D + BLOCK * STEP) * 4 + (STAGES * STEP * 8 + 127) / 128 * 128;
  static constexpr int BLOCKS = 2;
};

// The statistics of weights, tensor cores (bf16, f16). A block owns BLOCK rows of Q or K and walks
// over the other in steps of STEP rows, of which two are in shared memory at a time. There is no
// second product, so registers go to the first: a warp keeps its 16 M rows in them.
template <class T_, int D_, bool LINEAR>
struct StatsTile {
  using T = T_;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int M = LINEAR && D <= 128 ? 2 : 1;
  static constexpr int BLOCK = 16 * M * WARPS;
  static constexpr int STEP = D <= 128 ? 64 : 32;
  static constexpr int SHARED_BYTES = (BLOCK + STAGES * STEP) * D * 2 + STAGES * STEP * 4;
};

// FMA units (f32). A lane multiplies BLOCK / 8 rows with STEP / 16. The largest block, of D 256,
// takes 97 KB of the 99 that sm_86 has.
template <int D_>
struct F32StatsTile {
  using T = float;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int BLOCK = D <= 128 ? 64 : 32, STEP = D <= 64 ? 64 : 32;
  static constexpr int SHARED_BYTES = (BLOCK + STAGES * STEP) * D * 4 + STAGES * STEP * 4;
};

// Listed keys, on FMA units: rows are nobody's neighbors, so lanes read them as they come.
template <class T_, int D_>
struct TopkTile {
  using T = T_;
  static constexpr int D = D_, WARPS = 4, THREADS = 32 * WARPS;
  // Lanes that share a row: each has 16 numbers of it at most, of up to six rows at once.
  static constexpr int SHARERS = D <= 128 ? 8 : 16;
  // Keys of a team between two looks at the maximum: loads in flight, registers permitting.
  static constexpr int LISTED = 4;
  // Of a multiprocessor, at least: registers for that many do, while ptxas, left alone, tries for
  // one more and spills.
  static constexpr int BLOCKS = 3;
};

}  // namespace atx::ATX_TARGET
