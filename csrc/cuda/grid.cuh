// A lane's grid of pairs (query, key): ROWS x COLS of them, in registers, whose indices must be
// constants. Kernels say where a pair is by place(r, c), and where its number is by at(r, c).
#pragma once
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

struct Pair {
  int i, j;  // query, key
};

template <int ROWS, int COLS, class Visit>
__device__ __forceinline__ void for_grid(Visit visit) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < COLS; ++c) visit(r, c);
  }
}

}  // namespace atx::ATX_TARGET
