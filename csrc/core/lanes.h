// One lane: the vector width of a GPU thread and of scalar code. cpu/simd.h has the same interface
// in SIMD width.
#pragma once
#include <cmath>

#include "numeric.h"
#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

// bool with bitwise operators that stay bool, so that policies read the same for a bit and for a
// vector mask.
struct Bit {
  bool on;
  ATX_HD explicit operator bool() const { return on; }
  ATX_HD friend Bit operator&(Bit a, Bit b) { return {a.on && b.on}; }
  ATX_HD friend Bit operator~(Bit a) { return {!a.on}; }
};

template <class Accumulate>
struct OneLane {
  static constexpr int COUNT = 1;
  using Float = Accumulate;
  using Bool = Bit;
  using Position = int;
  using Word = uint32_t;

  ATX_HD static Float all(Float x) { return x; }
  ATX_HD static Float load(const Float* p, int) { return *p; }
  ATX_HD static Position positions(int j) { return j; }
  ATX_HD static Bool less(Position a, int b) { return {a < b}; }
  // Lane l is bit l.
  ATX_HD static Bool bits(uint32_t word) { return {(word & 1) != 0}; }
  // The halves of a 32 x 32-bit product.
  ATX_HD static void multiply_words(Word a, uint32_t m, Word* high, Word* low) {
    const uint64_t product = uint64_t(a) * m;
    *high = uint32_t(product >> 32), *low = uint32_t(product);
  }
  ATX_HD static Word words(Position x) { return Word(x); }
  ATX_HD static Position positions(Word w) { return Position(w); }
  ATX_HD static Float tanh(Float x) { return ::tanh(x); }
  ATX_HD static Float distance(int i, int j) { return Float(i < j ? j - i : i - j); }
  // −inf masks even a nan score: what is masked out must not leak.
  ATX_HD static Float add_bias(Float x, Float bias) {
    return bias == -Float(INFINITY) ? bias : x + bias;
  }
  ATX_HD static Bool load_bool(const Mask& m, int i, int j, int) {
    return {static_cast<const uint8_t*>(m.data)[int64_t(i) * m.row + int64_t(j) * m.col] != 0};
  }
  ATX_HD static Float load_float(const Mask& m, int i, int j, int) {
    const int64_t at = int64_t(i) * m.row + int64_t(j) * m.col;
    switch (m.dtype) {
      case DType::f64:
        return Float(static_cast<const double*>(m.data)[at]);
      case DType::f32:
        return Float(static_cast<const float*>(m.data)[at]);
      case DType::f16:
        return Float(to_float(static_cast<const f16*>(m.data)[at]));
      default:
        return Float(to_float(static_cast<const bf16*>(m.data)[at]));
    }
  }
};

}  // namespace atx::ATX_TARGET
