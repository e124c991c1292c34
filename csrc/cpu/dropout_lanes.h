// Dropout's factors (core/dropout.h) in the two ways in which the kernels lay out weights.
#pragma once
#include "csrc/core/dropout.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/transpose.h"

namespace atx::ATX_TARGET {

// Keys that share a call of the hash.
constexpr int DROPOUT_KEYS = 4;

// Keys in the lanes: to [rows, WIDTH] = the factors of rows [first, last) and of keys [j, j +
// WIDTH), j a multiple of DROPOUT_KEYS. Writes one row more if a vector of calls serves two.
template <class A, int WIDTH>
void row_factors(const Task& task, int j, int first, int last, A* to) {
  using L = Lanes<A>;
  using Word = typename L::Word;
  constexpr int CALLS = WIDTH / DROPOUT_KEYS;  // of a row
  constexpr int ROWS = CALLS < L::COUNT ? L::COUNT / CALLS : 1;
  static_assert(WIDTH % DROPOUT_KEYS == 0 && (CALLS % L::COUNT == 0 || L::COUNT % CALLS == 0));
  const Dropout<A> dropout(task.p, task.b);
  for (int r = first; r < last; r += ROWS)
    for (int call = 0; call < CALLS; call += L::COUNT) {
      Word block, i, h;
      for (int l = 0; l < L::COUNT; ++l) {
        block[l] = j / DROPOUT_KEYS + call + l % CALLS;
        i[l] = task.query(r + l / CALLS), h[l] = task.head(r + l / CALLS);
      }
      typename L::Float factor[DROPOUT_KEYS];
      dropout.template factors<L>(block, i, h, factor);
      interleave<L>(factor);
      for (int n = 0; n < DROPOUT_KEYS; ++n, to += L::COUNT) L::store(to, factor[n]);
    }
}

// The weights of one row and of keys [j, j + keys), times their factors.
template <class A>
void drop_row(const Task& task, int row, int j, int keys, A* weights) {
  using L = Lanes<A>;
  constexpr int WIDTH = DROPOUT_KEYS * L::COUNT;
  A factor[WIDTH];
  for (int n = 0; n < keys; n += WIDTH) {
    row_factors<A, WIDTH>(task, j + n, row, row + 1, factor);
    for (int l = 0; l < WIDTH && n + l < keys; ++l) weights[n + l] *= factor[l];
  }
}

// Queries in the lanes: the weights [keys, width] of `width` rows from `row` on and of keys [j, j +
// keys), j a multiple of DROPOUT_KEYS, times their factors.
template <class A>
void drop_columns(const Task& task, int row, int width, int j, int keys, A* weights) {
  using L = Lanes<A>;
  using Word = typename L::Word;
  const Dropout<A> dropout(task.p, task.b);
  for (int lane = 0; lane < width; lane += L::COUNT) {
    Word i, h;
    for (int l = 0; l < L::COUNT; ++l)
      i[l] = task.query(row + lane + l), h[l] = task.head(row + lane + l);
    for (int n = 0; n < keys; n += DROPOUT_KEYS) {
      typename L::Float factor[DROPOUT_KEYS];
      dropout.template factors<L>(Word{} + uint32_t((j + n) / DROPOUT_KEYS), i, h, factor);
      for (int l = 0; l < DROPOUT_KEYS && n + l < keys; ++l) {
        A* const at = weights + (n + l) * width + lane;
        L::store(at, L::load(at) * factor[l]);
      }
    }
  }
}

}  // namespace atx::ATX_TARGET
