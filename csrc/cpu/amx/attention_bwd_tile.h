// What the backward multiplies, laid out in tiles (tiles.h): a block of keys, a tile of rows. A row
// with an inf or a nan in it is left out where numbers of other rows are added to its products, for
// a weight of 0 times such a number is nan; it is listed, to be added to those that attend to it.
#pragma once
#include "csrc/cpu/amx/pack.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

inline int tiles_of(int n, int size) { return (n + size - 1) / size; }

// Rows of a tensor, some of them nonfinite: which.
template <class T>
struct OddRows {
  int* index;
  int count;

  // Takes the nonfinite ones of rows n ... n + 31 out of `rows`; returns the largest |number| of
  // the others, as bits.
  int take_out(const T* (&rows)[TILE_DEPTH], int cols, int n) {
    int top = 0;
    for (int l = 0; l < TILE_DEPTH; ++l) {
      if (!rows[l]) continue;
      const int x = largest(rows[l], cols);
      if (x < INFINITE<T>) {
        top = x > top ? x : top;
      } else {
        index[count++] = n + l;
        rows[l] = nullptr;
      }
    }
    return top;
  }
};

template <class T>
float magnitude(int bits) {
  return to_float(T{uint16_t(bits)});
}

// Where key j lies among the 32 keys of a row of dX: two vectors of 16 keys, as pairs.
constexpr int place_in_row(int j) { return j % TILE_ROWS * 2 + j % TILE_DEPTH / TILE_ROWS; }

// Keys of a block: as columns for the products with queries, as rows for those with dX.
template <class T, int BLOCK_KV>
struct TileKeys {
  static constexpr int STEPS = BLOCK_KV / TILE_DEPTH;

  T *k_t, *v_t;  // [BLOCK_KV / 16][depth] tiles [16 pairs of dims, 16 keys]
  T* k;          // [dims / 16][STEPS] tiles [16 pairs of keys as place_in_row says, 16 dims]
  OddRows<T> odd;
  float largest_v;  // |number|, of the finite rows
  int depth_k, depth_v;

  void take(Scratch& scratch, const AttentionParams& p) {
    depth_k = tiles_of(p.D, TILE_DEPTH), depth_v = tiles_of(p.Dv, TILE_DEPTH);
    k_t = scratch.take<T>(int64_t(BLOCK_KV) * depth_k * TILE_DEPTH);
    v_t = scratch.take<T>(int64_t(BLOCK_KV) * depth_v * TILE_DEPTH);
    k = scratch.take<T>(int64_t(BLOCK_KV) * depth_k * TILE_DEPTH);
    odd.index = scratch.take<int>(BLOCK_KV);
  }

  void load(const Task& task, int j0, int keys) {
    const AttentionParams& p = task.p;
    odd.count = 0;
    int top = 0;
    const int wide = tiles_of(keys, 2 * TILE_DEPTH) * 2 * TILE_DEPTH;  // whole panels
    for (int n = 0; n < wide; n += TILE_DEPTH) {
      const T *keys_of[TILE_DEPTH], *values_of[TILE_DEPTH];
      for (int l = 0; l < TILE_DEPTH; ++l) {
        const int j = j0 + n + l;
        const bool exists = n + l < keys;
        keys_of[l] = exists ? static_cast<const T*>(p.k) + task.key_offset(p.k_stride, j) : nullptr;
        values_of[l] =
            exists ? static_cast<const T*>(p.v) + task.key_offset(p.v_stride, j) : nullptr;
      }
      pack_columns_of(keys_of, p.D, k_t + int64_t(n) * depth_k * TILE_DEPTH);
      pack_columns_of(values_of, p.Dv, v_t + int64_t(n) * depth_v * TILE_DEPTH);
      odd.take_out(keys_of, p.D, n);
      const T* placed[TILE_DEPTH];
      for (int l = 0; l < TILE_DEPTH; ++l) placed[place_in_row(l)] = keys_of[l];
      pack_tile_pairs(placed, p.D, k + n / TILE_DEPTH * TILE_HALVES, STEPS * TILE_HALVES);
      for (const T* const row : values_of)
        if (const int x = row ? largest(row, p.Dv) : 0; x < INFINITE<T> && x > top) top = x;
    }
    largest_v = magnitude<T>(top);
  }

