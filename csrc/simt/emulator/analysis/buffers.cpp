// The tensors of a call.
#include "buffers.h"

#include <algorithm>

namespace atx::ATX_TARGET::simt {

Tensor::Tensor(const Buffer& b)
    : name_(b.name),
      begin_(reinterpret_cast<uintptr_t>(b.data)),
      end_(begin_),
      item_(b.itemsize),
      writable_(b.writable) {
  int64_t elements = 1, span = 1;
  for (int d = 0; d < b.ndim; ++d) {
    elements *= b.stride[d]
                    ? b.size[d]
                    : std::min<int64_t>(b.size[d], 1);  // broadcast: the same elements again
    span += (b.size[d] - 1) * b.stride[d];
    if (b.size[d] > 1 && b.stride[d] > 0) dimensions_.push_back({b.size[d], b.stride[d]});
  }
  std::sort(dimensions_.begin(), dimensions_.end(),
            [](auto& x, auto& y) { return x.stride > y.stride; });
  if (elements > 0) end_ += uintptr_t(span) * uintptr_t(item_);
  dense_ = elements >= span;
  constexpr int64_t MOST_CELLS =
      1 << 24;  // 512 MiB of them; a larger tensor is checked for bounds only
  if (writable_ && elements > 0 && span <= MOST_CELLS) cells_.resize(size_t(span));
}

// Takes the widest strides out first, which finds the index of every view whose dimensions do not
// interleave.
bool Tensor::is_element(int64_t offset) const {
  for (const Dimension& d : dimensions_)
    offset -= std::min(offset / d.stride, d.size - 1) * d.stride;
  return offset == 0;
}

bool Tensor::contains(uintptr_t address, unsigned bytes) const {
  if (address < begin_ || address + bytes > end_) return false;
  if (dense_) return true;
  const int64_t first = int64_t(address - begin_) / item_,
                last = int64_t(address + bytes - 1 - begin_) / item_;
  for (int64_t i = first; i <= last; ++i)
    if (!is_element(i)) return false;
  return true;
}

size_t Tensor::distance(uintptr_t address) const {
  return address < begin_ ? begin_ - address : address < end_ ? 0 : address - end_ + 1;
}

std::string Tensor::describe(uintptr_t address) const {
  const auto bytes = [](uintptr_t n) { return std::to_string(n) + " bytes "; };
  if (address < begin_) return bytes(begin_ - address) + "before '" + name_ + "'";
  if (address >= end_) return bytes(address - end_) + "past the end of '" + name_ + "'";
  const int64_t offset = int64_t(address - begin_);
  return (is_element(offset / item_) ? "'" : "between the rows of '") + name_ + "' +" +
         std::to_string(offset);
}

Cell* Tensor::cells(uintptr_t address, unsigned bytes, int* count) {
  if (cells_.empty()) return nullptr;
  const auto item = uintptr_t(item_);
  const uintptr_t first = (address - begin_) / item, last = (address + bytes - 1 - begin_) / item;
  *count = int(last - first + 1);
  return &cells_[first];
}

}  // namespace atx::ATX_TARGET::simt
