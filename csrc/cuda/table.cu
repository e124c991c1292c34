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
template <class T, class Score>
Status launch_attention_bwd_wide(const AttentionBwdParams&, const Exec&);
template <class T>
Status launch_attention_bwd_wide_mask(const AttentionBwdParams&, const Exec&);
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

// Dropout costs registers: only General's kernels have it, and those of GeneralBlocks.
bool is_general(const AttentionParams& p) {
  return p.dropout > 0 || score_id(p) == ScoreId::General || p.softcap != 0;
}

// launch(Policy<Score>{}) of the policy whose kernels a call runs on.
template <class Score>
struct Policy {};

template <class Launch>
Status with_dense_policy(const AttentionParams& p, Launch launch) {
  return is_general(p) ? launch(Policy<General<float>>{}) : launch(Policy<Window<float>>{});
}
template <class Launch>
Status with_policy(const AttentionParams& p, Launch launch) {
  if (!p.blocks.visited) return with_dense_policy(p, launch);
  return is_general(p) ? launch(Policy<GeneralBlocks<float>>{}) : launch(Policy<Blocks<float>>{});
}
// Three policies do for four: those of GeneralBlocks for Blocks, as it takes less to build.
template <class Launch>
Status with_coarse_policy(const AttentionParams& p, Launch launch) {
  return p.blocks.visited ? launch(Policy<GeneralBlocks<float>>{}) : with_dense_policy(p, launch);
}

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

// Head dimensions beyond those of ALL_HEAD_DIMS.
template <class T>
Status attention_fwd_wide(const AttentionParams& p, const Exec& exec) {
  if (!p.workspace)
    return with_coarse_policy(p, [&]<class Score>(Policy<Score>) {
      return launch_attention_fwd_wide<T, Score>(p, exec);
    });
  const Status failed = with_dense_policy(p, [&]<class Score>(Policy<Score>) {
    return launch_attention_fwd_wide_split<T, Score>(p, exec);
  });
  return failed ? failed : launch_attention_fwd_combine(p, exec);
}

Status attention_fwd_split(const AttentionParams& p, const Exec& exec) {
  const Status failed = with_dense_policy(p, [&]<class Score>(Policy<Score>) {
    return with_type(p.dtype, [&]<class T>(T) {
      if constexpr (sizeof(T) == 4)
        return launch_attention_fwd_split_f32<Score>(p, exec);
      else
        return launch_attention_fwd_split<T, Score>(p, exec);
    });
  });
  return failed ? failed : launch_attention_fwd_combine(p, exec);
}
int64_t attention_fwd_workspace(const AttentionParams& p) { return Split(p).floats(); }

Status attention_fwd(const AttentionParams& p, const Exec& exec) {
  if (is_wide(p.D, p.Dv))
    return p.dtype == DType::bf16 ? attention_fwd_wide<bf16>(p, exec)
                                  : attention_fwd_wide<f16>(p, exec);
  if (p.workspace) return attention_fwd_split(p, exec);
  if (p.tf32)
    return with_coarse_policy(
        p, [&]<class Score>(Policy<Score>) { return launch_attention_fwd_tf32<Score>(p, exec); });
  return with_policy(p, [&]<class Score>(Policy<Score>) {
    return with_type(p.dtype, [&]<class T>(T) {
      if constexpr (sizeof(T) == 4)
        return launch_attention_fwd_f32<Score>(p, exec);
      else
        return launch_attention_fwd<T, Score>(p, exec);
    });
  });
}

template <class T>
Status attention_bwd_passes(const AttentionBwdParams& p, const Exec& exec) {
  return with_policy(
      p.fwd, [&]<class Score>(Policy<Score>) { return launch_attention_bwd<T, Score>(p, exec); });
}
Status attention_bwd_tf32(const AttentionBwdParams& p, const Exec& exec) {
  return with_coarse_policy(p.fwd, [&]<class Score>(Policy<Score>) {
    return launch_attention_bwd<tf32, Score>(p, exec);
  });
}
bool is_bwd_in_tf32(const AttentionParams& p) {
  return p.tf32 && p.D <= MOST_TF32_BWD_DIM && p.Dv <= MOST_TF32_BWD_DIM;
}

// Head dimensions beyond those of BWD_DIMS.
template <class T>
Status attention_bwd_wide(const AttentionBwdParams& p, const Exec& exec) {
  const Status failed = with_coarse_policy(p.fwd, [&]<class Score>(Policy<Score>) {
    return launch_attention_bwd_wide<T, Score>(p, exec);
  });
  return failed || !p.d_mask ? failed : launch_attention_bwd_wide_mask<T>(p, exec);
}
template <class T>
Status attention_bwd_products(const AttentionBwdParams& p, const Exec& exec) {
  if constexpr (sizeof(T) == 2)
    if (is_wide(p.fwd.D, p.fwd.Dv)) return attention_bwd_wide<T>(p, exec);
  const bool rounds = is_bwd_in_tf32(p.fwd);
  const Status failed = rounds ? attention_bwd_tf32(p, exec) : attention_bwd_passes<T>(p, exec);
  if (failed || !p.d_mask) return failed;
  return rounds ? launch_attention_bwd_mask<tf32>(p, exec) : launch_attention_bwd_mask<T>(p, exec);
}

template <class T>
Status attention_bwd_of(const AttentionBwdParams& p, const Exec& exec) {
  Status failed = launch_attention_bwd_delta<T>(p, exec);
  if (!failed) failed = attention_bwd_products<T>(p, exec);
  if (!failed) failed = launch_attention_bwd_heads<float>(p, exec);
  return failed;
}

Status attention_bwd(const AttentionBwdParams& p, const Exec& exec) {
  return with_type(p.fwd.dtype, [&]<class T>(T) { return attention_bwd_of<T>(p, exec); });
}

Status attention_stats(const AttentionStatsParams& p, const Exec& exec) {
  return with_type(p.fwd.dtype, [&]<class T>(T) {
    return with_dense_policy(p.fwd, [&]<class Score>(Policy<Score>) {
      return launch_attention_stats<T, Score>(p, exec);
    });
  });
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
    .max_wide_head_dim = WIDE_D,
    .max_wide_head_dim_v = WIDE_DV,
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
