// Attention of a task with many rows of bf16 or f16, on the tile registers. As csrc/cpu/panels.h:
// the rows form panels of PANEL queries, one query per lane; tile by tile of keys, for each panel
//   Sᵀ = K Qᵀ;  m' = max(m, S);  P = exp(S - m')
//   l = l·exp(m - m') + sum P;  Oᵀ = Oᵀ·exp(m - m') + Vᵀ Pᵀ
// but S is f32, P has 16 bits, and everything that is multiplied lies in tiles: K as A [16 keys, 32
// dims], Qᵀ as B [16 pairs of dims, 16 queries], Vᵀ as A [16 dims, 32 keys], Pᵀ as B [16 pairs of
// keys, 16 queries]. A chunk of keys is laid out so at a time, and streams past each panel, whose
// scores and output stay in L1. With a block mask, keys are laid out when a panel sees them first.
// Tiles of keys start at multiples of KEY_TILE, and one product sums 32 keys counted from key 0:
// which others are in the panel or the task does not change a row's sums.
// Against torch's SDPA, which uses the tile registers too, one thread, B1 H8 S2048, D 64 and 128,
// median of 20 interleaved rounds: bf16 1.40x and 1.15x, causal 1.57x and 1.37x; f16 1.30x and
// 1.10x, causal 1.53x and 1.25x. At S 512 (40 rounds) bf16 has 1.25x and 1.09x, f16 1.24x
// and 1.04x.
#pragma once
#include "csrc/cpu/amx/attention_fwd.h"
#include "csrc/cpu/amx/pack.h"
#include "csrc/cpu/amx/softmax.h"
#include "csrc/cpu/amx/tiles.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/finish_rows.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/softmax.h"

namespace atx::ATX_TARGET {

template <class T>
class TilePanels {
  using L = Lanes<float>;
  static constexpr int COLUMN = TILE_ROWS;     // queries of a tile
  static constexpr int PANEL = 2 * COLUMN;     // one block of tiles wide
  static constexpr int KEY_STEP = TILE_DEPTH;  // keys of one product with the values
  static constexpr int KEY_TILE = BLOCK_KV;
  static constexpr int CHUNK = 4 * KEY_TILE;  // 128 KB of k and v at D 64: a fraction of the L2
  static constexpr int64_t MOST_LAID_OUT = 2 << 20;  // bytes of k and v: the L2

 public:
  using Accumulator = float;
  static constexpr int TASK_ROWS = TILE_BLOCK_ROWS;
  static constexpr bool LOOKS_AHEAD = false;

  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    depth_ = tiles(p.D, TILE_DEPTH);
    dims_ = tiles(p.Dv, 2 * TILE_ROWS) * 2 * TILE_ROWS;
    const int64_t padded = tiles(rows, PANEL) * PANEL;
    q_ = scratch.take<T>(padded * depth_ * TILE_DEPTH);
    o_ = scratch.take<float>(padded * dims_);
    max_ = scratch.take<float>(padded);
    sum_ = scratch.take<float>(padded);
    slots_ = slots(p);
    step_ = scratch.take<int>(slots_);
    odd_ = scratch.take<uint32_t>(slots_);
    k_ = scratch.take<T>(int64_t(slots_) * KEY_STEP * depth_ * TILE_DEPTH);
    value_row_ = int64_t(slots_) * TILE_HALVES;
    v_ = scratch.take<T>(int64_t(slots_) * KEY_STEP * dims_);
    s_ = scratch.take<float>(KEY_TILE * PANEL);
    alpha_ = scratch.take<float>(COLUMN);
  }

