// Dropout: whether a weight (b, h, i, j) is dropped is a hash of its place and of the seed alone,
// so forward and backward, every target and every tiling drop the same ones, and nothing is stored.
// The hash is Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3");
// its counter is {call, i, h, b}, its key the seed. The eight 16-bit halves of a call's words serve
// eight keys, 8 apart: key 64 m + 8 n + c has half n of call 8 m + c. So neighboring keys are
// neighboring calls, as SIMD lanes want it, and a GPU lane's keys 8 n + c of a row share a call.
#pragma once
#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

template <class L>
struct Words {
  typename L::Word w0, w1, w2, w3;
};

// Four random words of a counter, in each lane of L (lanes.h). A recursion, because a loop's round
// keys would be computed anew for every counter.
template <class L, int ROUNDS = 10>
ATX_HD Words<L> philox(const Words<L>& counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57;
  constexpr uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
  typename L::Word high0, low0, high1, low1;
  L::multiply_words(counter.w0, MULTIPLIER_0, &high0, &low0);
  L::multiply_words(counter.w2, MULTIPLIER_1, &high1, &low1);
  const Words<L> next = {high1 ^ counter.w1 ^ key0, low1, high0 ^ counter.w3 ^ key1, low0};
  if constexpr (ROUNDS == 1)
    return next;
  else
    return philox<L, ROUNDS - 1>(next, key0 + WEYL_0, key1 + WEYL_1);
}

// Keys that the calls of a counter's block serve, and how many calls that takes.
constexpr int DROPOUT_BLOCK = 64, DROPOUT_CALLS = 8;

// Half n of a call: of its word n / 2, the low half first.
template <class L>
ATX_HD typename L::Position random_half(typename L::Position word, int n) {
  return (n % 2 ? word >> 16 : word) & 0xffff;
}

// Of one batch entry, where p.dropout > 0.
template <class A>
struct Dropout {
  uint32_t key0, key1, batch;
  int last_dropped;  // a weight whose half is not greater is dropped
  A kept;            // what the others are multiplied by, 1 over their share

  ATX_HD Dropout(const AttentionParams& p, int b) {
    const uint64_t seed = uint64_t(*p.seed);
    key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    batch = uint32_t(p.first_batch + b * p.batch_step);
    const int dropped = halves_dropped(p);
    last_dropped = dropped - 1;
    kept = dropped < HALVES ? A(double(HALVES) / (HALVES - dropped)) : A(0);
  }
  // The words of calls. In a vector of lanes, call, i and h may differ from lane to lane.
  template <class L>
  ATX_HD void draw(typename L::Position call, typename L::Position i, typename L::Position h,
                   typename L::Position (&words)[4]) const {
    const typename L::Position b = typename L::Position{} + int(batch);
    const Words<L> drawn =
        philox<L>({L::words(call), L::words(i), L::words(h), L::words(b)}, key0, key1);
    words[0] = L::positions(drawn.w0), words[1] = L::positions(drawn.w1);
    words[2] = L::positions(drawn.w2), words[3] = L::positions(drawn.w3);
  }

 private:
  static constexpr int HALVES = 1 << 16;  // values of a half
  // p in as many steps: what really is the share of dropped weights.
  static ATX_HD int halves_dropped(const AttentionParams& p) {
    return int(p.dropout * HALVES + 0.5);
  }
};

// What the weights that dropout keeps are multiplied by; 1 without dropout.
template <class A>
ATX_HD A kept_factor(const AttentionParams& p) {
  return p.dropout > 0 ? Dropout<A>(p, 0).kept : A(1);
}

}  // namespace atx::ATX_TARGET
