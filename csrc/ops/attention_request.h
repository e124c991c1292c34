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

// The tensors of a BlockMask (core/params.h), int32, with its planes as two dimensions, [B or 1, Hq
// or 1], in front.
struct BlockTensors {
  const Tensor &visited, &full, &visited_t, &first_part, &bits;
  int64_t block_q, block_kv;
};

inline const OptionalTensor NONE;

// What the ops have in common. Varlen has cu_seqlens and neither mask nor batch dimensions; a block
// mask comes without other options that change a score but a soft-cap, and with one batch
// dimension.
struct Arguments {
  const char* op;  // for messages
  const Tensor &q, &k, &v;
  const OptionalTensor &mask = NONE, &alibi_slopes = NONE, &sinks = NONE, &seed = NONE;
  const BlockTensors* blocks = nullptr;
  const Tensor* sums = nullptr;  // of forgetting; with one batch dimension, too
  const Tensor *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;
  double dropout = 0, scale, softcap = 0;
  int64_t window_left = -1, window_right = -1;
  bool bottom_right = false, enable_gqa = true;

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
// Serves: what its kernels compute, for a target may have o and its gradients of more head
// dimensions than the rest.
enum class Serves { ATTENTION, ANY };
AttentionRequest read_attention(const Arguments& a, Reasons& reasons, Serves serves = Serves::ANY);

// Notes why the block mask does not fit a call of one batch dimension (batch: its size); completes
// p.
void read_block_mask(const Arguments& a, int64_t batch, AttentionParams* p, Reasons& reasons);

// Notes why the running sums of forgetting do not fit such a call; completes p.
void read_forgetting(const Arguments& a, int64_t batch, AttentionParams* p, Reasons& reasons);

// For ops that take the forward's results beside its arguments. Their dense form has exactly one
// batch dimension, of one size in all tensors, and key heads as q's group asks.

// Completes p, read from `a`, with pointers, batch size and strides; false if a is not so.
bool set_one_batch(const Arguments& a, const AttentionRequest& r, AttentionParams* p,
                   Reasons& reasons);
// Checks a tensor [B, Hq, Sq, Dv] of q's type, as o is.
void check_output(const Arguments& a, const AttentionRequest& r, const AttentionParams& p,
                  const char* what, const Tensor& t, Reasons& reasons);
// Checks a contiguous tensor [B, Hq, Sq] of the accumulation type, as lse is.
void check_row_numbers(const Arguments& a, const AttentionRequest& r, const AttentionParams& p,
                       const char* what, const Tensor& t, Reasons& reasons);

// Strides of a [B, H, S, D] or packed [total, H, D] tensor.
inline Strides strides_of(const Tensor& t) {
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}
inline ScalarType accumulation_type(DType t) {
  return t == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace atx::ops
