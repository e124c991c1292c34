// This target's row of the spine: dtype and policy to the instance that was compiled for them, and
// the catalogue.
#include "csrc/core/blocks.h"
#include "csrc/core/kernels.h"
#include "csrc/core/score.h"
#include "csrc/cuda/catalogue.h"
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

Status attention_bwd_tf32(const AttentionBwdParams& p, const Exec& exec) {
  switch (kernel_id(p.fwd)) {
    case ScoreId::Full:
    case ScoreId::Window:
      return launch_attention_bwd<tf32, Window<float>>(p, exec);
    case ScoreId::Blocks:
      return launch_attention_bwd<tf32, GeneralBlocks<float>>(p, exec);
    default:
      return launch_attention_bwd<tf32, General<float>>(p, exec);
  }
}
bool is_bwd_in_tf32(const AttentionParams& p) {
  return p.tf32 && p.D <= MOST_TF32_BWD_DIM && p.Dv <= MOST_TF32_BWD_DIM;
}

template <class T>
Status attention_bwd_of(const AttentionBwdParams& p, const Exec& exec) {
  const bool rounds = is_bwd_in_tf32(p.fwd);
  Status failed = launch_attention_bwd_delta<T>(p, exec);
  if (!failed) failed = rounds ? attention_bwd_tf32(p, exec) : attention_bwd_passes<T>(p, exec);
  if (!failed && p.d_mask)
    failed =
        rounds ? launch_attention_bwd_mask<tf32>(p, exec) : launch_attention_bwd_mask<T>(p, exec);
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
