// Where sequence b lives: the only place that tells dense from varlen.
#pragma once
#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

struct Sequence {
  int64_t q_row, k_row;  // first row of the sequence in the packed tensors; 0 for dense
  int sq, sk;            // its lengths
};

ATX_HD Sequence sequence(const AttentionParams& p, int b) {
  if (!p.cu_seqlens_q) return {0, 0, p.Sq, p.Sk};
  const int q0 = p.cu_seqlens_q[b], k0 = p.cu_seqlens_k[b];
  return {q0, k0, p.cu_seqlens_q[b + 1] - q0, p.cu_seqlens_k[b + 1] - k0};
}

// Offset, in elements, of row 0 of (sequence b, head h) in a tensor with these strides.
ATX_HD int64_t row0(const Strides& s, int b, int h, int64_t first_row) {
  return int64_t(b) * s.batch + int64_t(h) * s.head + first_row * s.row;
}

}  // namespace atx::ATX_TARGET
