// Leading batch dimensions, as scaled_dot_product_attention broadcasts them, without copying
// anything. Every tensor of a call is an operand: a pointer and one stride per batch dimension, 0
// where it is broadcast. coalesce() merges neighboring dimensions that all operands walk alike, so
// that nearly every call ends with one, the B of the kernel; for what remains the kernel is
// launched once per index, on shifted pointers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

namespace atx::ops {

constexpr int MAX_BATCH_DIMS = 8;

// Size and stride of dimension `from_end` (1 = last), of size 1 when the tensor has fewer. Size 1
// has stride 0.
struct Dim {
  int64_t size = 1, stride = 0;
};
inline Dim dim_from_end(const torch::stable::Tensor& t, int64_t from_end) {
  if (from_end > t.dim()) return {};
  const int64_t size = t.size(t.dim() - from_end);
  return {size, size == 1 ? 0 : t.stride(t.dim() - from_end)};
}

template <int OPERANDS>
struct BatchDims {
  int count = 0;
  int64_t size[MAX_BATCH_DIMS] = {};              // outermost first
  int64_t stride[OPERANDS][MAX_BATCH_DIMS] = {};  // in elements

  int64_t total() const {
    int64_t n = 1;
    for (int d = 0; d < count; ++d) n *= size[d];
    return n;
  }

  void coalesce() {
    int kept = 0;
    for (int d = 0; d < count; ++d) {
      if (size[d] == 1) continue;
      if (kept > 0 && mergeable(kept - 1, d)) {
        size[kept - 1] *= size[d];
        for (auto& s : stride) s[kept - 1] = s[d];
      } else {
        move(d, kept++);
      }
    }
    count = kept;
    for (int d = 0; d + 1 < count; ++d)  // the longest dimension becomes the kernel's
      if (size[d] > size[count - 1]) swap(d, count - 1);
  }

 private:
  bool mergeable(int outer, int inner) const {
    for (auto& s : stride)
      if (s[outer] != s[inner] * size[inner]) return false;
    return true;
  }
  void move(int from, int to) {
    size[to] = size[from];
    for (auto& s : stride) s[to] = s[from];
  }
  void swap(int a, int b) {
    std::swap(size[a], size[b]);
    for (auto& s : stride) std::swap(s[a], s[b]);
  }
};

}  // namespace atx::ops
