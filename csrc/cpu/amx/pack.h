// From rows of 16-bit numbers in a tensor to tiles (tiles.h), whole tiles everywhere: what does not
// exist is 0.
#pragma once
#include <immintrin.h>

#include "csrc/cpu/amx/tiles.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// The bits of infinity: from there up, without the sign, a number is not finite.
template <class T>
constexpr int INFINITE = 0;
template <>
constexpr int INFINITE<bf16> = 0x7f80;
template <>
constexpr int INFINITE<f16> = 0x7c00;

// The first n of the 32 numbers at p, then zeros; touches nothing beyond them. Null: zeros.
template <class T>
ATX_HD __m512i load_halves(const T* p, int n) {
  if (!p) return _mm512_setzero_si512();
  if (n >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

ATX_HD int largest_lane(__m512i x) {
  uint16_t lanes[32];
  _mm512_storeu_si512(lanes, x);
  int top = 0;
  for (const uint16_t l : lanes) top = l > top ? l : top;
  return top;
}
// The largest |number| of a row, as bits.
template <class T>
int largest(const T* row, int cols) {
  __m512i top = _mm512_setzero_si512();
  for (int c = 0; c < cols; c += TILE_DEPTH)
    top = _mm512_max_epu16(
        top, _mm512_and_si512(load_halves(row + c, cols - c), _mm512_set1_epi16(0x7fff)));
  return largest_lane(top);
}

// 16 registers of 16 pairs, transposed, to rows to[0] ... to[15] of a tile.
ATX_HD void transpose_pairs(const __m512i (&from)[16], __m512i (&to)[16]) {
  using L = Lanes<float>;
  L::Float x[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = (L::Float)from[r];
  transpose<L>(x);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) to[r] = (__m512i)x[r];
}

// Rows as they lie: tile t of `to` is [16 rows, numbers 32 t ... 32 t + 31]. One block of 16 rows.
template <class T>
void pack_tile_rows(const T* const (&rows)[TILE_ROWS], int cols, T* to) {
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int c = 0; c < cols; c += TILE_DEPTH)
      _mm512_store_si512(to + c / TILE_DEPTH * TILE_HALVES + r * TILE_DEPTH,
                         load_halves(rows[r] ? rows[r] + c : nullptr, cols - c));
}

// 32 rows as pairs: tile t of `to`, at to + t * stride, is [16 pairs of rows, numbers 16 t ... 16 t
// + 15]. cols is rounded up to an even number of tiles.
template <class T>
void pack_tile_pairs(const T* const (&rows)[TILE_DEPTH], int cols, T* to, int64_t stride) {
  uint16_t index[2][TILE_DEPTH];
  for (int l = 0; l < TILE_DEPTH; ++l)
    for (int half = 0; half < 2; ++half)
      index[half][l] = uint16_t(half * TILE_ROWS + l / 2 + l % 2 * TILE_DEPTH);
  for (int c = 0; c < cols; c += TILE_DEPTH, to += 2 * stride)
    for (int r = 0; r < TILE_PAIRS; ++r) {
      const T *even = rows[2 * r], *odd = rows[2 * r + 1];
      const __m512i x = load_halves(even ? even + c : nullptr, cols - c);
      const __m512i y = load_halves(odd ? odd + c : nullptr, cols - c);
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(to + half * stride + r * TILE_DEPTH,
                           _mm512_permutex2var_epi16(x, _mm512_loadu_si512(index[half]), y));
    }
}

// 16 rows as columns of pairs: tile t of `to` is [pairs 16 t ... 16 t + 15, 16 rows].
template <class T>
void pack_tile_columns(const T* const (&rows)[TILE_ROWS], int cols, T* to) {
  for (int c = 0; c < cols; c += TILE_DEPTH, to += TILE_HALVES) {
    __m512i x[TILE_ROWS], y[TILE_PAIRS];
    for (int r = 0; r < TILE_ROWS; ++r)
      x[r] = load_halves(rows[r] ? rows[r] + c : nullptr, cols - c);
    transpose_pairs(x, y);
    for (int r = 0; r < TILE_PAIRS; ++r) _mm512_store_si512(to + r * TILE_DEPTH, y[r]);
  }
}

// The transposed of 32 rows: tile t, at to + t * stride, is [numbers 16 t ... 16 t + 15, 32 rows].
// cols is rounded up to an even number of tiles. Returns the largest |number|, as bits.
template <class T>
int pack_transposed(const T* const* rows, int cols, T* to, int64_t stride) {
  __m512i largest = _mm512_setzero_si512();
  for (int c = 0; c < cols; c += 2 * TILE_ROWS, to += 2 * stride) {
    __m512i low[TILE_PAIRS], high[TILE_PAIRS];
    for (int r = 0; r < TILE_PAIRS; ++r) {
      const T *even = rows[2 * r], *odd = rows[2 * r + 1];
      const __m512i x = load_halves(even ? even + c : nullptr, cols - c);
      const __m512i y = load_halves(odd ? odd + c : nullptr, cols - c);
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(x, magnitude));
      largest = _mm512_max_epu16(largest, _mm512_and_si512(y, magnitude));
      low[r] = _mm512_unpacklo_epi16(x, y);
      high[r] = _mm512_unpackhi_epi16(x, y);
    }
    // Interleaving works in each quarter of a register: numbers 8 n ... 8 n + 3 of its quarter n
    // are in `low`, the next four in `high`.
    const auto store = [&](const __m512i(&pairs)[TILE_PAIRS], int offset) {
      __m512i y[TILE_ROWS];
      transpose_pairs(pairs, y);
      for (int l = 0; l < TILE_ROWS; ++l) {
        const int d = l / 4 * 8 + l % 4 + offset;
        _mm512_store_si512(to + d / TILE_ROWS * stride + d % TILE_ROWS * TILE_DEPTH, y[l]);
      }
    };
    store(low, 0);
    store(high, 4);
  }
  return largest_lane(largest);
}

}  // namespace atx::ATX_TARGET
