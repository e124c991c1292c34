// What kernels there are, with their tiles: the list that `attn-ext info` prints. It follows
// table.cu, which says what launches them.
#pragma once
#include "csrc/core/blocks.h"
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/heuristics.h"

namespace atx::ATX_TARGET {

constexpr int NUM_HEAD_DIMS = sizeof(HEAD_DIMS) / sizeof(HEAD_DIMS[0]), NUM_DTYPES = 3,
              NUM_SCORES = 5;

template <class T, int D, bool LINEAR>
struct Passes {
  template <Pass PASS>
  using Tile = BwdTile<T, D, PASS, LINEAR>;
};
template <int D, bool LINEAR>
struct Tf32Passes {
  template <Pass PASS>
  using Tile = Tf32BwdTile<D, PASS, LINEAR>;
};
template <int D>
struct F32Passes {
  template <Pass PASS>
  using Tile = F32BwdTile<D, PASS>;
};

struct Catalogue {
  // attention_fwd, attention_stats, and up to four passes of attention_bwd.
  static constexpr int MOST = 6, COARSE = 5 * NUM_DTYPES * NUM_HEAD_DIMS,
                       PAIRS = 2 * 2 * NUM_SCORES,
                       CAPACITY = MOST * NUM_SCORES * NUM_DTYPES * NUM_HEAD_DIMS + COARSE + PAIRS;
  KernelInfo entries[CAPACITY];
  int size = 0;

