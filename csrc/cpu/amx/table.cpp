// Two rows of the function table: CPUs that multiply bf16 in tiles, and those that can f16 too.
// AVX-512's row with their own attention forward and backward; the catalogue lists those only.
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/amx/attention_bwd.h"
#include "csrc/cpu/amx/attention_fwd.h"
#include "csrc/cpu/attention_fwd.h"

namespace atx::avx512 {
extern const Kernels kernels;
}

namespace atx::ATX_TARGET {
namespace {

constexpr KernelInfo BF16[] = {
    {"attention_fwd", "bf16", "Full Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0},
    {"attention_bwd", "bf16", "Full Window General", 576, TILE_BWD_BLOCK_Q, TILE_BWD_BLOCK_KV, 1,
     0}};
constexpr KernelInfo BF16_F16[] = {
    {"attention_fwd", "bf16 f16", "Full Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0},
    {"attention_bwd", "bf16 f16", "Full Window General", 576, TILE_BWD_BLOCK_Q, TILE_BWD_BLOCK_KV,
     1, 0}};

template <int N>
Kernels row(const char* target, Status (*attention_fwd)(const AttentionParams&, const Exec&),
            Status (*attention_bwd)(const AttentionBwdParams&, const Exec&),
            const KernelInfo (&only)[N]) {
  Kernels k = avx512::kernels;
  k.target = target;
  k.attention_fwd = attention_fwd;
  k.attention_bwd = attention_bwd;
  k.catalogue = only;
  k.catalogue_size = N;
  return k;
}

}  // namespace

extern const Kernels kernels, kernels_f16;
const Kernels kernels = row("amx", attention_fwd_bf16, attention_bwd_bf16, BF16);
const Kernels kernels_f16 =
    row("amx_fp16", attention_fwd_bf16_f16, attention_bwd_bf16_f16, BF16_F16);

}  // namespace atx::ATX_TARGET
