// What ends a kernel early: its own errors, faults of the processor, and the watchdog. All three
// abandon the block's fibers where they stand: no destructor on them runs.
#include "fault.h"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <mutex>

namespace atx::ATX_TARGET::simt {
namespace {

// The sanitizers report faults themselves.
#if defined(__SANITIZE_ADDRESS__)
constexpr int FAULTS[] = {SIGFPE};
#else
constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
#endif
constexpr size_t SIGNAL_STACK_BYTES = 64 << 10;  // a frame holds all AVX-512 and AMX state: 11 KiB
constexpr int TICKS = 4;                         // of the watchdog, until it bites

struct sigaction replaced[NSIG];
int tick_signal() { return SIGRTMIN + 4; }  // the first few are taken by glibc and debuggers

std::string describe(int signal, const char* address) {
  const Block& b = *block;
  if (signal == SIGFPE) return "integer division by zero";
  if (signal == SIGILL) return "illegal instruction";
  constexpr ptrdiff_t NEAR = 64 << 10;
  char hex[32];
  snprintf(hex, sizeof hex, "%p", static_cast<const void*>(address));
  if (address >= thread->stack - NEAR && address < thread->stack + thread->stack_bytes)
    return "stack overflow: a thread has " + std::to_string(thread->stack_bytes >> 10) + " KiB";
  if (address >= b.arena && address < b.arena + b.arena_bytes + NEAR)
    return "access past the end of shared memory, at offset " + std::to_string(address - b.shared) +
           " of " + std::to_string(b.shared_bytes) + " bytes";
  return std::string("invalid global address ") + hex;
}

// Runs on the fiber's stack, from its top: what was there is abandoned.
void after_fault(int signal, const char* address) {
  const bool in_primitive = block->inside && thread->waits_in[0];
  fail(describe(signal, address) +
       (in_primitive ? std::string(" in ") + thread->waits_in + " at " + where(thread->site) : ""));
}
void after_expiry() {
  char text[96];
  snprintf(text, sizeof text, "watchdog: the block has run for more than %g seconds",
           config.watchdog_seconds);
  fail(text);
}

// Makes the interrupted kernel continue at `to` with two arguments.
void redirect(void* context, void (*to)(), uintptr_t first, uintptr_t second) {
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  const uintptr_t top =
      (reinterpret_cast<uintptr_t>(thread->stack) + thread->stack_bytes - 1024) & ~uintptr_t(63);
#if defined(__x86_64__)
  machine.gregs[REG_RSP] = greg_t(top - 8);
  machine.gregs[REG_RIP] = greg_t(to);
  machine.gregs[REG_RDI] = greg_t(first);
  machine.gregs[REG_RSI] = greg_t(second);
#elif defined(__aarch64__)
  machine.sp = top;
  machine.pc = reinterpret_cast<uintptr_t>(to);
  machine.regs[0] = first;
  machine.regs[1] = second;
#else
#error "simt: say how to redirect a fault on this processor"
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (thread)
    return redirect(context, reinterpret_cast<void (*)()>(after_fault), uintptr_t(signal),
                    uintptr_t(info->si_addr));
  const struct sigaction& old = replaced[signal];
  if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
  if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
  sigaction(signal, &old, nullptr);  // returning repeats the fault, now with the default action
}

void on_tick(int, siginfo_t*, void* context) {
  if (!thread || ++block->ticks_without_end < TICKS) return;
  block->stuck = true;
  if (!block->inside) redirect(context, after_expiry, 0, 0);
}

void install(int signal, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction now{};
  sigaction(signal, nullptr, &now);
  if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == handler) return;
  replaced[signal] = now;
  struct sigaction ours{};
  ours.sa_sigaction = handler;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigaction(signal, &ours, nullptr);
}

}  // namespace

void fail(const std::string& reason) {
  Block& b = *block;
  b.failed = true;
  b.error = position(b) + ", " + name(*thread) + ": " + reason;
  Context& self = *thread;
  thread = nullptr;
  switch_context(self, b.main);
  __builtin_unreachable();
}

void check_watchdog() {
  if (thread && block->stuck) after_expiry();
}

// Another library may have put its handlers over ours since the last launch, so every launch looks.
FaultGuard::FaultGuard(Block& b) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  for (int signal : FAULTS) install(signal, on_fault);
  install(tick_signal(), on_tick);

  b.signal_stack.resize(SIGNAL_STACK_BYTES);
  stack_t stack{};
  stack.ss_sp = b.signal_stack.data();
  stack.ss_size = b.signal_stack.size();
  sigaltstack(&stack, &old_stack_);

  if (config.watchdog_seconds <= 0) return;
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = tick_signal();
  event._sigev_un._tid = pid_t(syscall(SYS_gettid));
  watched_ = timer_create(CLOCK_MONOTONIC, &event, &timer_) == 0;
  const double tick = config.watchdog_seconds / TICKS;
  const timespec period{time_t(tick), long((tick - double(time_t(tick))) * 1e9)};
  const itimerspec spec{period, period};
  if (watched_) timer_settime(timer_, 0, &spec, nullptr);
}

FaultGuard::~FaultGuard() {
  if (watched_) timer_delete(timer_);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace atx::ATX_TARGET::simt
