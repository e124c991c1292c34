// A SIMD register of keys, with the interface of core/lanes.h's OneLane: score policies run
// unchanged in either width. Plus what the kernels need around it: load and store with conversion,
// exp2, tanh, reductions. Written in GCC vector extensions, so that one text serves SSE2, AVX2,
// AVX-512 and NEON; an intrinsic only where the compiler finds no single instruction for it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if ATX_VEC_BYTES >= 32
#include <immintrin.h>
#endif

#include "csrc/core/numeric.h"
#include "csrc/core/params.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

// What depends on the width of a number: the integer of the same size, and the constants of exp2.
template <class A>
struct Number;
template <>
struct Number<float> {
  using Integer = int32_t;
  static constexpr int FRACTION_BITS = 23, BIAS = 127;
  // (2^f - 1) / f on [-1/2, 1/2], minimax: 1 + f Q(f) has a relative error of 9.1e-8.
  static constexpr float EXP2[] = {0x1.62e430p-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f,
                                   0x1.5bba14p-10f};
};
template <>
struct Number<double> {
  using Integer = int64_t;
  static constexpr int FRACTION_BITS = 52, BIAS = 1023;
  // The Taylor series, ln(2)^k / k!: the first term left out is below 2e-17.
  static constexpr double EXP2[] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e77p-7,
      0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
      0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
      0x1.816193166d0f9p-40};
};

template <class A>
struct Lanes {
  using Scalar = A;
  static constexpr int COUNT = ATX_VEC_BYTES / int(sizeof(A));
  typedef A Float __attribute__((vector_size(ATX_VEC_BYTES)));
  typedef typename Number<A>::Integer Integer __attribute__((vector_size(ATX_VEC_BYTES)));
  typedef uint16_t Narrow
      __attribute__((vector_size(ATX_VEC_BYTES / 2)));  // the bits of COUNT 16-bit floats
  using Position = Integer;
  struct Bool {
    Integer lanes;  // all bits set where true
    friend ATX_HD Bool operator&(Bool a, Bool b) { return {a.lanes & b.lanes}; }
    friend ATX_HD Bool operator~(Bool a) { return {~a.lanes}; }
  };

  // 32 random bits per lane (core/dropout.h), with any bits above them in a lane of 64: the factors
  // and products of multiply_words need no packing. Lanes of float are dealt to two vectors.
  typedef uint64_t Wide __attribute__((vector_size(ATX_VEC_BYTES)));
  struct Word {
    Wide even, odd;
    friend ATX_HD Word operator^(Word a, Word b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
    friend ATX_HD Word operator^(Word a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }
  };

