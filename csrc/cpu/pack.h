// Between tensors of any dtype and the arrays of the accumulation type that gemm.h multiplies.
// The dtype is known here and nowhere else: the kernel is compiled once per accumulation type.
#pragma once
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// Calls f with a pointer of the tensor's type. double accumulates f64, float the other three.
template <class A, class F>
ATX_HD void with_dtype(DType t, const void* data, F f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<const double*>(data));
  } else {
    if (t == DType::f32)
      f(static_cast<const float*>(data));
    else if (t == DType::f16)
      f(static_cast<const f16*>(data));
    else
      f(static_cast<const bf16*>(data));
  }
}
template <class A, class F>
ATX_HD void with_dtype(DType t, void* data, F f) {
  with_dtype<A>(t, static_cast<const void*>(data),
                [f]<class T>(const T* p) { f(const_cast<T*>(p)); });
}

// to [cols] = from, converted. Returns 0 in every lane if every number is finite (x · 0 is 0, of
// inf and nan it is nan).
template <class A, class T>
ATX_HD typename Lanes<A>::Float pack_row(const T* from, int cols, A* to) {
  using L = Lanes<A>;
  typename L::Float zero = {};
  int c = 0;
  for (; c + L::COUNT <= cols; c += L::COUNT) {
    const typename L::Float x = L::load(from + c);
    zero += x * 0;
    L::store(to + c, x);
  }
  if (c < cols) {
    const typename L::Float x = L::load(from + c, cols - c);
    zero += x * 0;
    L::store(to + c, x, cols - c);
  }
  return zero;
}

// to [rows, cols] = from, converted. Returns whether every number is finite.
template <class A, class T>
bool pack_rows(const T* from, int64_t row_stride, int rows, int cols, A* to) {
  typename Lanes<A>::Float zero = {};
  for (int r = 0; r < rows; ++r, from += row_stride, to += cols) zero += pack_row(from, cols, to);
  return Lanes<A>::sum(zero) == 0;
}

// The rows where they lie, if pack_rows would change nothing; else null.
template <class A, class T>
const A* as_packed(const T* from, int64_t row_stride, int cols) {
  if constexpr (sizeof(T) == sizeof(A)) return row_stride == cols ? from : nullptr;
  return nullptr;
}

// Whether n numbers are finite.
template <class A>
bool all_finite(const A* from, int64_t n) {
  using L = Lanes<A>;
  typename L::Float zero[4] = {};
  int64_t at = 0;
  for (; at + 4 * L::COUNT <= n; at += 4 * L::COUNT)
    for (int v = 0; v < 4; ++v) zero[v] += L::load(from + at + v * L::COUNT) * 0;
  for (; at < n; at += L::COUNT)
    zero[0] += L::load(from + at, n - at < L::COUNT ? int(n - at) : L::COUNT) * 0;
  return L::sum((zero[0] + zero[1]) + (zero[2] + zero[3])) == 0;
}

// Copies COUNT rows (the first n; zeros below them) into column block `to` [cols, width]: to[c][l]
// = rows[l][c].
template <class A, class T>
void pack_columns(const T* const* rows, int n, int cols, A* to, int width) {
  using L = Lanes<A>;
  for (int c = 0; c < cols; c += L::COUNT) {
    typename L::Float x[L::COUNT];
    for (int l = 0; l < L::COUNT; ++l) x[l] = l < n ? L::load(rows[l] + c, cols - c) : L::all(0);
    transpose<L>(x);
    for (int l = 0; l < L::COUNT && c + l < cols; ++l) L::store(to + int64_t(c + l) * width, x[l]);
  }
}

// The way back: rows[l][c] = from[c][l] · factor[l].
template <class A, class T>
void unpack_columns(const A* from, int width, typename Lanes<A>::Float factor, int n, int cols,
                    T* const* rows) {
  using L = Lanes<A>;
  for (int c = 0; c < cols; c += L::COUNT) {
    typename L::Float x[L::COUNT];
    for (int l = 0; l < L::COUNT; ++l)
      x[l] = c + l < cols ? L::load(from + int64_t(c + l) * width) * factor : L::all(0);
    transpose<L>(x);
    for (int l = 0; l < n; ++l) L::store(rows[l] + c, x[l], cols - c);
  }
}

}  // namespace atx::ATX_TARGET
