// Asks for the next tile of keys and values while this one is multiplied, and in a task's last tile
// for its output and the next task's queries and first tile. Under a block mask they lie where the
// hardware does not look, and few queries share the wait for them.
#pragma once
#include "csrc/cpu/attention_fwd.h"

namespace atx::ATX_TARGET {

class NextTile {
 public:
  // Keys [j0, j1), to be fetched in so many turns, or more.
  void expect(const Task& task, int j0, int j1, int turns) {
    const AttentionParams& p = task.p;
    const int size = size_of(p.dtype);
    k_ = rows(p.k, task.key_offset(p.k_stride, j0), p.k_stride, p.D, size, j1 - j0, turns);
    v_ = rows(p.v, task.key_offset(p.v_stride, j0), p.v_stride, p.Dv, size, j1 - j0, turns);
  }
  // The queries of a task, of its first head, in the same turns.
  void expect_queries(const Task& task, int turns) {
    const AttentionParams& p = task.p;
    q_ = rows(p.q, task.row_offset(p.q_stride, 0), p.q_stride, p.D, size_of(p.dtype), task.queries,
              turns);
  }
  // A task's output, of its first head, in its last tile's turns: it is written where nothing was
  // read.
  void expect_output(const Task& task, int turns) {
    const AttentionParams& p = task.p;
    o_ = rows(p.o, task.row_offset(p.o_stride, 0), p.o_stride, p.Dv, size_of(p.dtype), task.queries,
              turns);
  }
  ATX_HD void fetch() { k_.fetch(), v_.fetch(), q_.fetch(), o_.fetch(); }

 private:
  struct Rows {
    const char* at;
    int64_t step, bytes;
    int left, share;

    ATX_HD void fetch() {
      constexpr int LINE = 64;
      for (int n = left < share ? left : share; n > 0; --n, --left, at += step)
        for (int64_t b = 0; b < bytes; b += LINE) __builtin_prefetch(at + b, 0, 2);
    }
  };
  static Rows rows(const void* tensor, int64_t offset, const Strides& stride, int cols, int size,
                   int count, int turns) {
    return {static_cast<const char*>(tensor) + offset * size, stride.row * size,
            int64_t(cols) * size, count, (count + turns - 1) / turns};
  }

  Rows k_ = {}, v_ = {}, q_ = {}, o_ = {};
};

}  // namespace atx::ATX_TARGET