  static ATX_HD Float load(const A* p) {
    Float x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static ATX_HD void store(A* p, Float x) { memcpy(p, &x, sizeof x); }
  // Any other type converts number by number, but for the 16-bit ones to and from float.
  template <class T>
  static ATX_HD Float load(const T* p) {
    Float x = {};
    for (int l = 0; l < COUNT; ++l) x[l] = A(to_float(p[l]));
    return x;
  }
  template <class T>
  static ATX_HD void store(T* p, Float x) {
    for (int l = 0; l < COUNT; ++l) p[l] = from_float<T>(float(x[l]));
  }
  static ATX_HD Float load(const bf16* p)
    requires(sizeof(A) == 4)
  {
    return (Float)(widen(p) << 16);
  }
  static ATX_HD Float load(const f16* p)
    requires(sizeof(A) == 4)
  {
#if ATX_VEC_BYTES == 64
    return (Float)_mm512_maskz_cvtph_ps(ALL_LANES,
                                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif ATX_VEC_BYTES == 32
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // As to_float(f16), lane by lane.
    const Integer x = widen(p), value = (x & 0x7fff) << 13;
    const Integer scaled = (Integer)((Float)value * 0x1p112f);
    return (Float)(((x & 0x7c00) == 0x7c00 ? value | 0x7f800000 : scaled) | (x & 0x8000) << 16);
#endif
  }
  static ATX_HD void store(bf16* p, Float x)
    requires(sizeof(A) == 4)
  {
    // As from_float<bf16>, lane by lane.
    const Integer u = (Integer)x, rounded = u + 0x7fff + ((u >> 16) & 1);
    const Integer bits = ((u & 0x7fffffff) > 0x7f800000 ? u | 0x400000 : rounded) >> 16;
    const Narrow narrow = __builtin_convertvector(bits, Narrow);
    memcpy(p, &narrow, sizeof narrow);
  }
#if ATX_VEC_BYTES >= 32
  static ATX_HD void store(f16* p, Float x)
    requires(sizeof(A) == 4)
  {
#if ATX_VEC_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(ALL_LANES, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  }
#endif

  // The first n numbers at p, then zeros; touches nothing beyond them.
  template <class T>
  static ATX_HD Float load(const T* p, int n) {
    if (n >= COUNT) return load(p);
    T part[COUNT] = {};
    for (int l = 0; l < n; ++l) part[l] = p[l];
    return load(part);
  }
  template <class T>
  static ATX_HD void store(T* p, Float x, int n) {
    if (n >= COUNT) return store(p, x);
    T part[COUNT];
    store(part, x);
    for (int l = 0; l < n; ++l) p[l] = part[l];
  }
  static ATX_HD Float all(A x) { return x - Float{}; }

  static ATX_HD Float select(Bool where, Float x, Float otherwise) {
    return where.lanes ? x : otherwise;
  }
  // A bit per lane, lane 0 the lowest, set where a > b.
  static ATX_HD uint32_t greater_bits(Position a, int b) {
#if ATX_VEC_BYTES == 64
    if constexpr (sizeof(A) == 4)
      return _mm512_cmpgt_epi32_mask((__m512i)a, _mm512_set1_epi32(b));
    else
      return _mm512_cmpgt_epi64_mask((__m512i)a, _mm512_set1_epi64(b));
#elif ATX_VEC_BYTES == 32
    if constexpr (sizeof(A) == 4)
      return uint32_t(_mm256_movemask_ps((__m256)(a > b)));
    else
      return uint32_t(_mm256_movemask_pd((__m256d)(a > b)));
#else
    uint32_t bits = 0;
    for (int l = 0; l < COUNT; ++l) bits |= uint32_t(a[l] > b) << l;
    return bits;
#endif
  }
  // x where the lane's bit is set, else 0.
  static ATX_HD Float where_set(uint32_t bits, Float x) {
#if ATX_VEC_BYTES == 64
    if constexpr (sizeof(A) == 4)
      return (Float)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)x);
    else
      return (Float)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)x);
#else
    Integer of_lane;
    for (int l = 0; l < COUNT; ++l) of_lane[l] = 1 << l;
    return (Float)((Integer)x & ((of_lane & bits) == of_lane));
#endif
  }
  // a > b ? a : b, so b where either is nan. g++ 12 finds the instruction for some of these
  // comparisons and spends four on others (exp2's clamp: causal D 64 on AVX2 1.02x).
  static ATX_HD Float larger(Float a, Float b) {
#if ATX_VEC_BYTES == 64
    if constexpr (sizeof(A) == 4)
      return (Float)_mm512_maskz_max_ps(ALL_LANES, (__m512)a, (__m512)b);
    else
      return (Float)_mm512_maskz_max_pd(ALL_LANES, (__m512d)a, (__m512d)b);
#elif ATX_VEC_BYTES == 32
    if constexpr (sizeof(A) == 4)
      return (Float)_mm256_max_ps((__m256)a, (__m256)b);
    else
      return (Float)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return a > b ? a : b;
#endif
  }
  // A nan in x is passed over: the running maximum of a row stays a number.
  static ATX_HD Float max(Float m, Float x) { return larger(x, m); }
  static ATX_HD A max(Float x) {
#pragma GCC unroll 4
    for (int step = COUNT / 2; step > 0; step /= 2) x = larger(x, rotate(x, step));
    return x[0];
  }
  static ATX_HD A sum(Float x) {
#pragma GCC unroll 4
    for (int step = COUNT / 2; step > 0; step /= 2) x += rotate(x, step);
    return x[0];
  }

