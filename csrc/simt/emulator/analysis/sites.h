// Places in the source, as small numbers: an instruction of an instrumented kernel, or a
// primitive's call.
#pragma once
#include <bit>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/simt/emulator/machine.h"

namespace atx::ATX_TARGET::simt {

class Sites {
 public:
  uint16_t id(const void* code) { return id(code, true); }
  uint16_t id(const Site& site) { return id(std::bit_cast<const void*>(site), false); }
  const std::string& name(
      uint16_t id);  // "flash.cu:81", with the caller's line if it was inlined from another

 private:
  struct Entry {
    const void* key;
    bool is_code;
    std::string name;
  };
  struct Recent {
    const void* key;
    uint16_t id;
  };
  uint16_t id(const void* key, bool is_code);

  static constexpr size_t RECENT = 1024;
  Recent recent_[RECENT] = {};
  std::unordered_map<const void*, uint16_t> ids_;
  std::vector<Entry> entries_;
};

}  // namespace atx::ATX_TARGET::simt
