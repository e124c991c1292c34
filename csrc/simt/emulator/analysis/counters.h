// How well the accesses of a warp fit the memory system: 32-byte sectors of global memory, and
// passes over the banks of shared memory, against the least possible. They describe the loads of
// the source, as g++ leaves them: no caches and no registers are modeled.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "sites.h"

namespace atx::ATX_TARGET::simt {

class Counters {
 public:
  void shared(uint16_t site, unsigned thread, uint64_t offset, unsigned bytes, bool write) {
    record(site, thread, offset, bytes, write, Space::shared);
  }
  void global(uint16_t site, unsigned thread, uint64_t address, unsigned bytes, bool write) {
    record(site, thread, address, bytes, write, Space::global);
  }
  void multiply(uint16_t site);  // one of the tensor core's instructions
  void begin(const std::string& kernel);
  void flush();  // no request reaches over a barrier
  void clear();
  // One line per kernel, place, kind and size: "_Z5flash flash.cu:81 shared read 16 requests units
  // ideal". Of the tensor core's instructions there is nothing but their number.
  std::string table(Sites&) const;

 private:
  // What a warp asks for at once: the n-th execution of a place by each of its lanes.
  struct Request {
    uint32_t lanes = 0;
    uint64_t address[LANES];
  };
  struct Pending {
    uint32_t executions[LANES] = {};
    uint32_t first = 0;  // number of the front request
    std::deque<Request> requests;
  };
  enum class Space : uint8_t { global, shared, tensor };
  struct Key {
    uint16_t kernel, site;
    uint8_t bytes;
    bool write;
    Space space;
    auto operator<=>(const Key&) const = default;
  };
  struct Total {
    uint64_t requests = 0, units = 0, ideal = 0;
  };
  void record(uint16_t site, unsigned thread, uint64_t address, unsigned bytes, bool write, Space);
  void close(const Key&, const Request&);
  static std::string words(const Key&);

  std::vector<std::string> kernels_;
  uint16_t kernel_ = 0;                                  // that runs
  std::map<std::pair<Key, unsigned>, Pending> pending_;  // by place and warp
  std::map<Key, Total> totals_;
};

}  // namespace atx::ATX_TARGET::simt
