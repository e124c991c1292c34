// The contract with PyTorch: every op's schema.
#include <torch/csrc/stable/library.h>

// q [..., Hq, Sq, D], k [..., Hkv, Sk, D], v [..., Hkv, Sk, Dv] -> o [..., Hq, Sq, Dv], lse [...,
// Hq, Sq]. Varlen: q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv] -> o [total_q, Hq,
// Dv], lse [Hq, total_q]. seed: int64, one element, read where dropout > 0. window -1: unlimited.
// Causal is window_right = 0. *_why_not: every reason the call would fail, one per line.
//
// *_bwd: gradients of o and lse to those of the inputs. Its tensors have the shapes above, with
// exactly one batch dimension of one size and, where attn_mask has fewer than 4 dimensions, 1s in
// front in its gradient. d_alibi and d_sinks are [B, Hq], summed over nothing. wanted: one bit per
// result, in their order; an unwanted one is empty.
#define INPUTS "Tensor q, Tensor k, Tensor v, "
#define RESULTS "Tensor o, Tensor lse"
#define STATS "Tensor entropy, Tensor column_sum, Tensor top_index, Tensor top_weight"
#define PARTS "Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b"
#define DENSE "Tensor? attn_mask, "
#define PACKED "Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
#define BLOCKS "Tensor visited, Tensor full, Tensor visited_t, Tensor first_part, Tensor bits, "
#define BLOCK_OPTIONS                                                                    \
  "Tensor? sinks, Tensor? seed, float dropout, int block_q, int block_kv, float scale, " \
  "float softcap"
#define FORGETTING "Tensor sums, "
#define FORGETTING_OPTIONS "float scale, int window_left, bool bottom_right"
#define LISTS "Tensor indices, Tensor? sinks, float scale"
#define PER_HEAD "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, float dropout, "
#define LENGTHS "int max_seqlen_q, int max_seqlen_k, "
#define OPTIONS "float scale, float softcap, int window_left, int window_right, bool bottom_right"

#define ATTENTION_ARGUMENTS "(" INPUTS DENSE PER_HEAD OPTIONS ", bool enable_gqa)"
#define VARLEN_ARGUMENTS "(" INPUTS PACKED PER_HEAD LENGTHS OPTIONS ")"

STABLE_TORCH_LIBRARY(attn_ext, m) {
  m.def("attention_fwd" ATTENTION_ARGUMENTS " -> (" RESULTS ")");
  m.def("attention_why_not" ATTENTION_ARGUMENTS " -> str");
  m.def("attention_bwd(Tensor d_o, Tensor? d_lse, " INPUTS RESULTS ", " DENSE PER_HEAD OPTIONS
        ", int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_mask, Tensor d_alibi, "
        "Tensor d_sinks)");
  m.def("varlen_attention_fwd" VARLEN_ARGUMENTS " -> (" RESULTS ")");
  m.def("varlen_attention_why_not" VARLEN_ARGUMENTS " -> str");
  m.def("varlen_attention_bwd(Tensor d_o, Tensor? d_lse, " INPUTS RESULTS
        ", " PACKED PER_HEAD LENGTHS OPTIONS
        ", int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_alibi, Tensor d_sinks)");

  // One batch dimension of one size; the tensors of a block mask: core/params.h, BlockMask.
  m.def("block_sparse_attention_fwd(" INPUTS BLOCKS BLOCK_OPTIONS ") -> (" RESULTS ")");
  m.def("block_sparse_attention_why_not(" INPUTS BLOCKS BLOCK_OPTIONS ") -> str");
  m.def("block_sparse_attention_bwd(Tensor d_o, Tensor? d_lse, " INPUTS RESULTS
        ", " BLOCKS BLOCK_OPTIONS
        ", int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_sinks)");

  // One batch dimension of one size, causal. sums [B or 1, Hq or 1, 2, Sk]: core/params.h,
  // Forgetting. d_column [B, Hq, 1, Sk] and d_row [B, Hq, Sq]: the sums of the logits' gradients
  // per key and per query.
  m.def("forgetting_attention_fwd(" INPUTS FORGETTING FORGETTING_OPTIONS ") -> (" RESULTS ")");
  m.def("forgetting_attention_why_not(" INPUTS FORGETTING FORGETTING_OPTIONS ") -> str");
  m.def("forgetting_attention_bwd(Tensor d_o, Tensor? d_lse, " INPUTS RESULTS
        ", " FORGETTING FORGETTING_OPTIONS
        ", int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_column, "
        "Tensor d_row)");

  // One batch dimension of one size. indices: int32 [B or 1, 1 or Hkv or Hq, Sq, keys], -1 padded.
  // transposed_lists: core/params.h, KeyReaders; absent where neither d_k nor d_v is wanted.
  m.def("topk_attention_fwd(" INPUTS LISTS ") -> (" RESULTS ")");
  m.def("topk_attention_why_not(" INPUTS LISTS ") -> str");
  m.def("topk_attention_bwd(Tensor d_o, Tensor? d_lse, " INPUTS RESULTS
        ", Tensor indices, Tensor? first_reader, Tensor? readers, Tensor? sinks, float scale, "
        "int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_sinks)");
  m.def("transposed_lists(Tensor indices, int keys) -> (Tensor first_reader, Tensor readers)");

  // One batch dimension of one size. entropy, top_index and top_weight as lse; column_sum [B, Hq,
  // Sk], packed [Hq, total_k].
  m.def("attention_stats(Tensor q, Tensor k, Tensor lse, " DENSE "Tensor? alibi_slopes, " OPTIONS
        ") -> (" STATS ")");
  m.def("varlen_attention_stats(Tensor q, Tensor k, Tensor lse, " PACKED
        "Tensor? alibi_slopes, " LENGTHS OPTIONS ") -> (" STATS ")");

  // o [B, H, S, Dv], lse [B, H, S].
  m.def("merge_states(" PARTS ") -> (" RESULTS ")");
  m.def("merge_states_why_not(" PARTS ") -> str");
  m.def(
      "merge_states_bwd(Tensor d_o, Tensor d_lse, Tensor o_a, Tensor lse_a, Tensor o_b, "
      "Tensor lse_b) -> (Tensor d_o_a, Tensor d_lse_a, Tensor d_o_b, Tensor d_lse_b)");
}
