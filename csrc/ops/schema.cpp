// The contract with PyTorch: every op's schema.
#include <torch/csrc/stable/library.h>

// q [..., Hq, Sq, D], k [..., Hkv, Sk, D], v [..., Hkv, Sk, Dv] -> o [..., Hq, Sq, Dv], lse [...,
// Hq, Sq]. Varlen: q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv] -> o [total_q, Hq,
// Dv], lse [Hq, total_q]. window -1: unlimited. Causal is window_right = 0. *_why_not: every reason
// the call would fail, one per line.
#define ATTENTION_ARGUMENTS                                                                       \
  "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, float " \
  "scale, "                                                                                       \
  "float softcap, int window_left, int window_right, bool bottom_right, bool enable_gqa)"
#define VARLEN_ARGUMENTS                                                                \
  "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? "   \
  "alibi_slopes, "                                                                      \
  "Tensor? sinks, int max_seqlen_q, int max_seqlen_k, float scale, float softcap, int " \
  "window_left, "                                                                       \
  "int window_right, bool bottom_right)"

STABLE_TORCH_LIBRARY(attn_ext, m) {
  m.def("attention_fwd" ATTENTION_ARGUMENTS " -> (Tensor o, Tensor lse)");
  m.def("attention_why_not" ATTENTION_ARGUMENTS " -> str");
  m.def("varlen_attention_fwd" VARLEN_ARGUMENTS " -> (Tensor o, Tensor lse)");
  m.def("varlen_attention_why_not" VARLEN_ARGUMENTS " -> str");
}
