// Values that are nan or inf must not reach rows that mask them out, but in a matrix product 0 ·
// nan is nan. So a tile of V that is partly masked and holds such values is split in two: the
// finite values, which multiply P as usual, and marks of the others, which multiply [P ≠ 0]. A mark
// counts: each row's sums say whether it attends to +inf, -inf or nan.
#pragma once
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

// 1.0 in both halves of a word: an exponent of all ones but the highest.
template <class T>
constexpr uint32_t ONES = EXPONENTS<T> & 0x3fff3fffu;

// Marks: a tile's keys, fewer than 128, sum up to less than 128 of each, so that the three counts
// stay apart.
constexpr int MARK_INF = 1, MARK_MINUS_INF = 128, MARK_NAN = 128 * 128;

template <class T>
__device__ __forceinline__ bool any_nonfinite(uint32_t word) {
  // Adding the exponent's lowest bit carries into the sign's place exactly when the exponent is all
  // ones.
  constexpr uint32_t LOWEST = EXPONENTS<T> & ~(EXPONENTS<T> << 1);
  return ((word & EXPONENTS<T>)+LOWEST) & SIGNS<T>;
}

// Whether one of this thread's chunks of the tile holds a nan or inf.
template <int THREADS, class Tile>
__device__ __forceinline__ bool holds_nonfinite(Tile& tile) {
  bool found = false;
  ChunkWalk<Tile, THREADS>().for_each([&](int row, int chunk) {
    const Chunk words = as_chunk(tile.chunk(row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= any_nonfinite<typename Tile::T>(words.word[i]);
  });
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
    const int mark = value != value ? MARK_NAN : value < 0 ? MARK_MINUS_INF : MARK_INF;
    marks.at(at / Tile::COLS, at % Tile::COLS) = from_float<T>(finite ? 0.f : float(mark));
    if (!finite) x = T{};
  }
}

// o += what the marked values add to it: weights [16 M, 16 K] is the packed A operand that
// multiplied the finite ones.
template <class Tile, int M, int K, int N>
__device__ __forceinline__ void add_nonfinite(float (&o)[M][N][4],
                                              const uint32_t (&weights)[K][M][4],
                                              const FragmentAddress<Tile>& marks) {
  static_assert(K * 16 < MARK_MINUS_INF);
  uint32_t attended[K][M][4];  // [P ≠ 0]
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t lo = weights[k][m][i] & 0x7fffu, hi = weights[k][m][i] & 0x7fff0000u;
        attended[k][m][i] =
            ONES<typename Tile::T> & ((lo ? 0xffffu : 0u) | (hi ? 0xffff0000u : 0u));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    float counts[M][2][4] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) multiply_nn(counts, attended[k], marks, k * 16, n * 8);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int count = int(counts[m][i / 4][i % 4]);
        float& x = o[m][n + i / 4][i % 4];
        if (count % MARK_MINUS_INF) x += INFINITY;
        if (count % MARK_NAN / MARK_MINUS_INF) x -= INFINITY;
        if (count / MARK_NAN) x += NAN;
      }
    }
  }
}

}  // namespace atx::ATX_TARGET
