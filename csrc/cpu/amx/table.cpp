// Two rows of the function table: CPUs that multiply bf16 in tiles, and those that can f16 too. A
// row has what these do themselves, in its columns and its catalogue; the rest is AVX-512's.
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/amx/attention_bwd.h"
#include "csrc/cpu/amx/attention_fwd.h"
#include "csrc/cpu/attention_fwd.h"

namespace atx::ATX_TARGET {
namespace {

constexpr KernelInfo BF16[] = {
    {"attention_fwd", "bf16", "Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0},
    {"attention_bwd", "bf16", "Window General", 576, TILE_BWD_BLOCK_Q, TILE_BWD_BLOCK_KV, 1, 0}};
constexpr KernelInfo BF16_F16[] = {
    {"attention_fwd", "bf16 f16", "Window General", 576, TILE_BLOCK_ROWS, BLOCK_KV, 1, 0},
    {"attention_bwd", "bf16 f16", "Window General", 576, TILE_BWD_BLOCK_Q, TILE_BWD_BLOCK_KV, 1,
     0}};

}  // namespace

extern const Kernels kernels, kernels_f16;
constinit const Kernels kernels = {
    .target = "amx",
    .attention_fwd = attention_fwd_bf16,
    .attention_bwd = attention_bwd_bf16,
    .catalogue = BF16,
    .catalogue_size = sizeof BF16 / sizeof BF16[0],
};
constinit const Kernels kernels_f16 = {
    .target = "amx_fp16",
    .attention_fwd = attention_fwd_bf16_f16,
    .attention_bwd = attention_bwd_bf16_f16,
    .catalogue = BF16_F16,
    .catalogue_size = sizeof BF16_F16 / sizeof BF16_F16[0],
};

}  // namespace atx::ATX_TARGET
