// One plain struct per kernel family: everything a kernel may know, with shapes in the comments.
// Filled once, by ops/<family>.cpp, for every target alike; kernels trust it.
#pragma once
#include <cstdint>

namespace atx {

enum class DType : int32_t { f64, f32, f16, bf16, boolean };

// Element strides of a [B, H, S, D] tensor whose last dimension is contiguous. 0 where it is
// broadcast.
struct Strides {
  int64_t batch, head, row;
};

// [B, Hq, Sq, Sk], every stride free (0 where broadcast). boolean: true = attend. Otherwise added
// to the score.
struct Mask {
  const void* data;  // null: no mask
  DType dtype;
  int64_t batch, head, row, col;
};

// Which keys a query attends to, by blocks of pairs: none of them, all, or those with a bit set in
// the block's own bitmap. Bit n of a row of bits is bit n % 32 of its word n / 32. Block masks come
// in planes, one per (batch, query head) or shared.
struct BlockMask {
  const uint32_t* visited;    // [planes, query blocks, key blocks' words]: not empty. null: no mask
  const uint32_t* full;       // the same: every pair of the block that exists
  const uint32_t* visited_t;  // [planes, key blocks, query blocks' words]: visited, transposed
  const int32_t* first_part;  // as visited: how many other blocks come before the word's first
  const uint32_t* bits;       // [those other blocks, queries of a block, keys' words]
  int log2_q, log2_kv;        // of a block's queries and keys: 5 to 8
  int64_t batch, head;        // planes from one to the next; 0: shared
};

// Attention that forgets, [B, Hq, 2, Sk]: of every query head the running sums S of what each key
// adds, as the nearest number of the accumulation type and the rest, which differences of large
// sums need. score += S_at - S_j, where query i is level with key `at`, or with the first or last.
struct Forgetting {
  const void* sums;     // null: absent
  int64_t batch, head;  // the last two dimensions are contiguous
};

// One number per query head, [B, Hq], in the accumulation type (float; double for f64 tensors).
struct PerHead {
  const void* data;  // null: absent
  int64_t batch, head;
};

// o = softmax(score(q kᵀ)) v.  Dense tensors are [B, H, S, D]. With cu_seqlens (varlen) they are
// packed [1, H, total, D] (batch stride 0): sequence b owns rows [cu_seqlens[b], cu_seqlens[b +
// 1]). sequence.h turns (params, b) into row ranges, so that no kernel tells the two apart.
struct AttentionParams {
  const void* q;  // [B, Hq, Sq, D]
  const void* k;  // [B, Hkv, Sk, D]
  const void* v;  // [B, Hkv, Sk, Dv]
  void* o;        // [B, Hq, Sq, Dv]
  void* lse;      // [B, Hq, Sq] natural log, in the accumulation type; null: not wanted
  Strides q_stride, k_stride, v_stride, o_stride;
  int64_t lse_batch, lse_head;  // strides of lse; its rows are contiguous

  const int32_t* cu_seqlens_q;  // [B + 1], null: dense
  const int32_t* cu_seqlens_k;  // [B + 1], null: dense

  Mask mask;
  PerHead alibi_slopes;   // score += -slope * |i + Sk - Sq - j|
  Forgetting forgetting;  // without alibi_slopes, a mask, or varlen
  BlockMask blocks;       // without any of the above, or a window; with a positive scale
  PerHead sinks;          // a key without a value: exp(sink) joins the denominator

  int B, Hq, Hkv;  // Hq is a multiple of Hkv; query head h reads key head h / (Hq / Hkv)
  int Sq, Sk;      // varlen: the longest sequence
  int D, Dv;
  DType dtype;  // of q, k, v and o
  bool tf32;    // f32: products may be rounded to tf32 (numeric.h). A kernel need not

  double scale;    // multiplies q·k
  double softcap;  // score = softcap * tanh(score / softcap); 0: off
  double dropout;  // share of the weights that become 0 (dropout.h), after the softmax; 0: none
  const int64_t* seed;              // [1], on the target's device; unused without dropout
  int64_t first_batch, batch_step;  // dropout knows batch entry b as first_batch + b * batch_step
  int window_left,
      window_right;   // keys kept around the diagonal, inclusive; NO_WINDOW: all. Causal: right = 0
  bool bottom_right;  // the diagonal ends at (Sq - 1, Sk - 1) instead of starting at (0, 0)

  // As many floats as Kernels::attention_fwd_workspace asks for; null: none. Forward only.
  float* workspace;
};

// The gradients of attention, from those of o and of lse. With P the weights, M the dropout's
// factors (0 or 1 / (1 - dropout); 1 without), Y the logits and X = scale q kᵀ:
//   dP = M ∘ (dO Vᵀ),  delta = rowsum(dO ∘ O) - dlse,  dY = P ∘ (dP - delta),  dX = dY ∘ dY/dX
//   dV = (M ∘ P)ᵀ dO,  dQ = scale dX K,  dK = scale dXᵀ Q
//   dmask = dY, of forgetting the sums over queries of the same, dalibi_h = -Σ dY_ij |i + Sk - Sq -
//   j|, dsink_h = -Σ_i exp(sink_h - lse_i) delta_i
// A null output is not wanted. A row with lse = -inf contributes nothing, whatever q and d_o hold
// there. Nothing of a key that a row does not attend to reaches a gradient of that row.
struct AttentionBwdParams {
  AttentionParams fwd;  // o and lse are inputs here; dense has one batch dimension

