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

// x ← what the factor that it returns turns into the scaled, and maybe soft-capped, product x. The
// factor is left to what follows, which may have a fused multiply-add for it.
template <class T, int ROWS, int COLS, class Score, class At>
__device__ __forceinline__ float cap(const Score& score, At at) {
  if (score.cap() == 0) return score.scale;
  const float shrunk = score.scale / score.cap();
  for_grid<ROWS, COLS>([&](int r, int c) { at(r, c) = tanh_for<T>(at(r, c) * shrunk); });
  return score.cap();
}
template <int ROWS, int COLS, class At>
__device__ __forceinline__ void multiply(At at, float factor) {
  for_grid<ROWS, COLS>([&](int r, int c) { at(r, c) *= factor; });
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

// Pairs of neighboring elements of a mask, of 8 or 16 bits, as they lie in memory: of columns 2n
// and 2n + 1 in one load, which may be on its way before the products that they belong to.
template <int ROWS, int COLS>
struct MaskWords {
  bool there = false;  // of all threads alike
  uint32_t word[ROWS][COLS / 2];

  // visit(r, c, two): pairs c and c + 1 of row r.
  template <bool BYTES, class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_grid<ROWS, COLS / 2>([&](int r, int c) { visit(r, 2 * c, word[r][c]); });
  }

  // there ← the mask has such pairs, which all exist.
  template <class Place>
  __device__ __forceinline__ void load(const Mask& mask, Place place) {
    const int size = size_of(mask.dtype);
    const auto address = reinterpret_cast<uintptr_t>(mask.data);
    there = size <= 2 && mask.col == 1 && (address | uint64_t(mask.row) * size) % (2 * size) == 0;
    if (!there) return;
    if (size == 2)
      load_as<uint32_t>(mask, place);
    else
      load_as<uint16_t>(mask, place);
  }

 private:
  template <class Word, class Place>
  __device__ __forceinline__ void load_as(const Mask& mask, Place place) {
    const char* const data = static_cast<const char*>(mask.data);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLS; c += 2) {
        const auto [i, j] = place(r, c);
        word[r][c / 2] =
            *reinterpret_cast<const Word*>(data + (i * mask.row + j) * int(sizeof(Word) / 2));
      }
    }
  }
};

// at(r, c) ← combine(at(r, c), what the mask of element type M has there).
template <int ROWS, int COLS, class M, class At, class Place, class Combine>
__device__ __forceinline__ void combine_mask(const Mask& mask, At at, Place place,
                                             Combine combine) {
  const M* const data = static_cast<const M*>(mask.data);
  // A row's loads are on their way before the first is needed; of more, registers would run out.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    M found[COLS];
#pragma unroll
    for (int c = 0; c < COLS; ++c) {
      const auto [i, j] = place(r, c);
      found[c] = data[i * mask.row + j * mask.col];
    }
#pragma unroll
    for (int c = 0; c < COLS; ++c) at(r, c) = combine(at(r, c), found[c]);
  }
}

// x ← factor x and the mask's share. existing: places of pairs that exist.
template <int ROWS, int COLS, bool EXACT, class Words, class At, class Existing>
__device__ __forceinline__ void add_mask(const Mask& mask, const Words& words, float factor, At at,
                                         Existing existing) {
  // -inf masks even a product that is nan.
  const auto add = [=](float x, float bias) {
    return EXACT && bias == -INFINITY ? bias : fmaf(x, factor, bias);
  };
  // Of 16 bits: f16 or bf16. Asked pair by pair, one loop of loads does for both.
  const bool half = mask.dtype == DType::f16;
  const auto add_16_bits = [=](float x, uint16_t bits) {
    return add(x, half ? to_float(f16{bits}) : to_float(bf16{bits}));
  };
  const auto choose = [=](float x, uint32_t keep) { return keep ? x * factor : -INFINITY; };
  if (words.there) {
    const auto halves = [&](auto of_half) {
      words.template for_each<false>([&](int r, int c, uint32_t two) {
        at(r, c) = of_half(at(r, c), two << 16);
        at(r, c + 1) = of_half(at(r, c + 1), two & 0xffff0000u);
      });
    };
    if (mask.dtype == DType::boolean)
      words.template for_each<true>([&](int r, int c, uint32_t two) {
        at(r, c) = choose(at(r, c), two & 0xff);
        at(r, c + 1) = choose(at(r, c + 1), two & 0xff00);
      });
    else if (half)
      halves([&](float x, uint32_t high) { return add(x, to_float(f16{uint16_t(high >> 16)})); });
    else
      halves([&](float x, uint32_t high) { return add(x, bit_cast<float>(high)); });
    return;
  }
  if (mask.dtype == DType::boolean)
    combine_mask<ROWS, COLS, uint8_t>(mask, at, existing, choose);
  else if (mask.dtype == DType::f32)
    combine_mask<ROWS, COLS, float>(mask, at, existing, add);
  else
    combine_mask<ROWS, COLS, uint16_t>(mask, at, existing, add_16_bits);
}

