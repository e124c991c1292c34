// Bits of a word, on every target.
#pragma once
#include <cstdint>

#include "target.h"

namespace atx::ATX_TARGET {

// Positions of the lowest and of the highest bit set, of a word that has one.
ATX_HD int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}
ATX_HD int highest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(int(word));
#else
  return 31 - __builtin_clz(word);
#endif
}
ATX_HD int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  word -= word >> 1 & 0x55555555;
  word = (word & 0x33333333) + (word >> 2 & 0x33333333);
  return int(((word + (word >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24);
#endif
}

}  // namespace atx::ATX_TARGET
