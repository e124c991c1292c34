// Online softmax of 16 queries, one per lane: s [keys, 16] f32 becomes weights in its place. A
// weight is stored as the sum of two 16-bit numbers, for rounding it to one, with the rounded
// maxima below, showed in the output (bf16, S 1024: errors of up to 1.5e-3; in two parts the error
// is half a unit of the output). Each 32 scores of two keys become 16 pairs of upper parts and 16
// pairs of lower parts, rows of two B tiles.
//   2^x = 2^floor(x) · series(x - floor(x)), three instructions and the series'. This is where the
// time goes: 13 vector instructions per 16 weights.
#pragma once
#include <cmath>

#include "csrc/cpu/amx/tiles.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

typedef uint32_t Bits __attribute__((vector_size(64)));

// 2^f on [0, 1], minimax: relative error 2.6e-6.
constexpr float EXP2_SERIES[] = {0x1.00002cp+0f, 0x1.62d166p-1f, 0x1.ee798ap-3f, 0x1.aa13f0p-5f,
                                 0x1.bb7cd4p-7f};

// How a float weight is cut into numbers of 16 bits. UNIT: what the float weights are measured in,
// STORED: what their parts are multiplied with.
template <class T>
struct Weight;

template <>
struct Weight<bf16> {
  static constexpr float UNIT = 1, STORED = 1;
  static constexpr uint32_t UPPER_PART = 0xffff0000;
  // The upper halves of x and y, side by side.
  static ATX_HD __m512i pairs(__m512 x, __m512 y) {
    return (__m512i)(((Bits)y & 0xffff0000) | (Bits)x >> 16);
  }
};

// f16 keeps its precision down to 2^-14 only, so weights are stored times 2^11 (SLACK makes that
// 2^15, the most it holds), and 2^-112 times that in float: then float's exponent field holds
// f16's, and shifting makes one of the other.
template <>
struct Weight<f16> {
  static constexpr float UNIT = 0x1p-101f, STORED = 0x1p11f;
  static constexpr uint32_t UPPER_PART = 0xffffe000;
  static ATX_HD __m512i pairs(__m512 x, __m512 y) {
    return (__m512i)(((Bits)y << 3 & 0xffff0000) | (Bits)x >> 13);
  }
};

// UNIT · 2^x
template <class T>
ATX_HD __m512 exp2_weight(__m512 x) {
  constexpr int TERMS = sizeof EXP2_SERIES / sizeof EXP2_SERIES[0];
  const auto term = [](int n) { return _mm512_set1_ps(EXP2_SERIES[n] * Weight<T>::UNIT); };
  const __m512 f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);
  __m512 series = term(TERMS - 1);
#pragma GCC unroll 8
  for (int n = TERMS - 2; n >= 0; --n) series = _mm512_fmadd_ps(series, f, term(n));
  return _mm512_maskz_scalef_ps(0xffff, series, x);
}

// A row's maximum follows the scores once they exceed it by more than this, in powers of two: after
// the first tiles of keys hardly ever, and then nothing needs to shrink. It is a whole number, so
// that shrinking is exact.
constexpr float SLACK = 4;

// s, in `unit` powers of two, to weights; keys is a multiple of 8. Updates the running maximum and
// sum; the sums so far shrink by alpha: returns whether any does. A row without a kept key so far
// has the maximum -inf; it is measured from 0, for -inf - -inf is nan.
template <class T>
bool weigh(int keys, float unit, float* s, float* row_max, float* row_sum, float* alpha) {
  using L = Lanes<float>;
  using Float = L::Float;
  constexpr int CHAINS = 4;  // independent maxima and sums, to hide the latency of one
  Float top[CHAINS];
  for (Float& t : top) t = L::all(-INFINITY);
  for (int j = 0; j < keys; j += CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) top[c] = L::max(top[c], L::load(s + (j + c) * L::COUNT));

  const Float m_old = L::load(row_max);
  const Float tile_max = L::max(L::max(top[0], top[1]), L::max(top[2], top[3])) * unit;
  const Float whole = (Float)_mm512_maskz_roundscale_ps(0xffff, (__m512)tile_max, _MM_FROUND_CEIL);
  const Float m = tile_max > m_old + SLACK ? whole : m_old;
  const Float origin = m == -INFINITY ? L::all(0) : m;

  const auto weight = [&](int j) {
    return exp2_weight<T>((__m512)(L::load(s + j * L::COUNT) * unit - origin));
  };
  const auto upper = [](__m512 x) { return (__m512)((Bits)x & Weight<T>::UPPER_PART); };
  __m512 sum[CHAINS];
  for (__m512& x : sum) x = _mm512_setzero_ps();
  for (int j = 0; j < keys; j += CHAINS)
#pragma GCC unroll 2
    for (int c = 0; c < CHAINS; c += 2) {
      const __m512 x = weight(j + c), y = weight(j + c + 1);
      sum[c] += x;
      sum[c + 1] += y;
      float* const to = s + (j + c) * L::COUNT;
      _mm512_store_si512(to, Weight<T>::pairs(x, y));
      _mm512_store_si512(to + L::COUNT, Weight<T>::pairs(x - upper(x), y - upper(y)));
    }

  const Float shrink = L::exp2(m_old - origin);
  L::store(alpha, shrink);
  L::store(row_max, m);
  L::store(row_sum, L::load(row_sum) * shrink + (Float)((sum[0] + sum[1]) + (sum[2] + sum[3])));
  return _mm512_cmp_ps_mask((__m512)m, (__m512)m_old, _CMP_NEQ_UQ) != 0;
}

}  // namespace atx::ATX_TARGET
