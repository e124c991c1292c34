// Operations of a whole warp: barrier, shuffles, votes. All 32 lanes take part, at one place in the
// source; a lane that is elsewhere, or has ended, is an error (on a GPU: undefined).
#include "collective.h"

namespace atx::ATX_TARGET::simt {
namespace {

std::string lane_and_place(const Thread& t, const char* what, Site site) {
  return name(t) + " executes " + what + " at " + where(site);
}

[[noreturn]] void diverged(const Collective& op, Site site) {
  const Warp& w = block->warps[thread->index / LANES];
  const Thread& other =
      block->threads[thread->index / LANES * LANES + unsigned(__builtin_ctz(w.arrived))];
  fail("divergence inside a warp: " + lane_and_place(*thread, op.name, site) + " while " +
       lane_and_place(other, w.collective->name, w.site));
}

void run_barrier(void* const*) {
  if (analysis) analysis->warp_synchronizes(thread->index / LANES);
}
constexpr Collective BARRIER{"sync_warp", run_barrier};

struct Exchange {
  uint32_t value;
  int source;
  uint32_t result;
};
void run_exchange(void* const* arguments) {
  auto lane = [&](int l) { return static_cast<Exchange*>(arguments[l]); };
  for (int l = 0; l < LANES; ++l) {
    const int source = lane(l)->source;
    if (source < 0 || source >= LANES)
      fail("shfl at " + where(thread->site) + ": lane " + std::to_string(l) + " reads lane " +
           std::to_string(source));
    lane(l)->result = lane(source)->value;
  }
}
constexpr Collective EXCHANGE{"shfl", run_exchange};

struct Vote {
  bool holds;
  uint32_t result;
};
void run_vote(void* const* arguments) {
  uint32_t ballot = 0;
  for (int l = 0; l < LANES; ++l) ballot |= uint32_t(static_cast<Vote*>(arguments[l])->holds) << l;
  for (int l = 0; l < LANES; ++l) static_cast<Vote*>(arguments[l])->result = ballot;
}
constexpr Collective VOTE{"any/ballot", run_vote};

}  // namespace

void take_part(const Collective& op, void* argument, Site site) {
  const unsigned warp = thread->index / LANES, lane = thread->index % LANES;
  Warp& w = block->warps[warp];
  if (!w.arrived) {
    w.collective = &op;
    w.site = site;
  } else if (__builtin_expect(w.collective != &op || w.site.line() != site.line() ||
                                  w.site.column() != site.column(),
                              0)) {
    diverged(op, site);
  }
  if (__builtin_expect(w.done != 0, 0))
    fail(lane_and_place(*thread, op.name, site) + ", but lanes of its warp have ended");
  w.arrived |= 1u << lane;
  w.arguments[lane] = argument;
  if (w.arrived != ALL_LANES) return suspend(State::in_collective, op.name, site);
  thread->site = site;
  op.run(w.arguments);
  w.arrived = 0;
  make_ready(warp, ALL_LANES & ~(1u << lane));
}

void warp_barrier(Site site) {
  const Inside inside;
  take_part(BARRIER, nullptr, site);
}

uint32_t exchange(uint32_t value, int source, Site site) {
  const Inside inside;
  Exchange argument{value, source, 0};
  take_part(EXCHANGE, &argument, site);
  return argument.result;
}

uint32_t vote(bool holds, Site site) {
  const Inside inside;
  Vote argument{holds, 0};
  take_part(VOTE, &argument, site);
  return argument.result;
}

int lane() { return int(thread->index % LANES); }

}  // namespace atx::ATX_TARGET::simt
