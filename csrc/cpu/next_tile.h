// Asks for the next tile of keys and values while this one is multiplied. Under a block mask it
// lies where the hardware does not look, and few queries share the wait for it.
#pragma once
#include "csrc/cpu/attention_fwd.h"

namespace atx::ATX_TARGET {

class NextTile {
 public:
  // Keys [j0, j1), to be fetched in so many turns, or more.
  void expect(const Task& task, int j0, int j1, int turns) {
    const AttentionParams& p = task.p;
    const int size = size_of(p.dtype);
    k_ = rows(p.k, task.key_offset(p.k_stride, j0), p.k_stride, p.D, size);
    v_ = rows(p.v, task.key_offset(p.v_stride, j0), p.v_stride, p.Dv, size);
    left_ = j1 - j0;
    share_ = (left_ + turns - 1) / turns;
  }
  ATX_HD void fetch() {
    for (int n = left_ < share_ ? left_ : share_; n > 0; --n, --left_) k_.fetch(), v_.fetch();
  }

 private:
  struct Rows {
    const char* at;
    int64_t step, bytes;

    ATX_HD void fetch() {
      constexpr int LINE = 64;
      for (int64_t n = 0; n < bytes; n += LINE) __builtin_prefetch(at + n, 0, 2);
      at += step;
    }
  };
  static Rows rows(const void* tensor, int64_t offset, const Strides& stride, int cols, int size) {
    return {static_cast<const char*>(tensor) + offset * size, stride.row * size,
            int64_t(cols) * size};
  }

  Rows k_, v_;
  int left_ = 0, share_ = 0;
};

}  // namespace atx::ATX_TARGET
