// Two rows of the function table: CPUs that multiply bf16 in tiles, and those that can f16 too.
// AVX-512's row with its own attention forward; the catalogue lists that only.
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/amx/attention_fwd.h"
#include "csrc/cpu/attention_fwd.h"

namespace atx::avx512 {
extern const Kernels kernels;
}

namespace atx::ATX_TARGET {
namespace {

constexpr KernelInfo BF16[] = {
    {"attention_fwd", "bf16", "Full Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0}};
constexpr KernelInfo BF16_F16[] = {
    {"attention_fwd", "bf16 f16", "Full Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0}};

Kernels row(const char* target, Status (*attention_fwd)(const AttentionParams&, const Exec&),
            const KernelInfo* only) {
  Kernels k = avx512::kernels;
  k.target = target;
  k.attention_fwd = attention_fwd;
  k.catalogue = only;
  k.catalogue_size = 1;
  return k;
}

}  // namespace

extern const Kernels kernels, kernels_f16;
const Kernels kernels = row("amx", attention_fwd_bf16, BF16);
const Kernels kernels_f16 = row("amx_fp16", attention_fwd_bf16_f16, BF16_F16);

}  // namespace atx::ATX_TARGET
