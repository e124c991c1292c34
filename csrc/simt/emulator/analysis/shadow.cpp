// The race detector's rules.
#include "shadow.h"

#include <algorithm>

namespace atx::ATX_TARGET::simt {

uint32_t Clock::synchronize() {
  barrier_ = ++now_;
  std::fill(warps_, warps_ + MAX_WARPS, now_);
  return now_;
}

bool Clock::unordered(const Access& a, unsigned thread) const {
  if (a.time < barrier_ || a.thread == thread) return false;
  return a.thread / LANES != thread / LANES || a.time == time(thread);
}

Verdict Clock::judge_write(const Cell& c, unsigned thread, bool shared) const {
  for (const Access* reader : {&c.reader, &c.other_reader}) {
    if (unordered(*reader, thread)) return {Finding::write_after_read, *reader};
    if (!shared && earlier_block(*reader)) return {Finding::write_after_read, *reader, true};
  }
  const Access last{c.reader.time, c.last_thread, c.reader.site};
  if (unordered(last, thread)) return {Finding::write_after_read, last};
  return {};
}

void Clock::record_read(Cell& c, unsigned thread, uint16_t site) const {
  const Access now{time(thread), uint16_t(thread), site};
  const bool same_interval = c.reader.time >= barrier_;
  if (same_interval && c.reader.thread / LANES != thread / LANES) {
    c.other_reader = now;
    return;
  }
  if (!same_interval || c.reader.time != now.time) c.reader = now;
  c.last_thread = now.thread;
}

Verdict Clock::touch(Cell& c, unsigned thread, uint16_t site, Analysis::Kind kind,
                     bool shared) const {
  const bool stale =
      shared && c.write.time < begin_;  // written in an earlier block, whose memory this was
  Verdict verdict;
  if (kind != Analysis::LAND) {
    if (stale) {
      if (kind == Analysis::READ) verdict = {Finding::uninitialized};
    } else if (c.in_flight) {
      verdict = {Finding::in_flight, c.write};
    } else if (unordered(c.write, thread)) {
      verdict = {kind == Analysis::READ ? Finding::read_after_write : Finding::write_after_write,
                 c.write};
    } else if (!shared && earlier_block(c.write)) {
      verdict = {kind == Analysis::READ ? Finding::read_after_write : Finding::write_after_write,
                 c.write, true};
    }
  }
  if (kind == Analysis::READ) {
    record_read(c, thread, site);
    return verdict;
  }
  if (kind != Analysis::LAND && verdict.finding == Finding::none)
    verdict = judge_write(c, thread, shared);
  c.write = {time(thread), uint16_t(thread), site};
  c.in_flight = kind == Analysis::ISSUE;
  c.reader = c.other_reader = {};
  c.last_thread = 0;
  return verdict;
}

}  // namespace atx::ATX_TARGET::simt
