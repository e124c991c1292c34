// The logits of a lane's grid of pairs under the policy General, option by option. Whether a call
// has an option is asked once per grid, not once per pair, and what an option reads is on its way
// for a row of pairs before the first is needed. Asked pair by pair, as score.h says it, a forward
// with an option took 2.5 to 4.5 times as long on an H100 (docs/h100.md).
//
// at(r, c): the product of row r and column c of the grid. place(r, c): its query and key.
// NEIGHBORS: columns 2n and 2n + 1 of a row are neighboring keys, the first of an even number.
#pragma once
#include "csrc/core/lanes.h"
#include "csrc/core/score.h"
#include "csrc/cuda/grid.cuh"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

// For operands of 16 bits, by an exponential: off by 2e-7, which of a logit under a soft-cap of 50
// is 1e-5, and they do not tell.
template <class T>
__device__ __forceinline__ float tanh_for(float x) {
  if constexpr (sizeof(T) != 2) return OneLane<float>::tanh(x);
  return 1 - 2 * simt::reciprocal(simt::exp2(x * float(2 * 1.4426950408889634)) + 1);
}

// x ← scale x, soft-capped if the call says so.
template <class T, int ROWS, int COLS, class Score, class At>
__device__ __forceinline__ void scale_and_cap(const Score& score, At at) {
  if (score.cap() == 0) {
    for_grid<ROWS, COLS>([&](int r, int c) { at(r, c) *= score.scale; });
  } else {
    const float shrunk = score.scale / score.cap();
    for_grid<ROWS, COLS>(
        [&](int r, int c) { at(r, c) = tanh_for<T>(at(r, c) * shrunk) * score.cap(); });
  }
}

// gradients ← theirs by the products x, from theirs by the logits.
template <class T, int ROWS, int COLS, class Score, class At, class Gradient>
__device__ __forceinline__ void through_scale_and_cap(const Score& score, At at,
                                                      Gradient gradient) {
  if (score.cap() == 0) {
    for_grid<ROWS, COLS>([&](int r, int c) { gradient(r, c) *= score.scale; });
  } else {
    const float shrunk = score.scale / score.cap();
    for_grid<ROWS, COLS>([&](int r, int c) {
      const float t = tanh_for<T>(at(r, c) * shrunk), onward = score.scale * (1 - t * t);
      // The product of a pair that is masked out, whose gradient is 0, may be nan.
      gradient(r, c) = gradient(r, c) == 0 ? 0.f : gradient(r, c) * onward;
    });
  }
}

// at(r, c) ← combine(at(r, c), what the mask of element type M has there). NEIGHBORS: of columns 2n
// and 2n + 1 in one load.
template <int ROWS, int COLS, bool NEIGHBORS, class M, class At, class Place, class Combine>
__device__ __forceinline__ void combine_mask(const Mask& mask, At at, Place place,
                                             Combine combine) {
  struct alignas(2 * sizeof(M)) Neighbors {
    M x[2];
  };
  const M* const data = static_cast<const M*>(mask.data);
  // A row's loads are on their way before the first is needed; of more, registers would run out.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    M found[COLS];
    if constexpr (NEIGHBORS) {
#pragma unroll
      for (int c = 0; c < COLS; c += 2) {
        const auto [i, j] = place(r, c);
        const auto two = *reinterpret_cast<const Neighbors*>(data + i * mask.row + j);
        found[c] = two.x[0], found[c + 1] = two.x[1];
      }
    } else {
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
        const auto [i, j] = place(r, c);
        found[c] = data[i * mask.row + j * mask.col];
      }
    }
#pragma unroll
    for (int c = 0; c < COLS; ++c) at(r, c) = combine(at(r, c), found[c]);
  }
}

