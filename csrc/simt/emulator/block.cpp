// One block from poisoned shared memory to its last thread.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#endif

#include "machine.h"

namespace atx::ATX_TARGET::simt {
namespace {

// Instrumented frames are several times larger.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_UNDEFINED__)
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif
constexpr size_t SHARED_ALIGNMENT = 1024;
constexpr char CANARY = char(0xa5);

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

char* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("simt: out of memory for stacks or shared memory");
  return static_cast<char*>(p);
}

void thread_begins() {
  arrived_on_fresh_stack();
  for (;;) {
    const Launch& launch = *block->launch;
    block->inside = false;
    launch.call(launch.kernel, launch.params);
    block->inside = true;
    Thread& self = *thread;
    self.state = State::done;
    block->warps[self.index / LANES].done |= 1u << self.index % LANES;
    --block->live;
    leave();  // comes back when the next block of the same launch begins
  }
}

void make_stacks(Block& b, unsigned count) {
  const size_t slot = STACK_BYTES + page();
  if (b.threads.size() < count || !b.stacks) {
    if (b.stacks) munmap(b.stacks, b.stacks_bytes);
    b.stacks_bytes = slot * count;
    b.stacks = map(b.stacks_bytes);
    for (unsigned i = 0; i < count; ++i) mprotect(b.stacks + slot * i, page(), PROT_NONE);
  }
  b.threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = b.threads[i];
    t.index = i;
    t.stack = b.stacks + slot * i + page();
    t.stack_bytes = STACK_BYTES;
    constexpr size_t COLORS = 61, COLOR_BYTES = 192;  // spread the hot frames over cache sets
    begin_at(t, thread_begins, i % COLORS * COLOR_BYTES);
  }
}

void make_shared(Block& b, size_t bytes) {
  const size_t capacity = round_up(bytes, SHARED_ALIGNMENT);
  if (b.arena_bytes < round_up(capacity, page()) || !b.arena) {
    if (b.arena) munmap(b.arena, b.arena_bytes + page());
    b.arena_bytes = round_up(capacity, page());
    b.arena = map(b.arena_bytes + page());
    mprotect(b.arena + b.arena_bytes, page(), PROT_NONE);
  }
  b.shared_bytes = bytes;
  b.shared_capacity = capacity;
  b.shared = b.arena + b.arena_bytes - capacity;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(b.arena, b.arena_bytes);
#endif
}

void fill_shared(Block& b) {
  if (config.poison_shared) memset(b.shared, 0xff, b.shared_bytes);
  memset(b.shared + b.shared_bytes, CANARY, b.shared_capacity - b.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(b.shared + b.shared_bytes, b.shared_capacity - b.shared_bytes);
#endif
}

void check_canary(Block& b) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(b.shared + b.shared_bytes, b.shared_capacity - b.shared_bytes);
#endif
  const char* const end = b.shared + b.shared_capacity;
  const char* const hit = std::find_if(b.shared + b.shared_bytes, const_cast<char*>(end),
                                       [](char c) { return c != CANARY; });
  if (hit == end) return;
  b.failed = true;
  b.error = position(b) + " wrote past the end of shared memory, at offset " +
            std::to_string(hit - b.shared) + " of " + std::to_string(b.shared_bytes) + " bytes";
}

// The same draws for a block whatever the workers and the blocks before it.
void seed(Block& b) {
  b.random.state =
      (config.seed + 1) * 0x9e3779b97f4a7c15ull ^ uint64_t(b.index + 1) * 0xbf58476d1ce4e5b9ull;
  if (!b.random.state) b.random.state = 1;
  constexpr int WARM_UP = 4;  // close seeds give close first draws
  for (int i = 0; i < WARM_UP; ++i) b.random.next();
  constexpr unsigned STAY[] = {0, 4, 6, 7};
  b.stay = STAY[b.random.next() >> 62];
}

}  // namespace

void prepare(Block& b, const Launch& launch) {
  b.launch = &launch;
  b.count = unsigned(launch.threads);
  b.failed = b.stuck = false;
  b.error.clear();
  make_stacks(b, b.count);
  make_shared(b, size_t(launch.shared_bytes));
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &b.main.stack_bytes);
  pthread_attr_destroy(&attributes);
  b.main.stack = static_cast<char*>(stack);
#endif
}

void run_block(Block& b, int64_t index) {
  b.index = index;
  b.live = b.count;
  b.ticks_without_end = 0;
  blockIdx = {unsigned(index), 0, 0};
  seed(b);
  fill_shared(b);
  b.barrier = {};
  b.ready_warps = 0;
  for (unsigned w = 0; w < b.count / LANES; ++w) {
    b.warps[w].done = b.warps[w].arrived = 0;
    b.warps[w].ready = ALL_LANES;
    b.ready_warps |= 1u << w;
  }
  b.warp = config.schedule == Schedule::reverse ? b.count / LANES - 1 : 0;
  for (Thread& t : b.threads) {
    t.state = State::runs;
    t.copies.clear();
    t.open_group = 0;
  }
  if (analysis) analysis->block_begins();
  run_threads();
  if (!b.failed && b.live) {
    b.failed = true;
    b.error = deadlock(b);
  }
  if (!b.failed) check_canary(b);
}

}  // namespace atx::ATX_TARGET::simt
