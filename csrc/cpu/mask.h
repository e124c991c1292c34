// Masks in blocks of COUNT rows and COUNT keys. The forward has queries in the lanes and masks have
// keys: one transposition brings a block of the mask to the scores, where two would bring the
// scores to the mask and back. A boolean mask is a bias of 0 or −inf here.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

template <class A>
class MaskBlock {
  using L = Lanes<A>;

 public:
  // Finds the COUNT rows from `row` on; ones that do not exist stand for the last. Returns whether
  // a logit is scale * s + mask, within the window, and blocks of the mask are contiguous.
  template <class Score>
  bool find(const Task& task, const Score* scores, int row) {
    const AttentionParams& p = task.p;
    if constexpr (Score::LINEAR) return false;
    if (!p.mask.data || p.mask.col != 1 || p.softcap != 0 || p.alibi_slopes.data ||
        p.forgetting.sums)
      return false;
    const int64_t row_bytes = p.mask.row * size_of(p.mask.dtype);
    for (int l = 0, i = task.query(row), g = row % task.group; l < L::COUNT; ++l) {
      if constexpr (!Score::LINEAR)
        rows_[l] = static_cast<const char*>(scores[g].mask.data) + i * row_bytes;
      if (row + l + 1 < task.rows() && ++g == task.group) g = 0, ++i;
    }
    dtype_ = p.mask.dtype;
    ahead_ = L::COUNT / task.group * row_bytes;
    return true;
  }

  // s, COUNT rows of raw scores with keys j, j + 1, ... that lie `width` apart, become logits.
  void add(int j, A scale, int width, A* s) const {
    switch (dtype_) {
      case DType::f64:
        return add<double>(j, scale, width, s);
      case DType::f32:
        return add<float>(j, scale, width, s);
      case DType::f16:
        return add<f16>(j, scale, width, s);
      case DType::bf16:
        return add<bf16>(j, scale, width, s);
      case DType::boolean:
        return add<uint8_t>(j, scale, width, s);
    }
  }

 private:
  template <class T>
  void add(int j, A scale, int width, A* s) const {
    typename L::Float bias[L::COUNT];
#pragma GCC unroll 16
    for (int l = 0; l < L::COUNT; ++l) {
      const T* const at = reinterpret_cast<const T*>(rows_[l]) + j;
      // The next rows' part: they lie so far apart that the hardware does not see them coming.
      if (j % int(64 / sizeof(T)) < L::COUNT)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + ahead_);
      if constexpr (sizeof(T) == 1)
        bias[l] = L::select(~L::load_bool(at), L::all(-INFINITY), L::all(0));
      else
        bias[l] = L::load(at);
    }
    transpose<L>(bias);
#pragma GCC unroll 16
    for (int l = 0; l < L::COUNT; ++l)
      L::store(s + l * width, L::add_bias(L::load(s + l * width) * scale, bias[l]));
  }

  DType dtype_;
  const char* rows_[L::COUNT];
  int64_t ahead_ = 0;  // bytes from a row to the one COUNT rows on
};

}  // namespace atx::ATX_TARGET
