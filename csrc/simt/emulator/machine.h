// The machine: a block in flight, its warps and threads. One OS thread runs one block at a time and
// owns one Block; nothing in it is shared, so the emulator has no locks below launch.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/simt/simt_host.h"
#include "fiber.h"

namespace atx::ATX_TARGET::simt {

constexpr int LANES = 32;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / LANES;
constexpr uint32_t ALL_LANES = 0xffffffffu;
// A GPU reserves the first KiB of the shared window: a kernel that assumes an address of 0 is wrong
// there as well.
constexpr uint32_t SHARED_ORIGIN = 1024;

enum class Schedule { forward, reverse, random };
enum class AsyncCopy {
  eager,   // data lands at once
  lazy,    // the old contents stay until the wait
  poison,  // NaN from issue to wait: finds a read that comes too early and a copy issued too early
  random   // each copy is eager or poison
};

struct Config {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
  int workers = 1;  // OS threads
  AsyncCopy async_copy = AsyncCopy::poison;
  bool poison_shared = true;        // shared memory starts as 0xFF bytes: NaN in every format
  double watchdog_seconds = 60;     // a block that runs longer is stuck
  size_t shared_limit = 227 << 10;  // sm_90's; sm_80 has 163 KiB
};
extern Config config;

// A copy between its issue and its wait.
struct Copy {
  char* to;
  char data[16];
  int group;
  bool landed;
  Site site;
};

enum class State : uint8_t { runs, at_barrier, in_collective, done };

struct Thread : Context {
  unsigned index = 0;  // in the block
  State state = State::done;
  const char* waits_in = "";  // the primitive that blocks it, and where
  Site site;
  std::vector<Copy> copies;
  int open_group = 0;
};

// An operation of a whole warp: the last lane to arrive runs it for all. Arguments stay on the
// lanes' stacks.
struct Collective {
  const char* name;
  void (*run)(void* const* arguments);
};

struct Warp {
  uint32_t ready = 0, done = 0, arrived = 0;
  const Collective* collective = nullptr;
  Site site;  // of the first lane that arrived
  void* arguments[LANES];
};

struct Barrier {
  unsigned arrived = 0, first = 0;  // first: the thread that came first
  const char* name = nullptr;
  Site site;
  bool vote = false, result = false;
};

// xorshift64*: small, seedable, and the same on every machine.
struct Random {
  uint64_t state = 1;
  uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
  }
};

struct Block {
  const Launch* launch = nullptr;
  int64_t index = 0;  // linear
  unsigned count = 0, live = 0;
  uint32_t ready_warps = 0;
  unsigned warp = 0;  // of the running thread
  unsigned stay = 0;  // random schedule: of 8 draws, how many stay with the running warp
  Random random;
  Context main;
  std::vector<Thread> threads;
  Warp warps[MAX_WARPS];
  Barrier barrier;

  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  char* arena = nullptr;
  char* shared = nullptr;  // ends, rounded up to 1 KiB, where the arena ends: at a page that faults
  size_t arena_bytes = 0, shared_bytes = 0, shared_capacity = 0;
  std::vector<char> signal_stack;  // for the handler of a stack overflow

  bool inside = false;        // the machine's own code runs: do not interrupt it
  int ticks_without_end = 0;  // watchdog ticks since the block began
  bool stuck = false;
  bool failed = false;
  std::string error;
};

ATX_SIMT_TLS Block* block;
ATX_SIMT_TLS Thread* thread;  // null outside kernels

// schedule.cpp
void make_ready(unsigned warp, uint32_t lanes);
void suspend(State, const char* waits_in, Site);  // until made ready again
void leave();                                     // for good: the thread has ended
void run_threads();                               // returns when none can run

// block.cpp
void prepare(Block&, const Launch&);  // memory and stacks
void run_block(Block&, int64_t index);

// fault.cpp
[[noreturn]] void fail(const std::string& reason);  // abandons the block from inside a kernel
void check_watchdog();

// Held while a primitive runs, so that the watchdog never unwinds half of one.
struct Inside {
  Inside() { block->inside = true; }
  ~Inside() {
    block->inside = false;
    if (__builtin_expect(block->stuck, 0)) check_watchdog();
  }
};

// report.cpp
std::string where(Site);
std::string mangled_name(const Launch&);
std::string kernel_name(const Launch&);  // readable
std::string position(const Block&);      // "block 3"
std::string name(const Thread&);         // "thread 37 [warp 1 lane 5]"
std::string deadlock(const Block&);
std::string how_to_repeat();

// What the hooks build adds; null in the others. Called at the events that order accesses, and at
// the accesses that primitives make on a thread's behalf (the compiler reports the kernel's own).
struct Analysis {
  virtual ~Analysis() = default;
  virtual void begin(const Launch&) = 0;
  virtual std::string end() = 0;  // reports; empty: none
  virtual void block_begins() = 0;
  virtual void block_synchronizes() = 0;
  virtual void warp_synchronizes(unsigned warp) = 0;
  virtual void multiplies(const Site&) = 0;  // each lane of a warp that does
  // ISSUE, LAND: the two ends of an asynchronous copy's write.
  enum Kind { READ, WRITE, ISSUE, LAND };
  virtual void access(const void* pointer, unsigned bytes, Kind, const void* code,
                      const Site* site) = 0;
};
extern Analysis* analysis;

}  // namespace atx::ATX_TARGET::simt