// The mask's share in the logits. whole: every pair of the grid exists. existing: place, of pairs
// that exist.
template <int ROWS, int COLS, bool NEIGHBORS, class At, class Place, class Existing>
__device__ __forceinline__ void add_mask(const Mask& mask, bool whole, At at, Place place,
                                         Existing existing) {
  const auto with = [&]<class M>(M, auto combine) {
    const auto in_twos = [&] {
      const uint64_t row = uint64_t(mask.row) * sizeof(M);
      return mask.col == 1 && (reinterpret_cast<uintptr_t>(mask.data) | row) % (2 * sizeof(M)) == 0;
    };
    if constexpr (NEIGHBORS)
      if (whole && in_twos()) return combine_mask<ROWS, COLS, true, M>(mask, at, place, combine);
    combine_mask<ROWS, COLS, false, M>(mask, at, existing, combine);
  };
  const auto add = [](float x, auto bias) { return OneLane<float>::add_bias(x, to_float(bias)); };
  switch (mask.dtype) {
    case DType::boolean:
      return with(uint8_t{}, [](float x, uint8_t keep) { return keep ? x : -INFINITY; });
    case DType::f32:
      return with(float{}, add);
    case DType::f16:
      return with(f16{}, add);
    default:
      return with(bf16{}, add);
  }
}

// What comes after the soft-cap of a policy that is not sparse. whole: every pair of the grid
// exists. inside: and lies in the policy's window.
template <int ROWS, int COLS, bool NEIGHBORS, class Score, class At, class Place>
__device__ __forceinline__ void add_options(const Score& score, int sq, bool whole, bool inside,
                                            At at, Place place) {
  using Lane = OneLane<float>;
  // The policy reads what is of a query or a key: no further than their end.
  const auto existing = [&](int r, int c) {
    const auto [i, j] = place(r, c);
    return Pair{i < sq ? i : sq - 1, j < score.sk ? j : score.sk - 1};
  };
  if (score.forgets()) {
    for_grid<ROWS, COLS>([&](int r, int c) {
      const auto [i, j] = existing(r, c);
      at(r, c) = score.template forget<Lane>(at(r, c), i, j, 1);
    });
  } else {
    if (score.slope != 0)
      for_grid<ROWS, COLS>([&](int r, int c) {
        // Within a grid, distances differ by constants: one conversion serves all of them.
        const auto [i, j] = place(r, c);
        const auto [i0, j0] = place(0, 0);
        const float distance = float(i0 + score.level - j0) + float((i - i0) - (j - j0));
        at(r, c) -= fabsf(distance) * score.slope;
      });
    if (score.mask.data) add_mask<ROWS, COLS, NEIGHBORS>(score.mask, whole, at, place, existing);
  }
  if (!inside)
    for_grid<ROWS, COLS>([&](int r, int c) {
      const auto [i, j] = place(r, c);
      if (!score.template in_window<Lane>(i, j, 1)) at(r, c) = -INFINITY;
    });
}

// products ← logits of a policy that is not linear, for operands of type T; -inf where masked out.
// The grid lies among queries [i0, i1) and keys [j0, j1), some of which may not exist. seen: what
// seen_pairs says of its pairs. NEIGHBORS: columns 2n and 2n + 1 are keys 2m and 2m + 1.
template <class T, int ROWS, int COLS, bool NEIGHBORS, class Score, class Seen, class At,
          class Place>
__device__ __forceinline__ void grid_logits(const Score& score, int sq, Pair from, Pair to,
                                            Seen seen, At at, Place place) {
  scale_and_cap<T, ROWS, COLS>(score, at);
  if constexpr (Score::SPARSE) {
    for_grid<ROWS, COLS>([&](int r, int c) {
      if (!(seen >> (r * COLS + c) & 1)) at(r, c) = -INFINITY;
    });
  } else {
    const bool whole = to.i <= sq && to.j <= score.sk;
    const bool inside = whole && score.window_holds(from.i, to.i, from.j, to.j);
    add_options<ROWS, COLS, NEIGHBORS>(score, sq, whole, inside, at, place);
  }
}

}  // namespace atx::ATX_TARGET