 private:
  static void pack_columns_of(const T* const (&rows)[TILE_DEPTH], int cols, T* to) {
    for (int half = 0; half < 2; ++half) {
      const T* part[TILE_ROWS];
      for (int l = 0; l < TILE_ROWS; ++l) part[l] = rows[half * TILE_ROWS + l];
      pack_tile_columns(part, cols, to + half * tiles_of(cols, TILE_DEPTH) * TILE_HALVES);
    }
  }
};

// A tensor's rows of the tiles of a task, each laid out when it is first asked for: as they lie for
// the products with keys, transposed for those with weights.
template <class T>
struct TileRows {
  // Of the tile that was asked for last:
  T* rows;  // [rows / 16][depth] tiles [16 rows, 32 dims]
  T* t;     // [dims / 16][rows / 32] tiles [16 dims, 32 rows]
  OddRows<T> odd;
  float largest_number;  // |number|, of the finite rows
  int depth;
  int64_t row_t;  // of t: numbers from one 16 dims to the next

  void take(Scratch& scratch, int n_tiles, int n, int cols) {
    depth = tiles_of(cols, TILE_DEPTH), most_ = n, tiles_ = n_tiles;
    row_t = int64_t(tiles_of(n, TILE_DEPTH)) * TILE_HALVES;
    all_ = scratch.take<T>(n_tiles * 2 * size());
    odd_index_ = scratch.take<int>(int64_t(n_tiles) * n);
    known_ = scratch.take<Known>(n_tiles);
  }
  // Of another task.
  void forget() {
    for (int n = 0; n < tiles_; ++n) known_[n].odd = NOT_LAID_OUT;
  }

  // Rows that are not alive count as zeros.
  void find(int tile, const Task& task, const void* tensor, const Strides& stride, int cols,
            const bool* alive) {
    rows = all_ + tile * 2 * size(), t = rows + size();
    odd.index = odd_index_ + int64_t(tile) * most_;
    Known& known = known_[tile];
    if (known.odd == NOT_LAID_OUT) {
      known.largest = lay_out(task, static_cast<const T*>(tensor), stride, cols, alive);
      known.odd = odd.count;
    }
    odd.count = known.odd, largest_number = known.largest;
  }

 private:
  static constexpr int NOT_LAID_OUT = -1;
  struct Known {
    int odd;
    float largest;
  };

  int64_t size() const { return row_t * 2 * depth; }
  float lay_out(const Task& task, const T* tensor, const Strides& stride, int cols,
                const bool* alive) {
    odd.count = 0;
    int top = 0;
    for (int n = 0; n < task.rows(); n += TILE_DEPTH) {
      const T* from[TILE_DEPTH];
      for (int l = 0; l < TILE_DEPTH; ++l)
        from[l] =
            n + l < task.rows() && alive[n + l] ? tensor + task.row_offset(stride, n + l) : nullptr;
      for (int half = 0; half < 2; ++half) {
        const T* part[TILE_ROWS];
        for (int l = 0; l < TILE_ROWS; ++l) part[l] = from[half * TILE_ROWS + l];
        pack_tile_rows(part, cols, rows + int64_t(n + half * TILE_ROWS) * depth * TILE_DEPTH);
      }
      T* const to = t + n / TILE_DEPTH * TILE_HALVES;
      int x = pack_transposed(from, cols, to, row_t);
      if (x >= INFINITE<T>) {
        x = odd.take_out(from, cols, n);
        pack_transposed(from, cols, to, row_t);
      }
      top = x > top ? x : top;
    }
    return magnitude<T>(top);
  }

  T* all_;          // [tiles][2][size()]
  int* odd_index_;  // [tiles][most_]
  Known* known_;    // [tiles]
  int most_, tiles_;
};

}  // namespace atx::ATX_TARGET
