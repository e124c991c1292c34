// Memory of one thread for all its tasks: one block, carved into arrays that start on cache lines.
#pragma once
#include <cstdlib>

#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(block_); }

  // Called for every array twice: before allocate() to count, after it to hand out.
  template <class T>
  T* take(int64_t n) {
    T* const at = reinterpret_cast<T*>(block_ + used_);
    used_ += (n * int64_t(sizeof(T)) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return at;
  }
  void allocate() {
    block_ = static_cast<char*>(aligned_alloc(CACHE_LINE, used_));
    if (!block_) abort();
    used_ = 0;
  }

 private:
  static constexpr int64_t CACHE_LINE = 64;
  char* block_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace atx::ATX_TARGET
