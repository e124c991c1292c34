// The library's C interface, for attn_ext.testing: configuration, and handing launches to somebody
// else.
#pragma once
#include "machine.h"

extern "C" {

const atx::Kernels* atx_simt_kernels();  // the row of the kernel table

// Gets a launch instead of the machine. Returns null, or why it failed (valid until the next call).
typedef const char* (*AtxSimtHook)(const char* mangled_name, const unsigned grid[3],
                                   const unsigned block[3], size_t shared_bytes, const void* params,
                                   size_t params_bytes, const atx::Buffer* buffers,
                                   int num_buffers);
void atx_simt_set_launch_hook(AtxSimtHook hook);  // null: the machine runs launches again

// schedule and async_copy are indices of the enums of machine.h.
void atx_simt_configure(int schedule, unsigned long long seed, int workers, int async_copy,
                        int poison_shared, double watchdog_seconds,
                        unsigned long long shared_limit);

}  // extern "C"

namespace atx::ATX_TARGET::simt {

bool intercept(const Launch&);  // true: the hook has run it; throws what the hook reports

}  // namespace atx::ATX_TARGET::simt
