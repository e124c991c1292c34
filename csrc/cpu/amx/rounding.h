// How weights and dX of the backward lose their lower bits on the way to a tile: Rounded and
// pairs() for either type, and Unit, the power of two that f16 wants them multiplied by before.
#pragma once
#include <cmath>

#include "csrc/cpu/amx/softmax.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

// How 16 floats are rounded, and two such, x and y, become 16 pairs x, y: a row of a tile.
template <class T>
struct Rounded;
template <>
struct Rounded<bf16> {
  Bits upper;  // of each lane, the upper half

  Rounded() = default;
  // To the nearest, ties away from 0. A nan is left as it is: it may have all bits set.
  ATX_HD Rounded(Lanes<float>::Float x) {
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    upper = (Bits)_mm512_mask_add_epi32((__m512i)x, number, (__m512i)x, _mm512_set1_epi32(0x8000));
  }
  friend ATX_HD __m512i pairs(Rounded x, Rounded y) {
    return (__m512i)((y.upper & 0xffff0000) | x.upper >> 16);
  }
};
template <>
struct Rounded<f16> {
  Bits lower;  // of each lane, the lower half

  Rounded() = default;
  // Masked: g++ 12 warns of its own header otherwise.
  ATX_HD Rounded(Lanes<float>::Float x)
      : lower((Bits)_mm512_maskz_cvtepu16_epi32(
            0xffff, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT))) {}
  friend ATX_HD __m512i pairs(Rounded x, Rounded y) { return (__m512i)(y.lower << 16 | x.lower); }
};

// Powers of two that the weights and dX are multiplied by before they are rounded. bf16 has the
// range of float; f16 has full precision from 2^-14 to 2^15 only, so weights and dX are brought up
// to there, dX by what it can be at most.
template <class T>
struct Unit {
  static constexpr bool ONE = true;
  static float for_bound(float) { return 1; }
};
template <>
struct Unit<f16> {
  static constexpr bool ONE = false;
  // Multiples of 2^STEP, so that it seldom changes from one tile to the next. LARGEST: sums are
  // converted from one unit to another, and stay finite.
  static constexpr int TOP = 15, STEP = 4, LARGEST = 40;
  static float for_bound(float bound) {
    int exponent = 0;
    ::frexp(bound, &exponent);  // bound <= 2^exponent
    const int free = (TOP - exponent) & -STEP;
    return ::ldexp(1.0f, free > LARGEST ? LARGEST : free < -LARGEST ? -LARGEST : free);
  }
};

}  // namespace atx::ATX_TARGET
