// Dropout: whether a weight (b, h, i, j) is dropped is a hash of its place and of the seed alone,
// so forward and backward, every target and every tiling drop the same ones, and nothing is stored.
// The hash is Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"):
// one call gives the words of four neighboring keys. Its counter is {j / 4, i, h, b}, its key the
// seed, and word j % 4 belongs to key j.
#pragma once
#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

// counter becomes four random words, in each lane of L (lanes.h).
template <class L>
ATX_HD void philox(typename L::Word (&counter)[4], uint32_t key0, uint32_t key1) {
  constexpr uint32_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57;
  constexpr uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    typename L::Word high0, low0, high1, low1;
    L::multiply_words(counter[0], MULTIPLIER_0, &high0, &low0);
    L::multiply_words(counter[2], MULTIPLIER_1, &high1, &low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += WEYL_0, key1 += WEYL_1;
  }
}

// Of one batch entry, where p.dropout > 0.
template <class A>
struct Dropout {
  uint32_t key0, key1, batch;
  uint32_t kept_from;  // a weight whose word is less is dropped
  A kept;              // what the others are multiplied by, 1 / (1 - p)

  ATX_HD Dropout(const AttentionParams& p, int b) {
    const uint64_t seed = uint64_t(*p.seed);
    key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    batch = uint32_t(p.first_batch + b * p.batch_step);
    const double words = p.dropout * 4294967296.0;
    kept_from = words < 4294967295.0 ? uint32_t(words) : 4294967295u;
    kept = p.dropout < 1 ? A(1 / (1 - p.dropout)) : A(0);
  }
  // Factors of the weights of keys 4 block ... 4 block + 3. In a vector of lanes, block, i and h
  // may differ from lane to lane.
  template <class L>
  ATX_HD void factors(typename L::Word block, typename L::Word i, typename L::Word h,
                      typename L::Float (&factor)[4]) const {
    typename L::Word word[4] = {block, i, h, typename L::Word{} + batch};
    philox<L>(word, key0, key1);
    for (int n = 0; n < 4; ++n) factor[n] = L::keep_or_zero(word[n], kept_from, kept);
  }
};

}  // namespace atx::ATX_TARGET
