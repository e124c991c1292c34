// This target's row of the spine: dtype and policy to the instance that was compiled for them, and
// the catalogue.
#include "csrc/core/blocks.h"
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/split.cuh"

namespace atx::ATX_TARGET {

// instances/
template <class T, class Score>
Status launch_attention_fwd(const AttentionParams&, const Exec&);
template <class Score>
Status launch_attention_fwd_f32(const AttentionParams&, const Exec&);
template <class Score>
Status launch_attention_fwd_tf32(const AttentionParams&, const Exec&);
template <class T, class Score>
Status launch_attention_fwd_split(const AttentionParams&, const Exec&);
template <class Score>
Status launch_attention_fwd_split_f32(const AttentionParams&, const Exec&);
Status launch_attention_fwd_combine(const AttentionParams&, const Exec&);
template <class T, class Score>
Status launch_attention_fwd_wide(const AttentionParams&, const Exec&);
template <class T, class Score>
Status launch_attention_fwd_wide_split(const AttentionParams&, const Exec&);

Status merge_states(const MergeStatesParams&, const Exec&);
Status merge_states_bwd(const MergeStatesBwdParams&, const Exec&);

template <class T, class Score>
Status launch_attention_bwd(const AttentionBwdParams&, const Exec&);
template <class T>
Status launch_attention_bwd_mask(const AttentionBwdParams&, const Exec&);
template <class T>
Status launch_attention_bwd_delta(const AttentionBwdParams&, const Exec&);
template <class A>
Status launch_attention_bwd_heads(const AttentionBwdParams&, const Exec&);

template <class T, class Score>
Status launch_attention_stats(const AttentionStatsParams&, const Exec&);

template <class T>
Status launch_topk_attention_fwd(const TopkAttentionParams&, const Exec&);
template <class T>
Status launch_topk_attention_bwd(const TopkAttentionBwdParams&, const Exec&);

namespace {

// Of forward and backward. Dropout costs registers: only General's kernels have it, and those of
// GeneralBlocks.
ScoreId kernel_id(const AttentionParams& p) {
  return p.dropout > 0 && !p.blocks.visited ? ScoreId::General : score_id(p);
}
bool is_general(const AttentionParams& p) { return p.dropout > 0 || p.softcap != 0; }

// launch(T{}) of the element type T that a dtype names.
template <class Launch>
Status with_type(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::f32:
      return launch(float{});
    case DType::f16:
      return launch(f16{});
    case DType::bf16:
      return launch(bf16{});
    default:
      return "dtype without a kernel on this target";
  }
}

template <class Score>
Status attention_fwd_with(const AttentionParams& p, const Exec& exec) {
  return with_type(p.dtype, [&]<class T>(T) {
    if constexpr (sizeof(T) == 4)
      return launch_attention_fwd_f32<Score>(p, exec);
    else
      return launch_attention_fwd<T, Score>(p, exec);
  });
}

template <class Score>
Status attention_fwd_split_with(const AttentionParams& p, const Exec& exec) {
  return with_type(p.dtype, [&]<class T>(T) {
    if constexpr (sizeof(T) == 4)
      return launch_attention_fwd_split_f32<Score>(p, exec);
    else
      return launch_attention_fwd_split<T, Score>(p, exec);
  });
}

// Head dimensions beyond those of HEAD_DIMS. Window's kernels do for Full, those of GeneralBlocks
// for Blocks.
template <class T>
Status attention_fwd_wide(const AttentionParams& p, const Exec& exec) {
  const ScoreId score = kernel_id(p);
  if (p.workspace) {
    const Status failed = score == ScoreId::General
                              ? launch_attention_fwd_wide_split<T, General<float>>(p, exec)
                              : launch_attention_fwd_wide_split<T, Window<float>>(p, exec);
    return failed ? failed : launch_attention_fwd_combine(p, exec);
  }
  switch (score) {
    case ScoreId::Full:
    case ScoreId::Window:
      return launch_attention_fwd_wide<T, Window<float>>(p, exec);
    case ScoreId::Blocks:
      return launch_attention_fwd_wide<T, GeneralBlocks<float>>(p, exec);
    default:
      return launch_attention_fwd_wide<T, General<float>>(p, exec);
  }
}

// Memory sets the pace: Window's kernels do for Full.
Status attention_fwd_split(const AttentionParams& p, const Exec& exec) {
  const Status failed = kernel_id(p) == ScoreId::General
                            ? attention_fwd_split_with<General<float>>(p, exec)
                            : attention_fwd_split_with<Window<float>>(p, exec);
  return failed ? failed : launch_attention_fwd_combine(p, exec);
}
int64_t attention_fwd_workspace(const AttentionParams& p) { return Split(p).floats(); }

// Three policies do for five: Window's and GeneralBlocks' kernels are Full's and Blocks', as it
// takes less to build.
Status attention_fwd_tf32(const AttentionParams& p, const Exec& exec) {
  switch (kernel_id(p)) {
    case ScoreId::Full:
    case ScoreId::Window:
      return launch_attention_fwd_tf32<Window<float>>(p, exec);
    case ScoreId::Blocks:
      return launch_attention_fwd_tf32<GeneralBlocks<float>>(p, exec);
    default:
      return launch_attention_fwd_tf32<General<float>>(p, exec);
  }
}

Status attention_fwd(const AttentionParams& p, const Exec& exec) {
  if (is_wide(p.D, p.Dv))
    return p.dtype == DType::bf16 ? attention_fwd_wide<bf16>(p, exec)
                                  : attention_fwd_wide<f16>(p, exec);
  if (p.workspace) return attention_fwd_split(p, exec);
  if (p.tf32) return attention_fwd_tf32(p, exec);
  switch (kernel_id(p)) {
    case ScoreId::Full:
      return attention_fwd_with<Full<float>>(p, exec);
    case ScoreId::Window:
      return attention_fwd_with<Window<float>>(p, exec);
    case ScoreId::Blocks:
      return is_general(p) ? attention_fwd_with<GeneralBlocks<float>>(p, exec)
                           : attention_fwd_with<Blocks<float>>(p, exec);
    default:
      return attention_fwd_with<General<float>>(p, exec);
  }
}

template <class T>
Status attention_bwd_passes(const AttentionBwdParams& p, const Exec& exec) {
  switch (kernel_id(p.fwd)) {
    case ScoreId::Full:
      return launch_attention_bwd<T, Full<float>>(p, exec);
    case ScoreId::Window:
      return launch_attention_bwd<T, Window<float>>(p, exec);
    case ScoreId::Blocks:
      return is_general(p.fwd) ? launch_attention_bwd<T, GeneralBlocks<float>>(p, exec)
                               : launch_attention_bwd<T, Blocks<float>>(p, exec);
    default:
      return launch_attention_bwd<T, General<float>>(p, exec);
  }
}

template <class T>
Status attention_bwd_of(const AttentionBwdParams& p, const Exec& exec) {
  Status failed = launch_attention_bwd_delta<T>(p, exec);
  if (!failed) failed = attention_bwd_passes<T>(p, exec);
  if (!failed && p.d_mask) failed = launch_attention_bwd_mask<T>(p, exec);
  if (!failed) failed = launch_attention_bwd_heads<float>(p, exec);
  return failed;
}

Status attention_bwd(const AttentionBwdParams& p, const Exec& exec) {
  return with_type(p.fwd.dtype, [&]<class T>(T) { return attention_bwd_of<T>(p, exec); });
}

template <class T>
Status attention_stats_of(const AttentionStatsParams& p, const Exec& exec) {
  switch (score_id(p.fwd)) {
    case ScoreId::Full:
      return launch_attention_stats<T, Full<float>>(p, exec);
    case ScoreId::Window:
      return launch_attention_stats<T, Window<float>>(p, exec);
    default:
      return launch_attention_stats<T, General<float>>(p, exec);
  }
}

Status attention_stats(const AttentionStatsParams& p, const Exec& exec) {
  return with_type(p.fwd.dtype, [&]<class T>(T) { return attention_stats_of<T>(p, exec); });
}

Status topk_attention_fwd(const TopkAttentionParams& p, const Exec& exec) {
  return with_type(p.fwd.dtype, [&]<class T>(T) { return launch_topk_attention_fwd<T>(p, exec); });
}

template <class T>
Status topk_attention_bwd_of(const TopkAttentionBwdParams& p, const Exec& exec) {
  Status failed = launch_attention_bwd_delta<T>(p.bwd, exec);
  if (!failed) failed = launch_topk_attention_bwd<T>(p, exec);
  if (!failed) failed = launch_attention_bwd_heads<float>(p.bwd, exec);
  return failed;
}

Status topk_attention_bwd(const TopkAttentionBwdParams& p, const Exec& exec) {
  if (p.bwd.fwd.Hq == 0) return nullptr;
  return with_type(p.bwd.fwd.dtype, [&]<class T>(T) { return topk_attention_bwd_of<T>(p, exec); });
}

constexpr int NUM_HEAD_DIMS = sizeof(HEAD_DIMS) / sizeof(HEAD_DIMS[0]), NUM_DTYPES = 3,
              NUM_SCORES = 5;

template <class T, int D, bool LINEAR>
struct Passes {
  template <Pass PASS>
  using Tile = BwdTile<T, D, PASS, LINEAR>;
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
      with_coarse_dim(
          dim, [&]<int D>(HeadDim<D>) { add_fwd<Tf32Tile<D, Score::LINEAR>>("tf32", score); });
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

constexpr Catalogue catalogue;
static_assert(catalogue.size <= Catalogue::CAPACITY);

}  // namespace

#define ATX_NAME_(x) #x
#define ATX_NAME(x) ATX_NAME_(x)

extern const Kernels kernels;
const Kernels kernels = {
    .target = ATX_NAME(ATX_TARGET),
    .dtypes = bit(DType::f32) | bit(DType::f16) | bit(DType::bf16),
    .max_head_dim = 256,
    .max_fwd_head_dim = WIDE_D,
    .max_fwd_head_dim_v = WIDE_DV,
    .tf32 = true,
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .attention_stats = attention_stats,
    .topk_attention_fwd = topk_attention_fwd,
    .topk_attention_bwd = topk_attention_bwd,
    .merge_states = merge_states,
    .merge_states_bwd = merge_states_bwd,
    .attention_fwd_workspace = attention_fwd_workspace,
    .catalogue = catalogue.entries,
    .catalogue_size = catalogue.size,
};

}  // namespace atx::ATX_TARGET
