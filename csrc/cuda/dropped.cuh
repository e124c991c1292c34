// Which weights of a lane's grid of pairs dropout keeps, as bits: drawn in a loop of few registers
// and applied to weights in registers, whose indices must be constants.
#pragma once
#include "csrc/core/dropout.h"
#include "csrc/core/lanes.h"
#include "csrc/cuda/grid.cuh"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

// How the keys of a grid share calls (dropout.h): those of a query 8 or 16 apart, in one block of
// 64, are served by one call. KEYS_ARE_ROWS: all keys of a column are. Otherwise APART columns
// further is the next key that is.
template <int ROWS_, int COLS_, bool KEYS_ARE_ROWS, int APART>
struct Calls {
  static constexpr int ROWS = ROWS_, COLS = COLS_;
  static constexpr int COUNT = KEYS_ARE_ROWS ? COLS : ROWS * APART;
  static constexpr int SERVED = ROWS * COLS / COUNT;  // keys of a call
  static_assert(ROWS * COLS <= 32);

  // The place in the grid of a call's n-th key.
  __device__ __forceinline__ static int row(int call, int n) {
    return KEYS_ARE_ROWS ? n : call / APART;
  }
  __device__ __forceinline__ static int col(int call, int n) {
    return KEYS_ARE_ROWS ? call : call % APART + n * APART;
  }
};

// One bit for each pair of the grid, r * COLS + c, set where dropout keeps its weight.
template <class Calls, class Place>
__device__ __forceinline__ uint32_t kept_pairs(const AttentionParams& p, int b, int h,
                                               Place place) {
  using L = OneLane<float>;
  const Dropout<float> dropout(p, b);
  uint32_t kept = 0;
#pragma unroll 1
  for (int call = 0; call < Calls::COUNT; ++call) {
    const auto [i, first] = place(Calls::row(call, 0), Calls::col(call, 0));
    int words[4];
    dropout.draw<L>(first / DROPOUT_BLOCK * DROPOUT_CALLS + first % DROPOUT_CALLS, i, h, words);
#pragma unroll
    for (int n = 0; n < Calls::SERVED; ++n) {
      const int r = Calls::row(call, n), c = Calls::col(call, n);
      const int half = place(r, c).j % DROPOUT_BLOCK / DROPOUT_CALLS;
      // Selected, not indexed: an array indexed at run time lies in memory.
      const int low = half < 2 ? words[0] : words[1], high = half < 6 ? words[2] : words[3];
      const int word = half < 4 ? low : high;
      const bool keeps = random_half<L>(word, half) > dropout.last_dropped;
      kept |= uint32_t(keeps) << (r * Calls::COLS + c);
    }
  }
  return kept;
}

}  // namespace atx::ATX_TARGET
