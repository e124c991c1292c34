// Which weights of a lane's grid of pairs (query, key) dropout keeps, as bits: drawn in a loop of
// few registers and applied to weights in registers, whose indices must be constants.
#pragma once
#include "csrc/core/dropout.h"
#include "csrc/core/lanes.h"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

struct Pair {
  int i, j;  // query, key
};

// What the weights that dropout keeps are multiplied by.
__device__ __forceinline__ float kept_factor(const AttentionParams& p) {
  return p.dropout > 0 && p.dropout < 1 ? float(1 / (1 - p.dropout)) : 1.f;
}

// One bit for each pair of a lane's grid of ROWS x COLS, set where dropout keeps its weight.
// place(r, c) is the pair's query and key.
template <int ROWS, int COLS, class Place>
__device__ __forceinline__ uint32_t kept_pairs(const AttentionParams& p, int b, int h,
                                               Place place) {
  static_assert(ROWS * COLS <= 32);
  const Dropout<float> dropout(p, b);
  uint32_t kept = 0;
#pragma unroll 1
  for (int at = 0; at < ROWS * COLS; ++at) {
    const auto [i, j] = place(at / COLS, at % COLS);
    float factor[4];
    dropout.factors<OneLane<float>>(uint32_t(j) / 4, uint32_t(i), uint32_t(h), factor);
    // Selected, not indexed: an array indexed at run time lies in memory.
    const float even = j % 4 < 2 ? factor[0] : factor[2], odd = j % 4 < 2 ? factor[1] : factor[3];
    kept |= uint32_t((j % 2 ? odd : even) != 0.f) << at;
  }
  return kept;
}

}  // namespace atx::ATX_TARGET
