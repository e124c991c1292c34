// The barrier of a block. Every thread must come, to the same place in the source: a thread that
// has ended, or waits at another barrier, makes the kernel wrong even where a GPU happens to go on.
#include "machine.h"

namespace atx::ATX_TARGET::simt {
namespace {

[[noreturn]] void diverged(const char* what, Site site) {
  const Barrier& b = block->barrier;
  fail("divergent barriers: " + name(*thread) + " is in " + what + " at " + where(site) +
       " while " + name(block->threads[b.first]) + " waits in " + b.name + " at " + where(b.site));
}

void release() {
  Barrier& b = block->barrier;
  b.result = b.vote;
  b.vote = false;
  b.arrived = 0;
  if (analysis) analysis->block_synchronizes();
  for (unsigned w = 0; w < block->count / LANES; ++w) {
    const uint32_t self = w == thread->index / LANES ? 1u << thread->index % LANES : 0;
    make_ready(w, ALL_LANES & ~self);
  }
}

void arrive(const char* what, bool vote, Site site) {
  Barrier& b = block->barrier;
  if (b.arrived == 0) {
    b.name = what;
    b.site = site;
    b.first = thread->index;
  } else if (b.name != what || b.site.line() != site.line() || b.site.column() != site.column()) {
    diverged(what, site);
  }
  if (block->live != block->count)
    fail(name(*thread) + " is in " + what + " at " + where(site) + ", but " +
         std::to_string(block->count - block->live) + " threads of the block have ended");
  b.vote |= vote;
  if (++b.arrived == block->count) return release();
  suspend(State::at_barrier, what, site);
}

}  // namespace

void barrier(Site site) {
  const Inside inside;
  arrive("sync", false, site);
}

bool barrier_or(bool holds, Site site) {
  const Inside inside;
  arrive("sync_or", holds, site);
  return block->barrier.result;
}

}  // namespace atx::ATX_TARGET::simt
