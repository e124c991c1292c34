// The two products of attention where one side has few rows, too few to fill the lanes of a panel
// (gemm.h): the lanes hold dimensions, and the rows of the other side are read once, where they
// lie, for all of the few.
//   dot_products  S = X Yᵀ            [rows, count] from x [rows, D] and count rows of Y
//   add_weighted  O = O·alpha + S Y   [rows, width]
// y(n) is a pointer to row n of Y, of whatever type.
#pragma once
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// The most rows that are few: as many products with COUNT / FEW_ROWS rows of Y fill COUNT
// registers.
template <class L>
constexpr int FEW_ROWS = L::COUNT / 2;

// Calls f with the smallest power of two of rows that holds them all: the last row is then
// repeated.
template <int MAX, int ROWS = 1, class F>
ATX_HD void by_rows(int rows, F f) {
  if constexpr (ROWS < MAX)
    if (rows > ROWS) return by_rows<MAX, 2 * ROWS>(rows, f);
  f.template operator()<ROWS>();
}

// s is written up to a multiple of COUNT / ROWS, with products of the last row of Y.
template <class L, int ROWS, class A, class Y>
void dot_products(int depth, int rows, const A* x, int count, const Y& y, A* s, int64_t s_row) {
  using Float = typename L::Float;
  constexpr int COLS = L::COUNT / ROWS;
  for (int j = 0; j < count; j += COLS) {
    const A* few[ROWS];
    decltype(y(0)) row[COLS];
    for (int r = 0; r < ROWS; ++r) few[r] = x + (r < rows ? r : rows - 1) * depth;
    for (int n = 0; n < COLS; ++n) row[n] = y(j + n < count ? j + n : count - 1);
    Float acc[L::COUNT];
    for (int n = 0; n < L::COUNT; ++n) acc[n] = L::all(0);
    const auto step = [&](int d, auto... rest) {
      // What is fewer waits in registers for the other side, which is read one by one.
      if constexpr (ROWS < COLS) {
        Float own[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) own[r] = L::load(few[r] + d, rest...);
#pragma GCC unroll 16
        for (int n = 0; n < COLS; ++n) {
          const Float part = L::load(row[n] + d, rest...);
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; ++r) acc[r * COLS + n] += own[r] * part;
        }
      } else {
        Float part[COLS];
#pragma GCC unroll 16
        for (int n = 0; n < COLS; ++n) part[n] = L::load(row[n] + d, rest...);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
          const Float own = L::load(few[r] + d, rest...);
#pragma GCC unroll 16
          for (int n = 0; n < COLS; ++n) acc[r * COLS + n] += own * part[n];
        }
      }
    };
    int d = 0;
    for (; d + L::COUNT <= depth; d += L::COUNT) step(d);
    if (d < depth) step(d, depth - d);
    A sums[L::COUNT];
    L::store(sums, sum_each<L>(acc));
    for (int r = 0; r < rows && r < ROWS; ++r)
      memcpy(s + r * s_row + j, sums + r * COLS, sizeof(A) * COLS);
  }
}

// VECS vectors of o from dimension d on; `rest` is how many numbers there are, where VECS is 1.
template <class L, int ROWS, int VECS, class A, class Y, class... Rest>
ATX_HD void add_weighted_columns(int rows, const A* s, int64_t s_row, int count, const Y& y, int d,
                                 const A* alpha, A* o, int64_t o_row, Rest... rest) {
  typename L::Float acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) acc[r][v] = L::all(0);
  const A* weight[ROWS];
  for (int r = 0; r < ROWS; ++r) weight[r] = s + (r < rows ? r : rows - 1) * s_row;
#pragma GCC unroll 2
  for (int n = 0; n < count; ++n) {
    const auto row = y(n) + d;
    typename L::Float x[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) x[v] = L::load(row + v * L::COUNT, rest...);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const typename L::Float w = L::all(weight[r][n]);
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) acc[r][v] += w * x[v];
    }
  }
  for (int r = 0; r < ROWS && r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      A* const at = o + r * o_row + d + v * L::COUNT;
      L::store(at, L::load(at) * (alpha ? alpha[r] : A(1)) + acc[r][v]);
    }
}

// Dimensions from d on, VECS vectors at a time, and the rest in ever fewer.
template <class L, int ROWS, int VECS, class A, class Y>
void add_weighted_from(int d, int rows, const A* s, int64_t s_row, int count, const Y& y, int width,
                       const A* alpha, A* o, int64_t o_row) {
  for (; d + VECS * L::COUNT <= width; d += VECS * L::COUNT)
    add_weighted_columns<L, ROWS, VECS>(rows, s, s_row, count, y, d, alpha, o, o_row);
  if constexpr (VECS > 1)
    add_weighted_from<L, ROWS, VECS / 2>(d, rows, s, s_row, count, y, width, alpha, o, o_row);
  else if (d < width)
    add_weighted_columns<L, ROWS, 1>(rows, s, s_row, count, y, d, alpha, o, o_row, width - d);
}

// Rows of o are whole vectors. alpha null: 1.
template <class L, int ROWS, class A, class Y>
void add_weighted(int rows, const A* s, int64_t s_row, int count, const Y& y, int width,
                  const A* alpha, A* o, int64_t o_row) {
  // As many accumulators as hide the latency of an addition, and half of the registers.
  constexpr int ACCUMULATORS = ATX_VEC_BYTES == 64 ? 16 : 8;
  constexpr int VECS = ROWS < ACCUMULATORS ? ACCUMULATORS / ROWS : 1;
  add_weighted_from<L, ROWS, VECS>(0, rows, s, s_row, count, y, width, alpha, o, o_row);
}

}  // namespace atx::ATX_TARGET