  template <class Score>
  void attend(const Task& task, const Score* scores) {
    if (task.b != b_ || task.hk != hk_) {
      for (int n = 0; n < slots_; ++n) step_[n] = NOTHING;
      b_ = task.b, hk_ = task.hk;
    }
    const int i1 = task.i0 + task.queries;
    const int last = end_before(scores, task.group, task.i0, i1, task.seq.sk);
    if (last == 0) return store_zeros<float>(task);
    load_queries(task);
    // With a block mask a panel sees few tiles, and others than its neighbors: it walks through all
    // of them, its scores and output in L1, and finds them laid out if any query before it has seen
    // them.
    const int chunk = Score::SPARSE ? last : CHUNK;
    for (int c0 = next_key(scores, task.group, task.i0, i1, 0) / chunk * chunk; c0 < last;
         c0 += chunk)
      for (int row = 0; row < task.rows(); row += PANEL)
        panel(task, scores, row, c0, c0 + chunk < last ? c0 + chunk : last);
    store_rows(task);
  }

 private:
  static int tiles(int n, int size) { return (n + size - 1) / size; }
  // Without a mask, of one chunk; with one, of as many keys as stay in the cache.
  int slots(const AttentionParams& p) const {
    const int64_t key_bytes = sizeof(T) * (int64_t(depth_) * TILE_DEPTH + dims_);
    const int64_t fit = MOST_LAID_OUT / (key_bytes * KEY_TILE) * KEY_TILE;
    const int64_t most = p.blocks.visited && fit > CHUNK ? fit : CHUNK;
    return int(p.Sk < most ? tiles(p.Sk, KEY_TILE) * KEY_TILE : most) / KEY_STEP;
  }
  static int align_key(int j) { return j / KEY_STEP * KEY_STEP; }

  // Pointers to the rows of a tensor from `row` on, null where there are none; returns how many
  // exist.
  template <class U>
  static int row_pointers(const Task& task, U* tensor, const Strides& stride, int row,
                          U* (&rows)[COLUMN]) {
    const int n = task.rows() - row < COLUMN ? task.rows() - row : COLUMN;
    for (int l = 0; l < COLUMN; ++l)
      rows[l] = l < n ? tensor + task.row_offset(stride, row + l) : nullptr;
    return n;
  }

  void load_queries(const Task& task) {
    const AttentionParams& p = task.p;
    const int padded = tiles(task.rows(), PANEL) * PANEL;
    for (int row = 0; row < padded; row += COLUMN) {
      const T* rows[COLUMN];
      row_pointers(task, static_cast<const T*>(p.q), p.q_stride, row, rows);
      pack_tile_columns(rows, p.D, q_ + int64_t(row) * depth_ * TILE_DEPTH);
    }
    for (int r = 0; r < padded; ++r) max_[r] = -INFINITY, sum_[r] = 0;
    memset(o_, 0, sizeof(float) * padded * dims_);
  }

  // Keys [from, from + keys) laid out, unless they are; returns the slot of the first. Rows of
  // values with an inf or a nan in them are taken out: a weight of 0 times such a value is nan.
  int load_keys(const Task& task, int from, int keys) {
    const int first = from / KEY_STEP, steps = tiles(keys, KEY_STEP), slot = first % slots_;
    for (int n = 0; n < steps; ++n)
      if (step_[slot + n] != first + n) load_step(task, first + n, slot + n);
    return slot;
  }
  void load_step(const Task& task, int step, int slot) {
    const AttentionParams& p = task.p;
    const T *k[2][TILE_ROWS], *v[KEY_STEP];
    for (int l = 0; l < KEY_STEP; ++l) {
      const int j = step * KEY_STEP + l;
      const bool exists = j < task.seq.sk;
      k[l / TILE_ROWS][l % TILE_ROWS] = exists ? key(task, j) : nullptr;
      v[l] = exists ? value(task, j) : nullptr;
    }
    T* const keys_to = k_ + int64_t(slot) * 2 * depth_ * TILE_HALVES;
    pack_tile_rows(k[0], p.D, keys_to);
    pack_tile_rows(k[1], p.D, keys_to + depth_ * TILE_HALVES);

    T* const values_to = v_ + int64_t(slot) * TILE_HALVES;
    step_[slot] = step;
    odd_[slot] = 0;
    if (pack_transposed(v, p.Dv, values_to, value_row_) < INFINITE<T>) return;
    for (int l = 0; l < KEY_STEP; ++l) {
      if (!v[l] || finite(v[l], p.Dv)) continue;
      odd_[slot] |= 1u << l;
      v[l] = nullptr;
    }
    pack_transposed(v, p.Dv, values_to, value_row_);
  }
  static const T* key(const Task& task, int j) {
    return static_cast<const T*>(task.p.k) + task.key_offset(task.p.k_stride, j);
  }
  static const T* value(const Task& task, int j) {
    return static_cast<const T*>(task.p.v) + task.key_offset(task.p.v_stride, j);
  }
  static bool finite(const T* row, int n) {
    for (int d = 0; d < n; ++d)
      if ((row[d].bits & INFINITE<T>) == INFINITE<T>) return false;
    return true;
  }

