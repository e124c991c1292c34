// The two products of attention on a panel of queries, with the queries in the SIMD lanes:
//   scores      Sᵀ = K Qᵀ              [keys, queries] from k [keys, D] and qᵀ [D, queries]
//   accumulate  Oᵀ = Oᵀ·alpha + Vᵀ Pᵀ  [Dv, queries]   from v [keys, Dv] and pᵀ [keys, queries]
// Both read their query side in vectors and broadcast the other, so k and v are used as they lie in
// memory, pᵀ needs no shuffle between the products, and every statistic of a row is a vertical
// operation (softmax.h). A strip of ROWS x VECS accumulators stays in registers over the whole
// depth; the query panel (D x PANEL numbers) stays in L1 while k and v stream past it at one number
// per VECS multiplications.
#pragma once
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

// A strip needs STRIP_ROWS * PANEL_VECS accumulators, PANEL_VECS vectors of queries and one
// broadcast number: 15 of 16 registers, or 29 of 32. As fast on AVX2 as 4 x 3; on AVX-512 1.02x of
// 8 x 3 and 1.03x of 12 x 2 (D 64 and 128, S 2048).
constexpr int STRIP_ROWS = 6;
#if ATX_VEC_BYTES == 64 || defined(__aarch64__)
constexpr int PANEL_VECS = 4;
#else
constexpr int PANEL_VECS = 2;
#endif

// Sums of products end after so many dimensions (Gemm::scores). Only f32 needs it: in f64 no one
// sees it, and 16-bit inputs are rounded much coarser. On 16 registers an end costs a strip some 25
// cycles, 12 accumulators going to memory to be added there (Zen 3, rates of one run: D 64 98 in
// one sum, 90 in 32s, 86 in 24s). Strips of 3 rows and two sums in registers load more: D 128 1.02x
// while the machine's other thread was idle, 0.84x while it was at work.
inline int sum_run(DType dtype, int depth) {
  return dtype != DType::f32 ? depth : depth >= 128 ? 32 : 24;
}

// acc += A B, A [ROWS, depth] broadcast number by number, B [depth, VECS vectors] with rows b_row
// apart.
template <class L, int ROWS, int VECS, class A, class T>
ATX_HD void multiply_add(typename L::Float (&acc)[ROWS][VECS], const A* a, int64_t a_row,
                         const T* b) {
  typename L::Float x[VECS];
#pragma GCC unroll 16
  for (int v = 0; v < VECS; ++v) x[v] = L::load(b + v * L::COUNT);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const typename L::Float y = L::all(a[r * a_row]);
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) acc[r][v] += y * x[v];
  }
}
template <class L, int ROWS, int VECS, class A, class T>
ATX_HD void multiply_add(typename L::Float (&acc)[ROWS][VECS], int depth, const A* a, int64_t a_row,
                         int64_t a_col, const T* b, int64_t b_row) {
#pragma GCC unroll 4
  for (int d = 0; d < depth; ++d) multiply_add<L>(acc, a + d * a_col, a_row, b + d * b_row);
}

template <class Float, int ROWS, int VECS>
ATX_HD void clear(Float (&acc)[ROWS][VECS]) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) acc[r][v] = Float{};
}
// acc = A B
template <class L, int ROWS, int VECS, class A, class T>
ATX_HD void multiply(typename L::Float (&acc)[ROWS][VECS], int depth, const A* a, int64_t a_row,
                     int64_t a_col, const T* b, int64_t b_row) {
  clear(acc);
  multiply_add<L>(acc, depth, a, a_row, a_col, b, b_row);
}

template <int ROWS, class F>
ATX_HD void rest_of_strips(int row, int n, F& f) {
  if constexpr (ROWS > 0) {
    if (n == ROWS) return f.template operator()<ROWS>(row);
    rest_of_strips<ROWS - 1>(row, n, f);
  }
}
// Calls f with every strip of STRIP_ROWS of n rows, and with the rest as a strip of its size.
// What f captures by value no store can change: by reference the forward took 1.02x as long.
template <class F>
ATX_HD void by_strips(int n, F f) {
  int r = 0;
  for (; r + STRIP_ROWS <= n; r += STRIP_ROWS) f.template operator()<STRIP_ROWS>(r);
  rest_of_strips<STRIP_ROWS - 1>(r, n - r, f);
}

struct NoFetch {
  ATX_HD void operator()(int, int) const {}
};

template <class A, int VECS>
struct Gemm {
  using L = Lanes<A>;
  using Float = typename L::Float;
  static constexpr int WIDTH = VECS * L::COUNT;  // queries of the panel

  // s [keys, WIDTH] = k [keys, D] qt [D, WIDTH], summed in runs of `run` dimensions. The rounding
  // error of a sum grows with its length, and in float this one decides the error of the output,
  // through the rows where one key has most of the weight. Largest and rms error of 16 draws (8
  // heads, S 1024, D 64 and 128): 4.2e-7 and 1.53e-8 with runs of 32, 3.5e-7 and 1.48e-8 with 24,
  // 4.1e-7 and 1.47e-8 with 22, 3.8e-7 and 1.45e-8 with 16; 16 further draws with 24: 3.1e-7. At D
  // 128 alone 32 are as good: 2.4e-7 and 1.50e-8 in 8 draws, 3.5e-7 and 1.49e-8 with 24; the
  // largest of 192 heads is 4.1e-7. On AVX-512 runs of 24 cost 1 to 2 %, runs of 16 2 to 3 %.
  // fetch(j, n): called ahead of the strip of keys j ... j + n - 1, to ask for what is needed
  // later.
  template <class Fetch = NoFetch>
  static void scores(int keys, int depth, int run, const A* k, const A* qt, A* s,
                     const Fetch& fetch = {}) {
    by_strips(keys, [=]<int ROWS>(int j) {
      fetch(j, ROWS);
      score_strip<ROWS>(depth, run, k + int64_t(j) * depth, qt, s + j * WIDTH);
    });
  }

  // ot [Dv, WIDTH] = ot * alpha [WIDTH] + v [keys, Dv]ᵀ pt [keys, WIDTH]
  // The tile's sum is formed on its own and then added, again for the error: over 1024 keys one
  // long sum alone has 4e-7, tiles of 128 have 1e-7 to 2e-7.
  static void accumulate(int keys, int dv, const A* v, const A* pt, const A* alpha, A* ot) {
    by_strips(dv, [=]<int ROWS>(int d) {
      value_strip<ROWS>(keys, dv, v + d, pt, alpha, ot + d * WIDTH);
    });
  }

 private:
  template <int ROWS>
  static void score_strip(int depth, int run, const A* k, const A* qt, A* s) {
    for (int d = 0; d < depth; d += run) {
      const int n = depth - d < run ? depth - d : run;
      Float acc[ROWS][VECS];
      multiply<L>(acc, n, k + d, depth, 1, qt + d * WIDTH, WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) {
          A* const at = s + (r * VECS + v) * L::COUNT;
          L::store(at, d ? L::load(at) + acc[r][v] : acc[r][v]);
        }
    }
  }
  template <int ROWS>
  static void value_strip(int keys, int dv, const A* value, const A* pt, const A* alpha, A* ot) {
    Float acc[ROWS][VECS];
    multiply<L>(acc, keys, value, 1, dv, pt, WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        A* const at = ot + (r * VECS + v) * L::COUNT;
        L::store(at, L::load(at) * L::load(alpha + v * L::COUNT) + acc[r][v]);
      }
  }
};

}  // namespace atx::ATX_TARGET
