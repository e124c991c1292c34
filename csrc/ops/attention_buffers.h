// The tensors of an attention call as the emulator and its PTX twin see them: what a kernel may
// touch, and whether it may write there.
#pragma once
#include <vector>

#include "attention_request.h"

namespace atx::ops {

// o and lse are the forward's to write and the backward's to read.
std::vector<Buffer> forward_buffers(const Arguments& a, const AttentionRequest& r,
                                    const AttentionParams& p, bool writes);
std::vector<Buffer> backward_buffers(const Arguments& a, const AttentionRequest& r,
                                     const AttentionBwdParams& p);
std::vector<Buffer> stats_buffers(const Arguments& a, const AttentionRequest& r,
                                  const AttentionStatsParams& p);

}  // namespace atx::ops
