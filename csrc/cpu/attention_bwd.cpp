// The gradients of attention (params.h has the equations; FlashAttention-2, algorithm 2: blocks of
// keys outside, queries inside). P and dP are recomputed from lse, tile by tile.
#include "csrc/cpu/attention_bwd.h"

#include "csrc/cpu/attention_bwd_cells.h"
#include "csrc/cpu/attention_bwd_gradients.h"
#include "csrc/cpu/attention_bwd_mask.h"
#include "csrc/cpu/attention_bwd_products.h"
#include "csrc/cpu/attention_bwd_tasks.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {
namespace {

template <class A>
void run_mask(const AttentionBwdParams& p, const Exec& exec) {
  for_tasks(exec, MaskGradient<A>::tasks(p), [&](int64_t first, int64_t last) {
    Scratch scratch;
    MaskGradient<A> gradient;
    gradient.take(scratch, p);
    scratch.allocate();
    gradient.take(scratch, p);
    for (int64_t t = first; t < last; ++t) gradient.compute(p, t);
  });
}

template <class A>
void run_all(const AttentionBwdParams& p, const Exec& exec) {
  run_by_score<Gradients<Products<A>>>(p, exec);
  if (p.d_mask && !MaskCells<A>::serve(p)) run_mask<A>(p, exec);
}

}  // namespace

Status attention_bwd(const AttentionBwdParams& p, const Exec& exec) {
  p.fwd.dtype == DType::f64 ? run_all<double>(p, exec) : run_all<float>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