  // Of the keys [j0, j1) those that the panel's queries see, each stretch of them within a tile.
  template <class Score>
  void panel(const Task& task, const Score* scores, int row, int j0, int j1) {
    const int rows = row + PANEL < task.rows() ? PANEL : task.rows() - row;
    const int i0 = task.query(row), i1 = task.query(row + rows - 1) + 1;
    for (int j = j0; j < j1;) {
      const int begin = next_key(scores, task.group, i0, i1, j);
      const int tile_end = begin / KEY_TILE * KEY_TILE + KEY_TILE;
      const Stretch s =
          next_stretch(scores, task.group, i0, i1, begin, tile_end < j1 ? tile_end : j1);
      if (s.begin >= s.end) return;
      const int from = align_key(s.begin);
      attend_stretch(task, scores, row, rows, i0, i1, from, s.end - from);
      j = s.end;
    }
  }
  template <class Score>
  void attend_stretch(const Task& task, const Score* scores, int row, int rows, int i0, int i1,
                      int from, int keys) {
    const AttentionParams& p = task.p;
    const int steps = tiles(keys, KEY_STEP), depth = depth_ * TILE_HALVES;
    const int slot = load_keys(task, from, keys);
    const T* const k = k_ + int64_t(slot) * 2 * depth;
    const T* const q = q_ + int64_t(row) * depth_ * TILE_DEPTH;
    for (int n = 0; n < 2 * steps; n += 2)
      multiply_block<T, Block::SET>(depth_, {k + int64_t(n) * depth, depth}, {q, depth},
                                    s_ + n * TILE_FLOATS, TILE_FLOATS, SCORE_COLUMN);

    for (int c = 0; c * COLUMN < rows; ++c) {
      float* const s = s_ + c * SCORE_COLUMN;
      if constexpr (Score::SPARSE) CappedProducts<float>(p).cap(keys * COLUMN, s);
      if (!Score::LINEAR || !full(scores, task.group, i0, i1, from, from + keys))
        apply_score(task, scores, row + c * COLUMN, COLUMN, from, keys, s);
      for (int n = keys * COLUMN; n < steps * KEY_STEP * COLUMN; ++n) s[n] = -INFINITY;
      weigh_column(task, log2_unit<float, Score>(p), row + c * COLUMN, from, steps, slot, s);
    }

    const T* const v = v_ + int64_t(slot) * TILE_HALVES;
    float* const o = o_ + int64_t(row) * dims_;
    const Tiles<T> weight = {weights(s_), 2 * SCORE_COLUMN, 2 * TILE_HALVES, 128};
    for (int d = 0; d < dims_ / TILE_ROWS; d += 2)
      multiply_block<T, Block::ADD_SPLIT>(steps, {v + d * value_row_, value_row_}, weight,
                                          o + d * TILE_FLOATS, TILE_FLOATS, COLUMN * dims_);
  }