  const void* d_o;    // [B, Hq, Sq, Dv]
  const void* d_lse;  // [B, Hq, Sq], strides of lse; null: zero
  void* d_q;          // [B, Hq, Sq, D]
  void* d_k;          // [B, Hkv, Sk, D]
  void* d_v;          // [B, Hkv, Sk, Dv]
  Strides d_o_stride, d_q_stride, d_k_stride, d_v_stride;

  void* d_mask;  // a stride of 0: summed over that dimension
  DType d_mask_dtype;
  int64_t d_mask_batch, d_mask_head, d_mask_row, d_mask_col;
  void *d_alibi, *d_sinks;  // [B, Hq], contiguous, in the accumulation type

  // [B, Hq, Sq] with the strides of lse. Workspace: delta. Wanted with d_alibi, and alone of
  // forgetting: -Σ_j dY_ij General::share(i, j), the rows' shares of what they have in common.
  void *delta, *row_shares;
};

// What the weights P = exp(Y - lse) of attention look like, without P itself. The sink's weight is
// in lse and in none of these; dropout does not come into it. A null output is not wanted.
struct AttentionStatsParams {
  AttentionParams fwd;  // lse is an input; v and o are absent, Dv is 0

  // [B, Hq, Sq], with the strides of lse. A query without keys: 0, 0 and -1.
  void* entropy;       // -Σ_j P_ij ln P_ij, in the accumulation type
  void* top_weight;    // max_j P_ij, in the accumulation type
  int32_t* top_index;  // the first j that has it, counted within the sequence

  void* column_sum;  // [B, Hq, Sk], Σ_i P_ij, in the accumulation type; keys are contiguous
  int64_t column_batch, column_head;
};

// Which keys each query attends to: lists of as many, [B, H, Sq, length], H of 1, Hkv or Hq. A key
// that is listed twice counts twice; what is no key, as -1, pads a list, anywhere in it.
struct KeyLists {
  const int32_t* keys;
  int64_t batch, head, row;  // strides; 0 where shared. A list is contiguous
  int length;
  int sharing;  // query heads, one after the other, that have their lists in common: Hq / H
};

// The same lists the other way round: who lists a key, in ascending order, as often as it does.
struct KeyReaders {
  const int64_t* first;  // [B or 1, H, Sk + 1], contiguous: where each key's readers begin
  const int32_t* query;  // [B or 1, H, Sq * length], contiguous
  int64_t planes;        // H; 0: shared by the batch
};

// Attention over listed keys. fwd has neither mask, bias, window nor dropout.
struct TopkAttentionParams {
  AttentionParams fwd;
  KeyLists lists;
};

// Its gradients, by the equations of AttentionBwdParams. Those of k and v are sums over readers,
// which are there if one of the two is wanted.
struct TopkAttentionBwdParams {
  AttentionBwdParams bwd;
  KeyLists lists;
  KeyReaders readers;
};

// Two results of attention over disjoint keys become the one over all of them:
//   lse = log(e^lse_a + e^lse_b),  o = w_a o_a + w_b o_b,  w = e^(lse_part - lse)
// A part with w = 0 adds nothing, whatever its o holds.
struct MergeStatesParams {
  const void *o_a, *o_b;  // [B, H, S, Dv]
  void* o;
  const void *lse_a, *lse_b;  // [B, H, S], in the accumulation type
  void* lse;
  Strides o_a_stride, o_b_stride, o_stride, lse_a_stride, lse_b_stride, lse_stride;
  int64_t B, H, S;
  int Dv;
  DType dtype;  // of o
};

// The gradients of merging, with g = rowsum(d_o ∘ (o_a - o_b)):
//   d_o_a = w_a d_o,  d_lse_a = w_a (d_lse + w_b g)
//   d_o_b = w_b d_o,  d_lse_b = w_b (d_lse - w_a g)
struct MergeStatesBwdParams {
  MergeStatesParams fwd;  // its o is not read
  const void *d_o, *d_lse;
  void *d_o_a, *d_o_b, *d_lse_a, *d_lse_b;
  Strides d_o_stride, d_lse_stride, d_o_a_stride, d_o_b_stride, d_lse_a_stride, d_lse_b_stride;
};

constexpr int MAX_LENGTH = 1 << 30;  // longest Sq, Sk: row plus window bound stays in an int
constexpr int NO_WINDOW = MAX_LENGTH;

}  // namespace atx
