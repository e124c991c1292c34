// Which pairs of a lane's grid of queries and keys a sparse policy keeps, as bits: looked up in a
// loop of few registers, before the products, and applied to scores in registers, whose indices
// must be constants.
#pragma once
#include "csrc/core/lanes.h"
#include "csrc/cuda/grid.cuh"

namespace atx::ATX_TARGET {

// A word of a bit for each of PAIRS.
template <int PAIRS, bool = (PAIRS <= 32)>
struct PairBits {
  static_assert(PAIRS <= 64);
  using Word = uint64_t;
};
template <int PAIRS>
struct PairBits<PAIRS, true> {
  using Word = uint32_t;
};

// One bit for each pair of a grid of ROWS x COLS; all of them for policies that are not sparse.
template <int ROWS, int COLS, class Score, class Place>
__device__ __forceinline__ auto seen_pairs(const Score& score, Place place) {
  using Word = typename PairBits<ROWS * COLS>::Word;
  if constexpr (!Score::SPARSE) return ~Word(0);
  Word seen = 0;
#pragma unroll 1
  for (int at = 0; at < ROWS * COLS; ++at) {
    const auto [i, j] = place(at / COLS, at % COLS);
    seen |= Word(bool(score.template keep<OneLane<float>>(i, j, 1))) << at;
  }
  return seen;
}

}  // namespace atx::ATX_TARGET
