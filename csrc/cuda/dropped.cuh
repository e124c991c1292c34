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

// One bit for each pair of a lane's grid of ROWS x COLS, set where dropout keeps its weight.
// place(r, c) is the pair's query and key.
template <int ROWS, int COLS, class Place>
__device__ __forceinline__ uint32_t kept_pairs(const AttentionParams& p, int b, int h,
                                               Place place) {
  static_assert(ROWS * COLS <= 32);
  using L = OneLane<float>;
  const Dropout<float> dropout(p, b);
  uint32_t kept = 0;
#pragma unroll 1
  for (int at = 0; at < ROWS * COLS; ++at) {
    const auto [i, j] = place(at / COLS, at % COLS);
    const int call = j / DROPOUT_BLOCK * DROPOUT_CALLS + j % DROPOUT_CALLS;
    const int half = j % DROPOUT_BLOCK / DROPOUT_CALLS;
    int words[4];
    dropout.draw<L>(call, i, h, words);
    // Selected, not indexed: an array indexed at run time lies in memory.
    const int low = half < 2 ? words[0] : words[1], high = half < 6 ? words[2] : words[3];
    const int word = half < 4 ? low : high;
    const bool keeps = random_half<L>(word, half) > dropout.last_dropped;
    kept |= uint32_t(keeps) << at;
  }
  return kept;
}

}  // namespace atx::ATX_TARGET
