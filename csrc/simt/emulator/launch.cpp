// A launch: checks the limits of a GPU, deals the blocks to OS threads, and turns a failed block
// into an exception.
#include <algorithm>
#include <atomic>
#include <climits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "fault.h"
#include "interface.h"

namespace atx::ATX_TARGET {

constinit thread_local Index threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace simt {

Config config;
Analysis* analysis = nullptr;

namespace {

// Why a GPU would refuse the launch; null: it would not. Valid until this OS thread's next launch.
Status refused(const Launch& l) {
  static thread_local std::string text;
  if (l.threads < LANES || l.threads > MAX_THREADS || l.threads % LANES)
    text =
        std::to_string(l.threads) + " threads per block; expected a multiple of 32 from 32 to 1024";
  else if (l.grid < 0 || l.grid > INT_MAX)
    text = "a grid of " + std::to_string(l.grid) + " blocks; expected at most 2^31 - 1";
  else if (l.shared_bytes < 0 || size_t(l.shared_bytes) > config.shared_limit)
    text = std::to_string(l.shared_bytes) + " bytes of shared memory per block; the limit is " +
           std::to_string(config.shared_limit);
  else
    return nullptr;
  text = "simt: launch of " + kernel_name(l) + ": " + text;
  return text.c_str();
}

// Blocks are reused from launch to launch: their stacks are most of the cost of a small launch.
class Pool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Block>();
    auto b = std::move(free_.back());
    free_.pop_back();
    return b;
  }
  void give(std::unique_ptr<Block> b) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(b));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> free_;
};
Pool& pool() {
  static Pool& pool = *new Pool;  // never destroyed: a thread may still run at exit
  return pool;
}

// Which block comes i-th. Random: every block once, along an affine permutation.
class BlockOrder {
 public:
  explicit BlockOrder(int64_t n) : n_(n) {
    if (config.schedule != Schedule::random || n < 3) return;
    factor_ = int64_t(config.seed % uint64_t(n)) | 1;
    while (std::gcd(factor_, n) != 1) factor_ += 2;
    offset_ = int64_t(config.seed * 40503 % uint64_t(n));
  }
  int64_t operator()(int64_t i) const {
    if (config.schedule == Schedule::reverse) return n_ - 1 - i;
    return (i * factor_ + offset_) % n_;
  }

 private:
  int64_t n_, factor_ = 1, offset_ = 0;
};

class Grid {
 public:
  explicit Grid(const Launch& launch) : launch_(launch), order_(launch.grid) {}

  void run() {
    // The analysis is not shared between OS threads.
    const int64_t most = analysis ? 1 : std::max(config.workers, 1);
    const int64_t workers = std::min(most, launch_.grid);
    std::vector<std::thread> others;
    for (int64_t i = 1; i < workers; ++i) others.emplace_back([this] { work(); });
    work();
    for (std::thread& t : others) t.join();
  }
  const std::string& error() const { return error_; }

 private:
  void work() {
    std::unique_ptr<Block> b = pool().take();
    prepare(*b, launch_);
    block = b.get();
    blockDim = {unsigned(launch_.threads), 1, 1};
    gridDim = {unsigned(launch_.grid), 1, 1};
    {
      const FaultGuard guard(*b);
      for (int64_t i; !failed_ && (i = next_++) < launch_.grid;) {
        run_block(*b, order_(i));
        if (b->failed) {
          keep(*b);
          break;
        }
      }
    }
    block = nullptr;
    pool().give(std::move(b));
  }

  // Of several failures, that of the first block.
  void keep(const Block& b) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty() || b.index < error_block_) {
      error_ = b.error;
      error_block_ = b.index;
    }
    failed_ = true;
  }

  const Launch& launch_;
  const BlockOrder order_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::string error_;
  int64_t error_block_ = 0;
};

}  // namespace

Status run(const Launch& launch) {
  if (thread) fail("a kernel launches a kernel");
  if (launch.grid == 0) return nullptr;
  if (const Status reason = refused(launch)) return reason;
  if (intercept(launch)) return nullptr;
  if (analysis) analysis->begin(launch);
  Grid grid(launch);
  grid.run();
  std::string error = grid.error();
  const std::string found = analysis ? analysis->end() : "";
  if (!found.empty()) error += (error.empty() ? "" : "\n") + found;
  if (error.empty()) return nullptr;
  throw std::runtime_error("simt: " + kernel_name(launch) + ": " + error +
                           "\nTo repeat: " + how_to_repeat());
}

}  // namespace simt
}  // namespace atx::ATX_TARGET
