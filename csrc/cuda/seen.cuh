// Which pairs of a lane's grid of queries and keys a sparse policy keeps, as bits: looked up in a
// loop of few registers, before the products, and applied to scores in registers, whose indices
// must be constants.
#pragma once
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

// One bit for each pair of a grid of ROWS x COLS among queries and keys [from, to), some of which
// may not exist; all of them for policies that are not sparse. A word of the mask is looked up once
// for the pairs in it, which follow one another: KEYS_ARE_ROWS says along which side.
template <int ROWS, int COLS, bool KEYS_ARE_ROWS, class Score, class Place>
__device__ __forceinline__ auto seen_pairs(const Score& score, Pair from, Pair to, Place place) {
  using Word = typename PairBits<ROWS * COLS>::Word;
  Word seen = ~Word(0);
  if constexpr (Score::SPARSE) {
    if (score.full(from.i, to.i, from.j, to.j)) return seen;
    seen = 0;
    uint32_t kept = 0;
    int query = -1, first_key = -1;  // whose word that is
#pragma unroll 1
    for (int n = 0; n < ROWS * COLS; ++n) {
      const int r = KEYS_ARE_ROWS ? n % ROWS : n / COLS, c = KEYS_ARE_ROWS ? n / ROWS : n % COLS;
      const auto [i, j] = place(r, c);
      if (i != query || (j & ~31) != first_key) {
        query = i, first_key = j & ~31;
        kept = score.kept_of_32(query, first_key);
      }
      seen |= Word(kept >> (j & 31) & 1) << (r * COLS + c);
    }
  }
  return seen;
}

}  // namespace atx::ATX_TARGET
