// Which row of the kernel table serves a call, and what that row may ask of its host.
#pragma once
#include <string>
#include <vector>

#include "csrc/core/kernels.h"

namespace atx::ops {

// The row for tensors of this device. Null with `reason` set when there is none that runs there.
const Kernels* kernels_for(bool is_cuda, int device_index, std::string* reason);
// The services that row needs. `buffers` must outlive the call; only the emulator asks for them.
Exec exec_for(bool is_cuda, int device_index, const std::vector<Buffer>& buffers);
bool wants_buffers();
// Whether torch's matmul precision lets f32 products be rounded to tf32 now: a setting of the
// process, as for torch's own products, and read when an op runs, so that compiled graphs and
// backward passes heed it too. Torch's stable interface does not tell, but Python does: the answer
// is no until somebody sets who asks there.
bool tf32_allowed();
void set_tf32_allowed(bool (*asks)());

// Every row this build and this machine can run, CPU rows from best to plainest.
std::vector<const Kernels*> available_targets();
// Rows that were compiled, but that this CPU cannot run.
std::vector<std::string> unsupported_targets();
const Kernels* cpu_target();
void use_cpu(const std::string& name);  // throws std::invalid_argument

// The emulator: a library of its own that only attn_ext.testing loads.
void load_simt(const std::string& path);  // throws std::runtime_error
void use_simt(bool on);
bool built_with_cuda();

}  // namespace atx::ops
