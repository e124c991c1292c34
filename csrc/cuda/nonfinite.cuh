// Values that are nan or inf must not reach rows that mask them out, but in a matrix product 0 ·
// nan is nan. So a tile of V that is partly masked and holds such values is split in two: the
// finite values, which multiply P as usual, and marks of the others, which multiply [P ≠ 0]. A mark
// counts: each row's sums say whether it attends to +inf, -inf or nan.
#pragma once
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

// The exponent bits of the elements in a 32-bit word; all ones: inf or nan.
template <class T>
constexpr uint32_t EXPONENTS = 0x7f800000u;
template <>
constexpr uint32_t EXPONENTS<bf16> = 0x7f807f80u;
template <>
constexpr uint32_t EXPONENTS<f16> = 0x7c007c00u;

// 1.0 in both halves of a word: an exponent of all ones but the highest.
template <class T>
constexpr uint32_t ONES = EXPONENTS<T> & 0x3fff3fffu;

// Marks: a tile's keys, fewer than 128, sum up to less than 128 of each, so that the three counts
// stay apart.
constexpr uint32_t MARK_INF = 1, MARK_MINUS_INF = 128, MARK_NAN = 128 * 128;

template <class T>
__device__ __forceinline__ bool any_nonfinite(uint32_t word) {
  // Adding the exponent's lowest bit carries into the sign's place exactly when the exponent is all
  // ones.
  constexpr uint32_t LOWEST = EXPONENTS<T> & ~(EXPONENTS<T> << 1);
  return ((word & EXPONENTS<T>)+LOWEST) & SIGNS<T>;
}

// Whether one of this thread's chunks of the tile holds a nan or inf.
template <int THREADS, int TEAMS = 1, class Tile>
__device__ __forceinline__ bool holds_nonfinite(Tile& tile) {
  using T = typename Tile::T;
  const ChunkWalk<Tile, THREADS, TEAMS> walk;
  bool found = false;
  const auto look = [&](int row, int chunk) {
    const Chunk words = as_chunk(tile.chunk(row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= any_nonfinite<T>(words.word[i]);
  };
  if constexpr (std::is_same_v<T, tf32>)
    walk.for_each_in_turn(look);
  else
    walk.for_each(look);
  return found;
}

// tile, marks ← the finite values of tile, and the marks of the others.
template <int THREADS, class Tile>
__device__ __forceinline__ void split_nonfinite(Tile& tile, Tile& marks) {
  using T = typename Tile::T;
#pragma unroll 1
  for (int at = int(threadIdx.x); at < Tile::ROWS * Tile::COLS; at += THREADS) {
    T& x = tile.at(at / Tile::COLS, at % Tile::COLS);
    const float value = to_float(x);
    const bool finite = !any_nonfinite<T>(x.bits);
    const uint32_t mark = value != value ? MARK_NAN : value < 0 ? MARK_MINUS_INF : MARK_INF;
    marks.at(at / Tile::COLS, at % Tile::COLS) = from_float<T>(finite ? 0.f : float(mark));
    if (!finite) x = T{};
  }
}

// 1.0 where the elements of an operand's word are not 0.
template <class T>
__device__ __forceinline__ uint32_t nonzero(uint32_t word) {
  if constexpr (sizeof(T) == 4) return word & ~SIGNS<T> ? ONES<T> : 0u;
  const uint32_t lo = word & 0x7fffu, hi = word & 0x7fff0000u;
  return ONES<T> & ((lo ? 0xffffu : 0u) | (hi ? 0xffff0000u : 0u));
}

// o += what the marked values add to it: weights [16 M, K_STEP K] is the A operand that multiplied
// the finite ones.
template <class Tile, int M, int K, int N>
__device__ __forceinline__ void add_nonfinite(float (&o)[M][N][4],
                                              const uint32_t (&weights)[K][M][4],
                                              const DownAddress<Tile>& marks) {
  using T = typename Tile::T;
  static_assert(K * K_STEP<T> < MARK_MINUS_INF);
  uint32_t attended[K][M][4];  // [P ≠ 0]
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) attended[k][m][i] = nonzero<T>(weights[k][m][i]);
    }
  }
#pragma unroll
  for (int n = 0; n < N; n += N_STEP<T>) {
    float counts[M][N_STEP<T>][4] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) multiply_nn(counts, attended[k], marks, k * K_STEP<T>, n * 8);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * N_STEP<T>; ++i) {
        const auto count = uint32_t(counts[m][i / 4][i % 4]);
        float& x = o[m][n + i / 4][i % 4];
        if (count % MARK_MINUS_INF) x += INFINITY;
        if (count % MARK_NAN / MARK_MINUS_INF) x -= INFINITY;
        if (count / MARK_NAN) x += NAN;
      }
    }
  }
}

}  // namespace atx::ATX_TARGET
