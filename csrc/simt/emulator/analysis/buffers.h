// The tensors of a call: which addresses are elements of one.
#pragma once
#include <string>
#include <vector>

#include "shadow.h"

namespace atx::ATX_TARGET::simt {

class Tensor {
 public:
  explicit Tensor(const Buffer&);

  const std::string& name() const { return name_; }
  bool writable() const { return writable_; }
  // Whether each of the bytes belongs to an element. A gap between the rows of a view belongs to
  // none.
  bool contains(uintptr_t address, unsigned bytes) const;
  // How far outside an address lies: 0 inside the span from the first to the last element.
  size_t distance(uintptr_t address) const;
  std::string describe(uintptr_t address) const;  // "'k' +0x40", "8 bytes past the end of 'k'"

  // One cell per element, of writable tensors.
  Cell* cells(uintptr_t address, unsigned bytes, int* count);

 private:
  struct Dimension {
    int64_t size, stride;
  };
  bool is_element(int64_t offset) const;

  std::string name_;
  uintptr_t begin_, end_;
  int item_;
  bool writable_, dense_;
  std::vector<Dimension> dimensions_;  // widest stride first
  std::vector<Cell> cells_;
};

}  // namespace atx::ATX_TARGET::simt
