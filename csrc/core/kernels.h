// The spine: one row per target, one column per kernel family.
#pragma once
#include "params.h"

namespace atx {

// A tensor that a call may touch: for targets that check accesses (the emulator and its PTX twin).
struct Buffer {
  const char* name;
  const void* data;
  int itemsize, ndim;
  int64_t size[5], stride[5];  // in elements
  bool writable;
};

// What a target may ask of its host.
struct Exec {
  void* stream;  // gpu: cudaStream_t
  // cpu: runs body(ctx, begin, end) over a partition of [0, n), possibly on several threads.
  void (*parallel_for)(int64_t n, void (*body)(const void* ctx, int64_t begin, int64_t end),
                       const void* ctx);
  int num_threads;        // cpu: how many threads parallel_for may use
  const Buffer* buffers;  // simt: every tensor of the call
  int num_buffers;
};

// One compiled kernel, as `attn-ext info` lists it. No member has an initializer: nvcc would take a
// catalogue for one that is not constant.
struct KernelInfo {
  const char *family, *dtype, *score;
  int head_dim, block_q, block_kv, threads, shared_bytes;
  int head_dim_v;  // of v, where it is not as q's; 0: it is
};

// A launcher's answer: null, or why the launch failed.
using Status = const char*;

// CPU rows are constinit: a target's objects must run nothing when the library is loaded, as the
// CPU may not have their instructions.
struct Kernels {
  const char* target;
  unsigned dtypes;   // bit 1 << int(DType) for each supported dtype
  int max_head_dim;  // of q, k and of v
  // How far attention_fwd and attention_bwd, and nothing else, go in 16-bit dtypes; 0: no further.
  int max_wide_head_dim = 0, max_wide_head_dim_v = 0;
  bool tf32 = false;  // has kernels that heed AttentionParams::tf32
  Status (*attention_fwd)(const AttentionParams&, const Exec&);
  Status (*attention_bwd)(const AttentionBwdParams&, const Exec&);
  Status (*attention_stats)(const AttentionStatsParams&, const Exec&);
  Status (*topk_attention_fwd)(const TopkAttentionParams&, const Exec&);
  Status (*topk_attention_bwd)(const TopkAttentionBwdParams&, const Exec&);
  Status (*merge_states)(const MergeStatesParams&, const Exec&);
  Status (*merge_states_bwd)(const MergeStatesBwdParams&, const Exec&);
  // How many floats of workspace attention_fwd wants for this call. null: never any.
  int64_t (*attention_fwd_workspace)(const AttentionParams&);
  const KernelInfo* catalogue;
  int catalogue_size;
};

constexpr unsigned bit(DType t) { return 1u << int(t); }

}  // namespace atx
