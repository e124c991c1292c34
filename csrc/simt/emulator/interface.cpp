// The library's C interface.
#include "interface.h"

#include <stdexcept>

namespace atx::ATX_TARGET {
extern const Kernels kernels
    __attribute__((weak));  // csrc/cuda/table.cu; tests link kernels of their own instead

namespace simt {
namespace {

AtxSimtHook hook = nullptr;

// Launchers hand simt::launch their Exec's stream and nothing else. Here it leads back to the Exec,
// and so to the tensors of the call.
template <auto FAMILY, class Params>
Status with_buffers(const Params& params, const Exec& exec) {
  Exec own = exec;
  own.stream = &own;
  return (kernels.*FAMILY)(params, own);
}

Kernels wrapped() {
  Kernels row = kernels;
  row.attention_fwd = with_buffers<&Kernels::attention_fwd, AttentionParams>;
  row.attention_bwd = with_buffers<&Kernels::attention_bwd, AttentionBwdParams>;
  row.attention_stats = with_buffers<&Kernels::attention_stats, AttentionStatsParams>;
  row.topk_attention_fwd = with_buffers<&Kernels::topk_attention_fwd, TopkAttentionParams>;
  row.topk_attention_bwd = with_buffers<&Kernels::topk_attention_bwd, TopkAttentionBwdParams>;
  row.merge_states = with_buffers<&Kernels::merge_states, MergeStatesParams>;
  row.merge_states_bwd = with_buffers<&Kernels::merge_states_bwd, MergeStatesBwdParams>;
  return row;
}

}  // namespace

bool intercept(const Launch& launch) {
  if (!hook) return false;
  const unsigned grid[3] = {unsigned(launch.grid), 1, 1},
                 threads[3] = {unsigned(launch.threads), 1, 1};
  const char* const error =
      hook(mangled_name(launch).c_str(), grid, threads, size_t(launch.shared_bytes), launch.params,
           launch.params_bytes, launch.exec ? launch.exec->buffers : nullptr,
           launch.exec ? launch.exec->num_buffers : 0);
  if (error) throw std::runtime_error(error);
  return true;
}

const Kernels* row() {
  if (!&kernels) return nullptr;
  static const Kernels row = wrapped();
  return &row;
}

}  // namespace simt
}  // namespace atx::ATX_TARGET

using namespace atx::ATX_TARGET::simt;

extern "C" const atx::Kernels* atx_simt_kernels() { return row(); }

extern "C" void atx_simt_set_launch_hook(AtxSimtHook replacement) { hook = replacement; }

extern "C" void atx_simt_configure(int schedule, unsigned long long seed, int workers,
                                   int async_copy, int poison_shared, double watchdog_seconds,
                                   unsigned long long shared_limit) {
  config = {.schedule = Schedule(schedule),
            .seed = seed,
            .workers = workers,
            .async_copy = AsyncCopy(async_copy),
            .poison_shared = poison_shared != 0,
            .watchdog_seconds = watchdog_seconds,
            .shared_limit = shared_limit};
}