  // 2^x for x <= 1/2; exactly 0 from -BIAS - 1/2 down (no subnormals: they would be slow to
  // multiply with), exactly 1 at 0, nan for nan.
  static ATX_HD Float exp2(Float x) {
    const Split s = split(x);
    return s.power + s.power * (s.fraction * s.series);
  }
  // 2^x - 1 for x >= 0 without cancellation near 0.
  static ATX_HD Float exp2_minus_1(Float x) {
    const Split s = split(x);
    return s.power * (s.fraction * s.series) + (s.power - 1);
  }
  // log2 x for x > 0 that is not subnormal; nan for nan. x = 2^e f with f in [√½, √2), and
  // ln f = 2 artanh((f - 1) / (f + 1)), whose series is short: its argument is 0.172 at most.
  static ATX_HD Float log2(Float x) {
    constexpr A SQRT_HALF = A(0.70710678118654752), TWO_LOG2_E = A(2 * 1.4426950408889634);
    constexpr int TERMS = sizeof(A) == 4 ? 5 : 11;  // the first left out: below 2e-9, 1e-18
    const Integer e = ((Integer)x - (Integer)all(SQRT_HALF)) >> Number<A>::FRACTION_BITS;
    const Float f = (Float)((Integer)x - (e << Number<A>::FRACTION_BITS));
    const Float y = (f - 1) / (f + 1), square = y * y;
    Float series = all(A(1) / (2 * TERMS - 1));
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; --k) series = series * square + A(1) / (2 * k + 1);
    return __builtin_convertvector(e, Float) + y * series * TWO_LOG2_E + x * 0;
  }
  // tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1; beyond 22 it is 1 in either precision.
  static ATX_HD Float tanh(Float x) {
    const Float a = x < 0 ? -x : x;
    const Float e = exp2_minus_1((a > 22 ? all(22) : a) * A(2 * 1.4426950408889634));
    const Float t = e / (e + 2);
    return x < 0 ? -t : t;
  }

  static ATX_HD void multiply_words(Word a, uint32_t m, Word* high, Word* low) {
    *low = {multiply_low_halves(a.even, m), multiply_low_halves(a.odd, m)};
    *high = {low->even >> 32, low->odd >> 32};
  }
  static ATX_HD Word words(Position x) { return {(Wide)x, (Wide)x >> 32}; }
  static ATX_HD Position positions(Word w) {
    if constexpr (sizeof(A) == sizeof(uint64_t)) return (Integer)w.even & 0xffffffff;
    Integer dealt;
    for (int l = 0; l < COUNT; ++l) dealt[l] = l / 2 * 2 + l % 2 * COUNT;
    return __builtin_shuffle((Integer)w.even, (Integer)w.odd, dealt);
  }

  static ATX_HD Position positions(int j) {
    Integer lane;
    for (int l = 0; l < COUNT; ++l) lane[l] = l;
    return lane + j;
  }
  static ATX_HD Bool less(Position a, int b) { return {a < b}; }
  static ATX_HD Bool greater(Position a, int b) { return {a > b}; }
  // Lane l is bit l.
  static ATX_HD Bool bits(uint32_t word) {
    Integer bit;
    for (int l = 0; l < COUNT; ++l) bit[l] = 1 << l;
    return {(bit & typename Number<A>::Integer(word)) != 0};
  }
  static ATX_HD Float distance(int i, int j) {
    const Integer d = positions(j) - i;
    return __builtin_convertvector(d < 0 ? -d : d, Float);
  }
  // −inf masks even a nan score: what is masked out must not leak.
  static ATX_HD Float add_bias(Float x, Float bias) {
    return bias == -A(INFINITY) ? bias : x + bias;
  }
  static ATX_HD Bool load_bool(const Mask& m, int i, int j, int n) {
    const uint8_t* at =
        static_cast<const uint8_t*>(m.data) + int64_t(i) * m.row + int64_t(j) * m.col;
    if (n >= COUNT && m.col == 1) return load_bool(at);
    Integer x = {};
    for (int l = 0; l < COUNT && l < n; ++l) x[l] = at[l * m.col];
    return {x != 0};
  }
  static ATX_HD Bool load_bool(const uint8_t* p) {
    typedef uint8_t Bytes __attribute__((vector_size(COUNT)));
    Bytes x;
    memcpy(&x, p, sizeof x);
    return {__builtin_convertvector(x, Integer) != 0};
  }
  static ATX_HD Float load_float(const Mask& m, int i, int j, int n) {
    const int64_t at = int64_t(i) * m.row + int64_t(j) * m.col;
    switch (m.dtype) {
      case DType::f64:
        return load_strided(static_cast<const double*>(m.data) + at, m.col, n);
      case DType::f32:
        return load_strided(static_cast<const float*>(m.data) + at, m.col, n);
      case DType::f16:
        return load_strided(static_cast<const f16*>(m.data) + at, m.col, n);
      default:
        return load_strided(static_cast<const bf16*>(m.data) + at, m.col, n);
    }
  }

 private:
  static ATX_HD Float rotate(Float x, int by) {
    Integer from;
    for (int l = 0; l < COUNT; ++l) from[l] = (l + by) % COUNT;
    return __builtin_shuffle(x, from);
  }
  // Zero-masking with a full mask: g++ 12 warns of its own header where it is left out.
  static constexpr int ALL_LANES = (1 << COUNT) - 1;
  template <class T>
  static ATX_HD Integer widen(const T* p) {
#if ATX_VEC_BYTES == 64
    return (Integer)_mm512_maskz_cvtepu16_epi32(
        ALL_LANES, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif ATX_VEC_BYTES == 32
    // g++ 12 makes four instructions of the conversion.
    return (Integer)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Narrow narrow;
    memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, Integer);
#endif
  }
  struct Split {
    Float power, fraction, series;  // 2^x = power * (1 + fraction * series)
  };
  static ATX_HD Split split(Float x) {
    constexpr A HALF_ULP =
        A(int64_t(3) << (Number<A>::FRACTION_BITS - 1));  // adding it rounds to an integer
    constexpr A MAGIC =
        HALF_ULP + Number<A>::BIAS;  // ... and leaves the biased exponent in the low bits
    const Float clamped = larger(all(-Number<A>::BIAS), x);
    const Float shifted = clamped + MAGIC;
    const Float fraction = clamped - (shifted - MAGIC);
    constexpr int TERMS = sizeof(Number<A>::EXP2) / sizeof(A);
    Float series = all(Number<A>::EXP2[TERMS - 1]);
    for (int k = TERMS - 2; k >= 0; --k) series = series * fraction + Number<A>::EXP2[k];
    return {(Float)((Integer)shifted << Number<A>::FRACTION_BITS), fraction, series};
  }
  static ATX_HD Wide multiply_low_halves(Wide a, uint32_t m) {
#if ATX_VEC_BYTES == 64
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi32(int(m)));
#elif ATX_VEC_BYTES == 32
    return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int(m)));
#else
    return (a & 0xffffffff) * m;
#endif
  }
  template <class T>
  static ATX_HD Float load_strided(const T* p, int64_t step, int n) {
    if (step == 1) return load(p, n);
    T part[COUNT] = {};
    for (int l = 0; l < COUNT && l < n; ++l) part[l] = p[l * step];
    return load(part);
  }
};

}  // namespace atx::ATX_TARGET