  template <class Tile>
  constexpr void add_fwd(const char* dtype, const char* score) {
    entries[size++] = {Tile::SPLIT ? "attention_fwd split" : "attention_fwd",
                       dtype,
                       score,
                       Tile::D,
                       Tile::BLOCK_Q,
                       Tile::BLOCK_KV,
                       Tile::THREADS,
                       Tile::SHARED_BYTES,
                       Tile::DV};
  }
  template <class Tile>
  constexpr void add_stats(const char* dtype, const char* score) {
    entries[size++] = {
        "attention_stats",  dtype, score, Tile::D, Tile::BLOCK, Tile::STEP, Tile::THREADS,
        Tile::SHARED_BYTES, 0};
  }
  template <class Tile>
  constexpr void add_pass(const char* family, const char* dtype, const char* score) {
    entries[size++] = {
        family, dtype, score, Tile::D, Tile::BLOCK, Tile::STEP, Tile::THREADS, Tile::SHARED_BYTES,
        0};
  }
  template <class T, template <Pass> class Tile, bool HAS_MASK>
  constexpr void add_bwd(const char* dtype, const char* score) {
    add_pass<Tile<Pass::Q>>("attention_bwd q", dtype, score);
    if constexpr (splits_keys_pass<T>(Tile<Pass::Q>::D)) {
      add_pass<Tile<Pass::K>>("attention_bwd k", dtype, score);
      add_pass<Tile<Pass::V>>("attention_bwd v", dtype, score);
    } else {
      add_pass<Tile<Pass::KV>>("attention_bwd kv", dtype, score);
    }
    if constexpr (HAS_MASK) add_pass<Tile<Pass::MASK>>("attention_bwd mask", dtype, score);
  }
  template <class Score>
  constexpr void add_score(const char* score) {
    constexpr bool LINEAR = Score::LINEAR, SPARSE = Score::SPARSE;
    for (const int dim : HEAD_DIMS) {
      with_head_dim(dim, [&]<int D>(HeadDim<D>) {
        add_fwd<F32Tile<D>>("float32", score);
        add_fwd<FwdTile<bf16, D, LINEAR>>("bfloat16", score);
        add_fwd<FwdTile<f16, D, LINEAR>>("float16", score);
        if (!SPARSE) {  // statistics know no block masks
          add_stats<F32StatsTile<D>>("float32", score);
          add_stats<StatsTile<bf16, D, LINEAR>>("bfloat16", score);
          add_stats<StatsTile<f16, D, LINEAR>>("float16", score);
        }
        constexpr bool MASK = !LINEAR && !SPARSE, DENSE = LINEAR && !SPARSE;
        add_bwd<float, F32Passes<D>::template Tile, MASK>("float32", score);
        add_bwd<bf16, Passes<bf16, D, DENSE>::template Tile, MASK>("bfloat16", score);
        add_bwd<f16, Passes<f16, D, DENSE>::template Tile, MASK>("float16", score);
      });
    }
    add_pairs<Score>(score);
  }
  template <class Score>
  constexpr void add_pairs(const char* score) {
    add_fwd<FwdPairTile<bf16, 192, 128, Score::LINEAR>>("bfloat16", score);
    add_fwd<FwdPairTile<f16, 192, 128, Score::LINEAR>>("float16", score);
  }
  template <class Score, bool SPLIT>
  constexpr void add_wide(const char* score) {
    add_fwd<WideTile<bf16, Score::LINEAR, SPLIT>>("bfloat16", score);
    add_fwd<WideTile<f16, Score::LINEAR, SPLIT>>("float16", score);
  }
  template <class Score>
  constexpr void add_split(const char* score) {
    for (const int dim : COARSE_HEAD_DIMS)
      with_coarse_dim(dim, [&]<int D>(HeadDim<D>) {
        add_fwd<F32SplitTile<D, Score::LINEAR>>("float32", score);
        add_fwd<SplitTile<bf16, D, Score::LINEAR>>("bfloat16", score);
        add_fwd<SplitTile<f16, D, Score::LINEAR>>("float16", score);
      });
  }
  template <class Score>
  constexpr void add_tf32(const char* score) {
    for (const int dim : COARSE_HEAD_DIMS)
      with_coarse_dim(dim, [&]<int D>(HeadDim<D>) {
        constexpr bool LINEAR = Score::LINEAR, SPARSE = Score::SPARSE;
        add_fwd<Tf32Tile<D, LINEAR>>("tf32", score);
        if constexpr (D <= MOST_TF32_BWD_DIM)
          add_bwd<tf32, Tf32Passes<D, LINEAR && !SPARSE>::template Tile, !LINEAR && !SPARSE>("tf32",
                                                                                             score);
      });
  }
  // Warps own rows: queries, and in one pass keys; a team of lanes looks at one row at a time.
  template <class T>
  constexpr void add_lists(const char* dtype) {
    for (const int dim : COARSE_HEAD_DIMS)
      with_coarse_dim(dim, [&]<int D>(HeadDim<D>) {
        using Tile = TopkTile<T, D>;
        constexpr int TEAMS = 32 / Tile::SHARERS;
        const auto add = [&](const char* family, int block_q, int block_kv) {
          entries[size++] = {family, dtype, "lists", D, block_q, block_kv, Tile::THREADS, 0, 0};
        };
        add("topk_attention_fwd", Tile::WARPS, TEAMS * Tile::LISTED);
        add("topk_attention_bwd q", Tile::WARPS, TEAMS);
        add("topk_attention_bwd kv", TEAMS, Tile::WARPS);
      });
  }
  constexpr Catalogue() : entries{} {
    add_score<Full<float>>("full");
    add_score<Window<float>>("window");
    add_score<General<float>>("general");
    add_score<Blocks<float>>("blocks");
    add_score<GeneralBlocks<float>>("general_blocks");
    add_split<Window<float>>("window");
    add_split<General<float>>("general");
    add_wide<Window<float>, false>("window");
    add_wide<General<float>, false>("general");
    add_wide<GeneralBlocks<float>, false>("general_blocks");
    add_wide<Window<float>, true>("window");
    add_wide<General<float>, true>("general");
    add_tf32<Window<float>>("window");
    add_tf32<General<float>>("general");
    add_tf32<GeneralBlocks<float>>("general_blocks");
    add_lists<float>("float32");
    add_lists<bf16>("bfloat16");
    add_lists<f16>("float16");
  }
};

}  // namespace atx::ATX_TARGET
