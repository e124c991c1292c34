// The core's policies and conversions behind a C interface, for test_core.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#define ATX_TARGET test
#include <type_traits>

#include "csrc/core/lanes.h"
#include "csrc/core/numeric.h"
#include "csrc/core/score.h"

namespace {
using namespace atx;
using namespace atx::test;
using Lane = OneLane<double>;

template <class Score>
void materialize(const AttentionParams& p, int b, int h, const double* raw, uint8_t* keep,
                 double* logit) {
  const Score score(p, sequence(p, b), b, h);
  for (int i = 0; i < p.Sq; ++i)
    for (int j = 0; j < p.Sk; ++j) {
      const int64_t at = int64_t(i) * p.Sk + j;
      keep[at] = bool(score.template keep<Lane>(i, j, 1));
      logit[at] = score.template score<Lane>(raw[at], i, j, 1);
    }
}

// Keeps outside the range, then tiles called full that are not: 0 if the policy tells the truth
// about every tile.
template <class Score>
int untruths(const AttentionParams& p, int b, int h) {
  const Score score(p, sequence(p, b), b, h);
  int wrong = 0;
  for (int i0 = 0; i0 < p.Sq; ++i0)
    for (int i1 = i0 + 1; i1 <= p.Sq; ++i1) {
      const int begin = score.kv_begin(i0, i1), end = score.kv_end(i0, i1);
      wrong += begin < 0 || end > p.Sk;
      for (int j0 = 0; j0 < p.Sk; ++j0)
        for (int j1 = j0 + 1; j1 <= p.Sk + 1; ++j1) {
          const bool full = score.full(i0, i1, j0, j1);
          for (int i = i0; i < i1; ++i)
            for (int j = j0; j < j1; ++j) {
              const bool inside = j < p.Sk;
              const bool keep = inside && bool(score.template keep<Lane>(i, j, 1));
              wrong += keep && (j < begin || j >= end);
              wrong += full && !keep;
            }
        }
    }
  return wrong;
}

template <class F>
auto by_policy(int policy, F f) {
  if (policy == 0) return f(static_cast<Window<double>*>(nullptr));
  return f(static_cast<General<double>*>(nullptr));
}

AttentionParams params(int sq, int sk, int left, int right, int bottom_right) {
  AttentionParams p{};
  p.B = p.Hq = p.Hkv = 1;
  p.Sq = sq, p.Sk = sk;
  p.dtype = DType::f64;
  p.scale = 1;
  p.window_left = left < 0 ? NO_WINDOW : left;
  p.window_right = right < 0 ? NO_WINDOW : right;
  p.bottom_right = bottom_right;
  return p;
}
}  // namespace

extern "C" {
void core_materialize(int policy, int sq, int sk, int left, int right, int bottom_right,
                      double softcap, double slope, const void* mask, int mask_dtype,
                      const double* raw, uint8_t* keep, double* logit) {
  AttentionParams p = params(sq, sk, left, right, bottom_right);
  p.scale = 0.5;
  p.softcap = softcap;
  if (slope != 0) p.alibi_slopes = {&slope, 0, 0};
  if (mask) p.mask = {mask, DType(mask_dtype), 0, 0, sk, 1};
  by_policy(policy, [&](auto* s) {
    materialize<std::remove_pointer_t<decltype(s)>>(p, 0, 0, raw, keep, logit);
  });
}
int core_untruths(int policy, int sq, int sk, int left, int right, int bottom_right) {
  const AttentionParams p = params(sq, sk, left, right, bottom_right);
  return by_policy(policy,
                   [&](auto* s) { return untruths<std::remove_pointer_t<decltype(s)>>(p, 0, 0); });
}
void core_to_float(int is_bf16, int64_t n, const uint16_t* bits, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = is_bf16 ? to_float(bf16{bits[i]}) : to_float(f16{bits[i]});
}
void core_from_float(int is_bf16, int64_t n, const float* x, uint16_t* bits) {
  for (int64_t i = 0; i < n; ++i)
    bits[i] = is_bf16 ? from_float<bf16>(x[i]).bits : from_float<f16>(x[i]).bits;
}
}
