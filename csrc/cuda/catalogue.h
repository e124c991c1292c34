// What kernels there are, with their tiles: the list that `attn-ext info` prints. It follows
// table.cu, which says what launches them.
#pragma once
#include "csrc/core/blocks.h"
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/heuristics.h"

namespace atx::ATX_TARGET {

// The tiles of a type, by head dimension and what its policy leaves them.
template <class T>
struct TilesOf {
  template <int D, bool LINEAR>
  using Fwd = FwdTile<T, D, LINEAR>;
  template <int D, Pass PASS, bool WIDE>
  using Bwd = BwdTile<T, D, PASS, WIDE>;
};
template <>
struct TilesOf<float> {
  template <int D, bool>
  using Fwd = F32Tile<D>;
  template <int D, Pass PASS, bool>
  using Bwd = F32BwdTile<D, PASS>;
};
template <>
struct TilesOf<tf32> {
  template <int D, bool LINEAR>
  using Fwd = Tf32Tile<D, LINEAR>;
  template <int D, Pass PASS, bool WIDE>
  using Bwd = Tf32BwdTile<D, PASS, WIDE>;
};

struct Catalogue {
  static constexpr int CAPACITY = 512;
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
  constexpr void add_pass(const char* family, const char* dtype, const char* score,
                          int head_dim_v = 0) {
    entries[size++] = {family,      dtype,      score,         Tile::D,
                       Tile::BLOCK, Tile::STEP, Tile::THREADS, Tile::SHARED_BYTES,
                       head_dim_v};
  }
  template <class T, class Score, int D, int DV = D>
  constexpr void add_bwd(const char* dtype, const char* score) {
    const auto add = [&]<Pass PASS>(const char* family) {
      if constexpr (D == DV)
        add_pass<typename TilesOf<T>::template Bwd<D, PASS, ONLY_SCALES<Score>>>(family, dtype,
                                                                                 score);
      else
        add_pass<BwdPairTile<T, D, DV, PASS>>(family, dtype, score, DV);
    };
    add.template operator()<Pass::Q>("attention_bwd q");
    if constexpr (splits_keys_pass<T>(D, DV)) {
      add.template operator()<Pass::K>("attention_bwd k");
      add.template operator()<Pass::V>("attention_bwd v");
    } else {
      add.template operator()<Pass::KV>("attention_bwd kv");
    }
  }
  template <class T>
  constexpr void add_mask_gradient(const char* dtype) {
    each_dim_of<MASK_GRADIENT_DIMS<T>>([&]<int D>(HeadDim<D>) {
      using Tile = typename TilesOf<T>::template Bwd<D, Pass::MASK, false>;
      add_pass<Tile>("attention_bwd mask", dtype, "general");
    });
  }
  template <class T, class Score>
  constexpr void add_type(const char* dtype, const char* score) {
    each_dim_of<DIMS<T, Score>>([&]<int D>(HeadDim<D>) {
      add_fwd<typename TilesOf<T>::template Fwd<D, Score::LINEAR>>(dtype, score);
    });
    each_dim_of<BWD_DIMS<T, Score>>([&]<int D>(HeadDim<D>) { add_bwd<T, Score, D>(dtype, score); });
  }
  template <class Score>
  constexpr void add_score(const char* score) {
    add_type<float, Score>("float32", score);
    add_type<bf16, Score>("bfloat16", score);
    add_type<f16, Score>("float16", score);
    add_pair<bf16, Score>("bfloat16", score);
    add_pair<f16, Score>("float16", score);
  }
  template <class T, class Score>
  constexpr void add_pair(const char* dtype, const char* score) {
    add_fwd<FwdPairTile<T, PAIR_D, PAIR_DV, Score::LINEAR>>(dtype, score);
    if constexpr (HAS_BWD_PAIR<T, Score>) add_bwd<T, Score, PAIR_D, PAIR_DV>(dtype, score);
  }
  template <class T>
  constexpr void add_wide_passes(const char* dtype, const char* score) {
    add_pass<WideBwdTile<T, Pass::Q>>("attention_bwd q", dtype, score, WIDE_DV);
    add_pass<WideBwdTile<T, Pass::KV>>("attention_bwd kv", dtype, score, WIDE_DV);
  }
  template <class Score, bool SPLIT>
  constexpr void add_wide(const char* score) {
    add_fwd<WideTile<bf16, Score::LINEAR, SPLIT>>("bfloat16", score);
    add_fwd<WideTile<f16, Score::LINEAR, SPLIT>>("float16", score);
  }
  template <class T>
  constexpr void add_wide_bwd(const char* dtype) {
    add_wide_passes<T>(dtype, "window");
    add_wide_passes<T>(dtype, "general");
    add_wide_passes<T>(dtype, "general_blocks");
    add_pass<WideBwdTile<T, Pass::MASK>>("attention_bwd mask", dtype, "general", WIDE_DV);
  }
  template <class Score>
  constexpr void add_split(const char* score) {
    each_dim_of<COARSE_HEAD_DIMS>([&]<int D>(HeadDim<D>) {
      add_fwd<F32SplitTile<D, Score::LINEAR>>("float32", score);
      add_fwd<SplitTile<bf16, D, Score::LINEAR>>("bfloat16", score);
      add_fwd<SplitTile<f16, D, Score::LINEAR>>("float16", score);
    });
  }
  // Statistics know no block masks.
  template <class Score>
  constexpr void add_stats(const char* score) {
    each_dim_of<COARSE_HEAD_DIMS>([&]<int D>(HeadDim<D>) {
      add_stats<F32StatsTile<D>>("float32", score);
      add_stats<StatsTile<bf16, D, Score::LINEAR>>("bfloat16", score);
      add_stats<StatsTile<f16, D, Score::LINEAR>>("float16", score);
    });
  }
  template <class Score>
  constexpr void add_tf32(const char* score) {
    each_dim_of<COARSE_HEAD_DIMS>(
        [&]<int D>(HeadDim<D>) { add_fwd<Tf32Tile<D, Score::LINEAR>>("tf32", score); });
    each_dim_of<BWD_DIMS<tf32, Score>>(
        [&]<int D>(HeadDim<D>) { add_bwd<tf32, Score, D>("tf32", score); });
  }
  // Warps own rows: queries, and in one pass keys; a team of lanes looks at one row at a time.
  template <class T>
  constexpr void add_lists(const char* dtype) {
    each_dim_of<COARSE_HEAD_DIMS>([&]<int D>(HeadDim<D>) {
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
    add_score<Window<float>>("window");
    add_score<General<float>>("general");
    add_score<Blocks<float>>("blocks");
    add_score<GeneralBlocks<float>>("general_blocks");
    add_split<Window<float>>("window");
    add_split<General<float>>("general");
    add_stats<Window<float>>("window");
    add_stats<General<float>>("general");
    add_wide<Window<float>, false>("window");
    add_wide<General<float>, false>("general");
    add_wide<GeneralBlocks<float>, false>("general_blocks");
    add_wide<Window<float>, true>("window");
    add_wide<General<float>, true>("general");
    add_tf32<Window<float>>("window");
    add_tf32<General<float>>("general");
    add_tf32<GeneralBlocks<float>>("general_blocks");
    add_wide_bwd<bf16>("bfloat16");
    add_wide_bwd<f16>("float16");
    add_mask_gradient<float>("float32");
    add_mask_gradient<bf16>("bfloat16");
    add_mask_gradient<f16>("float16");
    add_mask_gradient<tf32>("tf32");
    add_lists<float>("float32");
    add_lists<bf16>("bfloat16");
    add_lists<f16>("float16");
  }
};

}  // namespace atx::ATX_TARGET
