// Which thread runs next. Forward and reverse stay with a warp until it blocks: the largest skew
// between warps, which by itself shows most missing barriers. Random draws, per block, how much it
// prefers the running warp.
#include "machine.h"

namespace atx::ATX_TARGET::simt {

constinit thread_local Block* block = nullptr;
constinit thread_local Thread* thread = nullptr;

namespace {

unsigned lowest(uint32_t bits) { return unsigned(__builtin_ctz(bits)); }
unsigned highest(uint32_t bits) { return 31u - unsigned(__builtin_clz(bits)); }
// The first set bit at or after a drawn place: every bit can come, not all equally often.
unsigned drawn(uint32_t bits, uint64_t draw) {
  const unsigned turn = draw & 31;
  return (lowest(bits >> turn | bits << (-turn & 31)) + turn) & 31;
}

// Takes a thread out of the ready set; null: none is ready.
Thread* choose() {
  Block& b = *block;
  if (!b.ready_warps) return nullptr;
  unsigned warp = b.warp, lane;
  switch (config.schedule) {
    case Schedule::forward:
      if (!b.warps[warp].ready) warp = lowest(b.ready_warps);
      lane = lowest(b.warps[warp].ready);
      break;
    case Schedule::reverse:
      if (!b.warps[warp].ready) warp = highest(b.ready_warps);
      lane = highest(b.warps[warp].ready);
      break;
    default: {
      const uint64_t draw = b.random.next();
      if (!b.warps[warp].ready || (draw >> 56 & 7) >= b.stay)
        warp = drawn(b.ready_warps, draw >> 32);
      lane = drawn(b.warps[warp].ready, draw >> 40);
    }
  }
  Warp& w = b.warps[warp];
  w.ready &= ~(1u << lane);
  if (!w.ready) b.ready_warps &= ~(1u << warp);
  b.warp = warp;
  return &b.threads[warp * LANES + lane];
}

// With nobody ready, the block is over: all threads have ended, or none ever will.
void switch_from(Context& from) {
  if (__builtin_expect(block->stuck, 0) && thread) check_watchdog();
  Thread* to = choose();
  thread = to;
  if (to) threadIdx.x = to->index;
  switch_context(from, to ? static_cast<Context&>(*to) : block->main);
}

}  // namespace

void make_ready(unsigned warp, uint32_t lanes) {
  block->warps[warp].ready |= lanes;
  block->ready_warps |= 1u << warp;
}

void suspend(State state, const char* waits_in, Site site) {
  Thread& self = *thread;
  self.state = state;
  self.waits_in = waits_in;
  self.site = site;
  switch_from(self);
  self.state = State::runs;
}

void leave() { switch_from(*thread); }

void run_threads() { switch_from(block->main); }

}  // namespace atx::ATX_TARGET::simt
