// Dropout's decisions (core/dropout.h) in the two ways in which the kernels lay out weights. What
// they keep is still to be multiplied by Dropout::kept.
#pragma once
#include "csrc/core/dropout.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {

// Which weights of some rows and BLOCKS blocks of keys are kept, as bits: the smallest form, and
// AVX-512 masks by them.
template <class A, int BLOCKS>
class KeptBits {
  using L = Lanes<A>;
  static_assert(DROPOUT_CALLS == 8 && DROPOUT_BLOCK == 64, "a byte is half n of a block's calls");
  static constexpr int ROW = BLOCKS * DROPOUT_BLOCK / 8;  // bytes
  // Lanes hold all calls of one row, or of several, or some of one's.
  static constexpr int CALLS = L::COUNT < DROPOUT_CALLS ? L::COUNT : DROPOUT_CALLS;
  static constexpr int ROWS = L::COUNT / CALLS;

 public:
  static constexpr bool SOME = true;

  void take(Scratch& scratch, int rows) {
    bytes_ = scratch.take<uint8_t>((rows + ROWS) * ROW + sizeof(uint32_t));
  }

  // Rows [first, last) and the blocks that hold a key of [from, to); j0, the first key of them all,
  // starts a block.
  void draw(const Task& task, int first, int last, int j0, int from, int to) {
    using Position = typename L::Position;
    const Dropout<A> dropout(task.p, task.b);
    for (int r = first; r < last; r += ROWS) {
      Position call, i, h, words[4];
      for (int l = 0; l < L::COUNT; ++l) {
        call[l] = j0 / DROPOUT_BLOCK * DROPOUT_CALLS + l % CALLS;
        i[l] = task.query(r + l / CALLS), h[l] = task.head(r + l / CALLS);
      }
      for (int block = (from - j0) / DROPOUT_BLOCK; j0 + block * DROPOUT_BLOCK < to; ++block)
        for (int c = 0; c < DROPOUT_CALLS; c += CALLS) {
          dropout.template draw<L>(call + (block * DROPOUT_CALLS + c), i, h, words);
#pragma GCC unroll 8
          for (int n = 0; n < 8; ++n)
            put(r, block * 8 + n, c,
                L::greater_bits(random_half<L>(words[n / 2], n), dropout.last_dropped));
        }
    }
  }

  // x where weights of this row and of keys j0 + at, ... are kept, else 0.
  ATX_HD typename L::Float kept(int row, int at, typename L::Float x) const {
    static_assert(L::COUNT + 7 <= 32);
    uint32_t bits;
    memcpy(&bits, bytes_ + row * ROW + at / 8, sizeof bits);
    return L::where_set(bits >> at % 8, x);
  }

 private:
  void put(int row, int byte, int call, uint32_t bits) {
    for (int n = 0; n < ROWS; ++n) {
      uint8_t& to = bytes_[(row + n) * ROW + byte];
      to = uint8_t((call > 0 ? to : 0) | bits >> n * CALLS << call);
    }
  }

  uint8_t* bytes_;
};

// Without dropout.
struct AllKept {
  static constexpr bool SOME = false;
};

// Queries in the lanes: zeros among the weights [keys, width] of `width` rows from `row` on and of
// keys [j, j + keys).
template <class A>
void drop_columns(const Task& task, int row, int width, int j, int keys, A* weights) {
  using L = Lanes<A>;
  using Position = typename L::Position;
  const Dropout<A> dropout(task.p, task.b);
  for (int lane = 0; lane < width; lane += L::COUNT) {
    Position i, h;
    for (int l = 0; l < L::COUNT; ++l)
      i[l] = task.query(row + lane + l), h[l] = task.head(row + lane + l);
    for (int block = j / DROPOUT_BLOCK; block * DROPOUT_BLOCK < j + keys; ++block)
      for (int c = 0; c < DROPOUT_CALLS; ++c) {
        Position words[4];
        dropout.template draw<L>(Position{} + block * DROPOUT_CALLS + c, i, h, words);
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) {
          const int at = block * DROPOUT_BLOCK + 8 * n + c - j;
          if (at < 0 || at >= keys) continue;
          A* const weight = weights + at * width + lane;
          const typename L::Bool kept = {random_half<L>(words[n / 2], n) > dropout.last_dropped};
          L::store(weight, L::select(kept, L::load(weight), L::all(0)));
        }
      }
  }
}

}  // namespace atx::ATX_TARGET
