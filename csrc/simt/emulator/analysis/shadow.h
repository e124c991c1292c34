// Which accesses to a byte of shared memory, or to an element of a buffer, nothing orders.
//
// Time is counted per warp: it moves on at a sync_warp of that warp and, for all warps, at a
// barrier of the block. An access is ordered before a later one by thread t if t made it, if a
// barrier of the block lies between, or if t's warp made it and its time has moved on. Shuffles and
// tensor-core operations order nothing: the architecture does not promise that they do.
#pragma once
#include <cstdint>

#include "csrc/simt/emulator/machine.h"

namespace atx::ATX_TARGET::simt {

struct Access {
  uint32_t time = 0;  // of the thread's warp; 0: there was none
  uint16_t thread = 0, site = 0;
};

// The last write, and readers since. Two readers of different warps are enough: whoever writes
// next, one of them is of another warp, which only a barrier of the block orders. Of the first
// reader's warp, the readers at its latest time are kept as the first and the last thread.
struct Cell {
  Access write, reader, other_reader;
  uint16_t last_thread = 0;
  bool in_flight = false;  // the write is an asynchronous copy that has not landed
};

enum class Finding {
  none,
  read_after_write,
  write_after_write,
  write_after_read,
  in_flight,
  uninitialized
};

struct Verdict {
  Finding finding = Finding::none;
  Access other = {};
  bool other_block = false;
};

class Clock {
 public:
  void begin_launch() { now_ = 0; }
  void begin_block() { begin_ = synchronize(); }
  uint32_t synchronize();
  void synchronize_warp(unsigned warp) { warps_[warp] = ++now_; }

  // Judges an access of a thread and records it in the cell. Memory of the block alone (shared)
  // starts unwritten.
  Verdict touch(Cell&, unsigned thread, uint16_t site, Analysis::Kind, bool shared) const;

 private:
  uint32_t time(unsigned thread) const { return warps_[thread / LANES]; }
  bool earlier_block(const Access& a) const { return a.time && a.time < begin_; }
  bool unordered(const Access&, unsigned thread) const;
  Verdict judge_write(const Cell&, unsigned thread, bool shared) const;
  void record_read(Cell&, unsigned thread, uint16_t site) const;

  uint32_t now_ = 0, begin_ = 0, barrier_ = 0;
  uint32_t warps_[MAX_WARPS] = {};
};

}  // namespace atx::ATX_TARGET::simt