// What comes after the soft-cap of a policy that is not sparse, but for its factor. inside: every
// pair of the grid exists and lies in the policy's window.
template <int ROWS, int COLS, bool EXACT, class Score, class Words, class At, class Place>
__device__ __forceinline__ void add_options(const Score& score, int sq, bool inside,
                                            const Words& words, float factor, At at, Place place) {
  using Lane = OneLane<float>;
  // The policy reads what is of a query or a key: no further than their end.
  const auto existing = [&](int r, int c) {
    const auto [i, j] = place(r, c);
    return Pair{i < sq ? i : sq - 1, !EXACT || j < score.sk ? j : score.sk - 1};
  };
  if (score.forgets()) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      auto level = score.level_with(existing(r, 0).i);
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
        const auto [i, j] = existing(r, c);
        if (i != existing(r, 0).i) level = score.level_with(i);  // where rows are keys
        at(r, c) = score.template forget<Lane>(at(r, c) * factor, level, j, 1);
      }
    }
  } else {
    if (score.slope != 0) {
      for_grid<ROWS, COLS>([&](int r, int c) {
        // Within a grid, distances differ by constants: one conversion serves all of them.
        const auto [i, j] = place(r, c);
        const auto [i0, j0] = place(0, 0);
        const float distance = float(i0 + (score.sk - sq) - j0) + float((i - i0) - (j - j0));
        at(r, c) = fmaf(fabsf(distance), -score.slope, at(r, c) * factor);
      });
      factor = 1;
    }
    if (score.mask.data)
      add_mask<ROWS, COLS, EXACT>(score.mask, words, factor, at, existing);
    else if (score.slope == 0)
      multiply<ROWS, COLS>(at, factor);
  }
  if (!inside)
    for_grid<ROWS, COLS>([&](int r, int c) {
      const auto [i, j] = place(r, c);
      if (!score.template in_window<Lane>(i, j, 1)) at(r, c) = -INFINITY;
    });
}

// What grid_logits reads of a mask, on its way, if all keys of the grid exist.
template <int ROWS, int COLS, class Score, class Place>
__device__ __forceinline__ void load_mask(MaskWords<ROWS, COLS>& words, const Score& score, int sq,
                                          Place place) {
  if constexpr (!Score::SPARSE)
    if (score.mask.data && !score.forgets())
      words.load(score.mask, [&](int r, int c) {
        const auto [i, j] = place(r, c);
        return Pair{i < sq ? i : sq - 1, j};
      });
}

// products ← logits of a policy that is not linear, for operands of type T; -inf where masked out.
// The grid lies among queries [i0, i1) and keys [j0, j1), some of which may not exist. seen: what
// seen_pairs says of its pairs. words: load_mask's, which asks for columns 2n and 2n + 1 to be keys
// 2m and 2m + 1; otherwise none. Not EXACT: all keys exist, and a product that is nan, or inf,
// under a bias of -inf becomes nan; everything else the same bits.
template <class T, int ROWS, int COLS, bool EXACT = true, class Score, class Seen, class Words,
          class At, class Place>
__device__ __forceinline__ void grid_logits(const Score& score, int sq, Pair from, Pair to,
                                            Seen seen, const Words& words, At at, Place place) {
  const float factor = cap<T, ROWS, COLS>(score, at);
  if constexpr (Score::SPARSE) {
    multiply<ROWS, COLS>(at, factor);
    for_grid<ROWS, COLS>([&](int r, int c) {
      if (!(seen >> (r * COLS + c) & 1)) at(r, c) = -INFINITY;
    });
  } else {
    const bool inside = score.window_holds(from.i, to.i, from.j, to.j);
    add_options<ROWS, COLS, EXACT>(score, sq, inside, words, factor, at, place);
  }
}

// The same where the mask is not on its way. NEIGHBORS: columns 2n and 2n + 1 are keys 2m and 2m +
// 1.
template <class T, int ROWS, int COLS, bool NEIGHBORS, class Score, class Seen, class At,
          class Place>
__device__ __forceinline__ void grid_logits(const Score& score, int sq, Pair from, Pair to,
                                            Seen seen, At at, Place place) {
  MaskWords<ROWS, COLS> words;
  if constexpr (NEIGHBORS)
    if (to.j <= score.sk) load_mask(words, score, sq, place);
  grid_logits<T, ROWS, COLS>(score, sq, from, to, seen, words, at, place);
}

}  // namespace atx::ATX_TARGET