  // The weights take the place of the scores.
  static const T* weights(const float* s) { return reinterpret_cast<const T*>(s); }

  void weigh_column(const Task& task, float unit, int row, int from, int steps, int slot,
                    float* s) {
    float* const o = o_ + int64_t(row) * dims_;
    uint16_t attended[KEY_TILE];  // bit l: query row + l attends to the odd key
    each_odd(steps, slot, [&](int n) {
      attended[n] = 0;
      for (int l = 0; l < COLUMN; ++l) attended[n] |= (s[n * COLUMN + l] != -INFINITY) << l;
    });
    if (weigh<T>(steps * KEY_STEP, unit, s, max_ + row, sum_ + row, alpha_)) {
      const L::Float shrink = L::load(alpha_);
      for (int d = 0; d < dims_; ++d) L::store(o + d * COLUMN, L::load(o + d * COLUMN) * shrink);
    }
    each_odd(steps, slot, [&](int n) {
      if (attended[n])
        add_odd_value(value(task, from + n), task.p.Dv, attended[n], n, weights(s), o);
    });
  }
  // f(n) for the odd keys of some steps, n counted from their first key.
  template <class F>
  void each_odd(int steps, int slot, F f) const {
    for (int n = 0; n < steps; ++n)
      for (uint32_t rest = odd_[slot + n]; rest; rest &= rest - 1)
        f(n * KEY_STEP + lowest_bit(rest));
  }
  // o += p v for a row of values that is not finite. A weight that underflowed to 0 is none the
  // less one of a key attended to.
  static void add_odd_value(const T* value, int dims, unsigned attended, int j, const T* weights,
                            float* o) {
    for (int l = 0; l < COLUMN; ++l) {
      if (!(attended >> l & 1)) continue;
      const T* const upper = weights + j / 2 * 2 * TILE_DEPTH + 2 * l + j % 2;
      const float stored = to_float(upper[0]) + to_float(upper[TILE_DEPTH]);
      const float weight = stored == 0 ? 0x1p-126f : stored;
      for (int d = 0; d < dims; ++d) o[d * COLUMN + l] += weight * to_float(value[d]);
    }
  }

  void store_rows(const Task& task) {
    const AttentionParams& p = task.p;
    for (int row = 0; row < task.rows(); row += COLUMN) {
      T* rows[COLUMN];
      const int n = row_pointers(task, static_cast<T*>(p.o), p.o_stride, row, rows);
      const L::Float factor =
          finish_rows<L>(task, row, n, L::load(max_ + row), L::load(sum_ + row) / Weight<T>::UNIT);
      unpack_columns<float>(o_ + int64_t(row) * dims_, COLUMN, factor / Weight<T>::STORED, n, p.Dv,
                            rows);
    }
  }

  static constexpr int SCORE_COLUMN = KEY_TILE * COLUMN;  // scores of 16 queries
  static constexpr int NOTHING = -1;

  TileRegisters registers_;
  int depth_;          // tiles over D
  int dims_;           // Dv up to whole blocks
  T* q_;               // [rows / 16][depth_] tiles
  float* o_;           // [rows / 16][dims_, 16]
  float *max_, *sum_;  // [rows]
  float* s_;           // [2][KEY_TILE, 16]
  float* alpha_;       // [16]

  // Keys of (b_, hk_) that are laid out: step s of them, 32 keys, in slot s % slots_ if anywhere.
  int b_ = NOTHING, hk_ = NOTHING;
  int slots_;          // whole KEY_TILEs
  int64_t value_row_;  // of v_: numbers from one 16 dims to the next
  int* step_;          // [slots_], the step that a slot holds, or NOTHING
  uint32_t* odd_;      // [slots_], bit l: values of the step's key l are not all finite
  T *k_, *v_;          // [slots_][2][depth_] and [dims_ / 16][slots_] tiles
};

}  // namespace atx::ATX_TARGET
