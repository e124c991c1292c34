// 16-bit floating-point formats: storage types and exact scalar conversions, round to nearest even.
// Vector conversions belong to the targets (cpu/simd.h, simt::pack2); these are their scalar
// definition. And f32 numbers that tensor cores multiply.
#pragma once
#include <cstdint>
#include <cstring>

#include "target.h"

namespace atx {
struct bf16 {
  uint16_t bits;  // sign 1, exponent 8, fraction 7
};
struct f16 {
  uint16_t bits;  // sign 1, exponent 5, fraction 10
};
struct tf32 {
  uint32_t bits;  // an f32, of which products see 19: sign 1, exponent 8, fraction 10
};
}  // namespace atx

namespace atx::ATX_TARGET {

template <class To, class From>
ATX_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

ATX_HD double to_float(double x) { return x; }
ATX_HD float to_float(float x) { return x; }
ATX_HD float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
ATX_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;  // its name is in cuda_fp16.h, half a second of a file's time
  __asm__("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shift the 15 value bits to float's places, then scale by 2^112: 127 - 15, the exponents'
  // biases. Subnormals become right by the same product; only inf and nan (exponent 31) need their
  // exponent set.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t value = uint32_t(x.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(value) * bit_cast<float>(uint32_t(127 + 112) << 23);
  const uint32_t bits =
      (x.bits & 0x7c00u) == 0x7c00u ? (value | 0x7f800000u) : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
#endif
}
ATX_HD float to_float(tf32 x) { return bit_cast<float>(x.bits); }

template <class T>
ATX_HD T from_float(float x);
template <>
ATX_HD float from_float<float>(float x) {
  return x;
}
template <>
ATX_HD double from_float<double>(float x) {
  return x;
}
template <>
ATX_HD tf32 from_float<tf32>(float x) {
  return {bit_cast<uint32_t>(x)};
}
// To 10 bits of fraction, to nearest, ties away from 0: as an operand, no bit of it is ignored.
ATX_HD float rounded_to_tf32(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return bit_cast<float>(u | 0x400000u);  // keep nan a nan, where it is seen
  return bit_cast<float>((u + 0x1000u) & 0xffffe000u);
}
template <>
ATX_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};  // keep nan a nan
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
ATX_HD f16 from_float<f16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00u | ((a >> 13) & 0x3ffu))};
  if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to inf
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the fraction to 2^-24, f16's subnormal
                          // unit, and rounds
    const float shifted = bit_cast<float>(a) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u) - (112u << 23);
  return {uint16_t(sign | (rounded >> 13))};
}

}  // namespace atx::ATX_TARGET
