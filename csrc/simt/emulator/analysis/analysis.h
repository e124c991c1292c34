// The hooks build: judges every load and store of a kernel. The compiler's instrumentation
// (hooks.cpp) and the machine's own primitives report accesses here; blocks run one after another
// on one OS thread, so nothing is locked.
#pragma once
#include <set>
#include <string>
#include <vector>

#include "buffers.h"
#include "counters.h"
#include "shadow.h"
#include "sites.h"

namespace atx::ATX_TARGET::simt {

class Analyzer final : public Analysis {
 public:
  void begin(const Launch&) override;
  std::string end() override;
  void block_begins() override;
  void block_synchronizes() override;
  void warp_synchronizes(unsigned warp) override { clock_.synchronize_warp(warp); }
  void multiplies(const Site&) override;
  void access(const void* pointer, unsigned bytes, Kind, const void* code, const Site*) override;

  void count(bool on) {
    counting_ = on;
    if (on) counters_.clear();
  }
  const Counters& counters() const { return counters_; }
  Sites& sites() { return sites_; }

 private:
  void shared_access(const char* pointer, unsigned bytes, Kind, uint16_t site);
  void global_access(uintptr_t address, unsigned bytes, Kind, uint16_t site);
  void check_alignment(uintptr_t address, unsigned bytes, Kind, uint16_t site, const char* space);
  Tensor* find(uintptr_t address, unsigned bytes, bool write);
  [[noreturn]] void out_of_bounds(uintptr_t address, unsigned bytes, Kind, uint16_t site);
  void report(const Verdict&, Kind, uint16_t site, const std::string& memory);
  bool is_private(uintptr_t address) const;

  Clock clock_;
  Sites sites_;
  Counters counters_;
  bool counting_ = false;
  std::vector<Tensor> tensors_;
  size_t recent_ = 0;  // the tensor of the last access
  std::vector<Cell> shared_;
  uintptr_t params_ = 0, params_end_ = 0, indices_ = 0, indices_end_ = 0;
  std::vector<std::pair<uintptr_t, uintptr_t>> constants_;  // this library's own data
  std::set<std::string> seen_;
  std::vector<std::string> reports_;
};

Analyzer& analyzer();

}  // namespace atx::ATX_TARGET::simt
