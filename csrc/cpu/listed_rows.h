// Rows that a list names: what topk attention multiplies with. A task's rows are the heads of one
// query; those that share a list have their products with it at once.
#pragma once
#include "csrc/core/lists.h"
#include "csrc/cpu/few_products.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/topk_attention.h"

namespace atx::ATX_TARGET {

// Up to LISTED_BLOCK row numbers.
struct RowNumbers {
  int count;
  int32_t number[LISTED_BLOCK];
};

// S = X Yᵀ · factor, x [rows, depth] and the numbered rows of y, into s [rows, LISTED_BLOCK].
template <class A>
void multiply_listed(DType dtype, int rows, int depth, const A* x, const void* y, int64_t y_row,
                     const RowNumbers& which, A* s) {
  using L = Lanes<A>;
  constexpr int MAX = FEW_ROWS<L>;
  with_dtype<A>(dtype, y, [&]<class T>(const T* y) {
    const auto row = [y, y_row, at = which.number](int n) { return y + at[n] * y_row; };
    for (int r = 0; r < rows; r += MAX)
      by_rows<MAX>(rows - r < MAX ? rows - r : MAX, [&]<int ROWS>() {
        dot_products<L, ROWS>(depth, rows - r < MAX ? rows - r : MAX, x + int64_t(r) * depth,
                              which.count, row, s + r * LISTED_BLOCK, LISTED_BLOCK);
      });
  });
}

// O = O·alpha + S Y, o [rows, width up to whole vectors]. alpha null: 1.
template <class A>
void add_listed(DType dtype, int rows, int width, const A* s, const void* y, int64_t y_row,
                const RowNumbers& which, const A* alpha, A* o, int64_t o_row) {
  using L = Lanes<A>;
  constexpr int MAX = FEW_ROWS<L>;
  with_dtype<A>(dtype, y, [&]<class T>(const T* y) {
    const auto row = [y, y_row, at = which.number](int n) { return y + at[n] * y_row; };
    for (int r = 0; r < rows; r += MAX)
      by_rows<MAX>(rows - r < MAX ? rows - r : MAX, [&]<int ROWS>() {
        add_weighted<L, ROWS>(rows - r < MAX ? rows - r : MAX, s + r * LISTED_BLOCK, LISTED_BLOCK,
                              which.count, row, width, alpha ? alpha + r : nullptr, o + r * o_row,
                              o_row);
      });
  });
}

template <class L>
int whole_vectors(int n) {
  return (n + L::COUNT - 1) / L::COUNT * L::COUNT;
}

// The keys of a query's list, without padding, a block at a time.
class ListedKeys {
 public:
  ListedKeys(const KeyLists& lists, int sk, int b, int h, int i)
      : list_(list_of(lists, b, h, i)), length_(lists.length), sk_(sk) {}

  // Fills a block; false if there are no more keys.
  bool next(RowNumbers* keys) {
    keys->count = 0;
    for (; next_ < length_ && keys->count < LISTED_BLOCK; ++next_)
      if (is_key(list_[next_], sk_)) keys->number[keys->count++] = list_[next_];
    return keys->count > 0;
  }

 private:
  const int32_t* list_;
  int length_, sk_, next_ = 0;
};

// Calls f(first row, rows) for the rows of a group that share their lists.
template <class F>
void by_lists(const KeyLists& lists, int group, F f) {
  const int rows = lists.sharing < group ? lists.sharing : group;
  for (int r = 0; r < group; r += rows) f(r, rows);
}

}  // namespace atx::ATX_TARGET
