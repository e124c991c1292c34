// What the carriers of planted bugs share: the problem, and which bug is planted.
#pragma once
#include "csrc/simt/simt.h"
#include "guarded.h"

// A kernel with BUG(0) is correct. The number comes with the parameters, so one compilation holds
// every variant.
#define BUG(n) (p.plant == (n))

namespace atx::ATX_TARGET {

// o = softmax(scale q kᵀ) v, tensors [H, S, D] with contiguous rows a stride apart; lse [H, Sq].
struct Problem {
  const void *q, *k, *v;
  void* o;
  float* lse;
  int H, Sq, Sk;
  int64_t q_row, kv_row, o_row;  // strides, in elements
  int64_t q_head, kv_head, o_head;
  float scale;
  int causal;  // key j is seen by query i if j <= i + Sk - Sq
  int plant;
  float *part_o, *part_lse;  // split.cu: [H, splits, D] and [H, splits]
  int splits;
};

}  // namespace atx::ATX_TARGET
