// What a call of the attention family asks for: its tensors and options, read and checked once, as
// params.
#pragma once
#include <optional>
#include <vector>

#include "batch.h"
#include "check.h"
#include "csrc/core/kernels.h"

namespace atx::ops {

using OptionalTensor = std::optional<Tensor>;

// What both ops have in common; varlen has cu_seqlens and neither mask nor batch dimensions.
struct Arguments {
  const char* op;  // for messages
  const Tensor &q, &k, &v;
  const OptionalTensor &mask, &alibi_slopes, &sinks, &seed;
  const Tensor *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;
  double dropout, scale, softcap;
  int64_t window_left, window_right;
  bool bottom_right, enable_gqa;

  bool varlen() const { return cu_seqlens_q != nullptr; }
};

// NUMBER is no tensor but the index of a batch entry in the call, by which dropout knows it.
enum Operand { Q, K, V, MASK, ALIBI, SINKS, O, LSE, NUMBER, OPERANDS };

// The arguments as a kernel sees them. The params hold options, lengths and the strides inside a
// batch entry; pointers, batch strides and results come with the launch (attention.cpp).
struct AttentionRequest {
  AttentionParams params{};
  BatchDims<OPERANDS> batch;
  Dim head[OPERANDS], row[OPERANDS];
  int64_t rank = 0;  // of o
  const Kernels* kernels = nullptr;
  std::vector<Tensor> kept;  // converted inputs, alive until the launch
};

// Notes every reason why the call cannot run; the request is complete only if there is none.
AttentionRequest read_attention(const Arguments& a, Reasons& reasons);

}  // namespace atx::ops
