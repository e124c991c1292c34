// cp.async. The source is read when the copy is issued, so that a bad address is reported at its
// line; the data lands when the issuing thread waits for its group. In between the destination
// holds NaN (AsyncCopy::poison), which shows a missing wait (the reader gets NaN) as well as a copy
// issued while others still read (they get NaN).
#include <cstring>

#include "shared_memory.h"

namespace atx::ATX_TARGET::simt {
namespace {

constexpr unsigned SIZE = 16;

void land(const Copy& copy) {
  if (!copy.landed) memcpy(copy.to, copy.data, SIZE);
  if (analysis) analysis->access(copy.to, SIZE, Analysis::LAND, nullptr, &copy.site);
}

}  // namespace

void cp_async16(uint32_t smem, const void* global, int bytes, Site site) {
  const Inside inside;
  char* const to = shared_pointer(smem, SIZE, "cp_async16", site);
  if (bytes < 0 || bytes > int(SIZE))
    fail("cp_async16 at " + where(site) + ": " + std::to_string(bytes) + " bytes of 16");
  if (reinterpret_cast<uintptr_t>(global) % SIZE)
    fail("cp_async16 at " + where(site) + " by " + name(*thread) + ": misaligned global address");
  thread->copies.push_back({to, {}, thread->open_group, false, site});
  Copy& copy = thread->copies.back();
  if (analysis) {
    if (bytes) analysis->access(global, unsigned(bytes), Analysis::READ, nullptr, &site);
    analysis->access(to, SIZE, Analysis::ISSUE, nullptr, &site);
  }
  thread->site = site;
  thread->waits_in = "cp_async16";
  memcpy(copy.data, global, size_t(bytes));

  AsyncCopy when = config.async_copy;
  if (when == AsyncCopy::random)
    when = block->random.next() >> 63 ? AsyncCopy::poison : AsyncCopy::eager;
  copy.landed = when == AsyncCopy::eager;
  if (copy.landed) memcpy(to, copy.data, SIZE);
  if (when == AsyncCopy::poison) memset(to, 0xff, SIZE);
}

void cp_async_commit() { ++thread->open_group; }

void wait_copies(int groups) {
  const Inside inside;
  auto& copies = thread->copies;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group < thread->open_group - groups)
    land(copies[landed++]);
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(landed));
}

}  // namespace atx::ATX_TARGET::simt
