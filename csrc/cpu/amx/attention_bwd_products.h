// What attention_bwd_gradients.h multiplies, on the tile registers. Everything that enters a
// product has 16 bits, sums are float:
//   S = Q Kᵀ,  dO Vᵀ    A [16 rows, 32 dims]   B [16 pairs of dims, 16 keys]
//   dQ += dX K          A [16 rows, 32 keys]   B [16 pairs of keys, 16 dims]
//   dVᵀ += dOᵀ P, dKᵀ += Qᵀ dX   A [16 dims, 32 rows]   B [16 pairs of rows, 16 keys]
// 32 rows and a panel of keys at a time: their scores stay in L1. Weights and dX take the place of
// float rows as A, and are paired with those of the next row to B before they leave the registers.
// Rounded to 16 bits once, they leave a smaller error than torch's flash backward has in each of
// dQ, dK and dV (rms, S 1024, D 64 and 128, dense and causal: 0.67x to 0.97x of it).
// Against AVX-512, one thread, B1 H8 S1024, D 64 and 128, least time of 20 runs, before the two
// steps below: bf16 4.0x and 4.9x, causal 3.7x and 4.5x; f16 3.9x and 4.6x, causal 3.9x and 4.0x.
// S 2048, least time of 9 to 15 interleaved runs: laying out rows once per task 1.07x and 1.09x;
// pairing in registers instead of from memory, rounding in integers (vcvtne2ps2bf16 takes 2.7
// cycles), and no test for dropout where there is none 1.15x and 1.10x.
// As fast, within noise: tiles of 96 to 256 rows, blocks of 256 to 512 keys; dQ with columns of K
// outside and strips of rows inside. Slower: scores of two or four strips at a time, 0.91x. No
// faster: the next strip's products, and those with weights and dX of the last panel, between the
// rows of this strip.
#pragma once
#include <cmath>

#include "csrc/cpu/amx/attention_bwd.h"
#include "csrc/cpu/amx/attention_bwd_tile.h"
#include "csrc/cpu/amx/rounding.h"
#include "csrc/cpu/amx/softmax.h"
#include "csrc/cpu/amx/tiles.h"
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_differences.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// attention_bwd_differences.h's Exponential, as the forward computes it (softmax.h). Results that
// underflow are flushed to 0 (TileRegisters).
struct TileExponential {
  using Float = Lanes<float>::Float;
  static ATX_HD Float of(Float x) { return (Float)exp2_weight<bf16>((__m512)x); }
};

template <class T>
class TileProducts {
  using L = Lanes<float>;
  using Float = L::Float;
  static constexpr int PANEL = BWD_PANEL<float>, PANEL_STEPS = PANEL / TILE_DEPTH;
  static constexpr int COLUMNS = PANEL / TILE_ROWS;  // tiles of keys of a panel
  static constexpr int STRIP = TILE_DEPTH;           // rows whose scores are formed at a time
  static constexpr int STEPS = TILE_BWD_BLOCK_KV / TILE_DEPTH;  // of the keys of a block

 public:
  using Accumulator = float;
  static constexpr int BLOCK_Q = TILE_BWD_BLOCK_Q, BLOCK_KV = TILE_BWD_BLOCK_KV;

  // Arrays for tasks of up to `queries` queries, tiles of up to `rows` rows.
  void take(Scratch& scratch, const AttentionBwdParams& p, int queries, int rows) {
    const AttentionParams& f = p.fwd;
    dims_k_ = tiles_of(f.D, TILE_DEPTH) * TILE_DEPTH;
    dims_v_ = tiles_of(f.Dv, TILE_DEPTH) * TILE_DEPTH;
    padded_ = tiles_of(rows, STRIP) * STRIP;
    tile_queries_ = queries_of_tile(f, BLOCK_Q);
    keys_.take(scratch, f);
    const int tiles = tiles_of(queries, tile_queries_), all_tiles = tiles_of(f.Sq, tile_queries_);
    q_.take(scratch, queries > 0 ? tiles : all_tiles, rows, f.D);
    d_o_.take(scratch, queries > 0 ? tiles : all_tiles, rows, f.Dv);
    statistics_.take(scratch, padded_);
    dq_ = scratch.take<float>(int64_t(tiles) * padded_ * dims_k_);
    dq_unit_ = scratch.take<float>(tiles);
    dk_t_ = scratch.take<float>(int64_t(BLOCK_KV) * dims_k_);
    dv_t_ = scratch.take<float>(int64_t(BLOCK_KV) * dims_v_);
    s_ = scratch.take<float>(STRIP * PANEL);
    dp_ = scratch.take<float>(STRIP * PANEL);
    if (f.dropout > 0) kept_.take(scratch, rows);
    dx_ = scratch.take<T>(int64_t(padded_) * BLOCK_KV);
    column_ = int64_t(padded_) * TILE_ROWS;
    weight_pairs_ = scratch.take<T>(column_ * COLUMNS);
    dx_pairs_ = scratch.take<T>(column_ * COLUMNS);
    unwanted_ = scratch.take<T>(f.D > f.Dv ? f.D : f.Dv);
  }

  template <class Score>
  void begin(const BwdTask& t, const Score*) {
    const AttentionParams& f = t.p.fwd;
    scale_ = missing_scale<float, Score>(f);
    const float slope = Score::LINEAR ? 1 : float(::fabs(f.scale));  // the most of dX / dY
    const float kept = kept_factor<float>(f);
    weight_unit_ = Unit<T>::for_bound(kept);
    product_bound_ = slope * kept * f.Dv, delta_bound_ = slope;
    q_.forget();
    d_o_.forget();
    if (!t.of_queries) return;
    const int tiles = tiles_of(t.i1 - t.i0, tile_queries_);
    memset(dq_, 0, sizeof(float) * tiles * padded_ * dims_k_);
    for (int n = 0; n < tiles; ++n) dq_unit_[n] = 1;
  }

  void clear_keys(const BwdTask& t) {
    if (!t.of_keys) return;
    memset(dk_t_, 0, sizeof(float) * BLOCK_KV * dims_k_);
    memset(dv_t_, 0, sizeof(float) * BLOCK_KV * dims_v_);
    dk_unit_ = 1;
  }
  void load_keys(const BwdTask& t, int j0, int j1) {
    keys_.load(t.rows(t.i0, 0), j0, j1 - j0);
    j0_ = j0, j1_ = j1;
  }

  void load_rows(const BwdTask& t, const Task& task, int first, int last) {
    const AttentionBwdParams& p = t.p;
    statistics_.load(p, task);
    for (int r = task.rows(); r < padded_; ++r) statistics_.alive[r] = false;
    const int n = tile(t, task.i0);
    q_.find(n, task, p.fwd.q, p.fwd.q_stride, p.fwd.D, statistics_.alive);
    d_o_.find(n, task, p.d_o, p.d_o_stride, p.fwd.Dv, statistics_.alive);
    if (p.fwd.dropout > 0)
      kept_.draw(task, 0, task.rows(), j0_, j0_ + first * PANEL, j0_ + last * PANEL);
    unit_ = 1;
    if constexpr (!Unit<T>::ONE) {
      const float bound = largest_dx(task.rows());
      if (bound == 0) return;  // no dX but 0 or nan
      unit_ = Unit<T>::for_bound(bound);
      if (t.of_keys) convert(unit_, &dk_unit_, dk_t_, int64_t(BLOCK_KV) * dims_k_);
      if (t.of_queries)
        convert(unit_, dq_unit(t, task.i0), dq(t, task.i0), int64_t(padded_) * dims_k_);
    }
  }

  // P and dX of rows [first, last) and panel n, and what they add to dK and dV; also(row, vector,
  // dY) of each.
  template <class Score, class Also>
  void panel(const BwdTask& t, const Score* scores, const Task& task, int n, int first, int last,
             Also also) {
    const int strips = tiles_of(task.rows(), STRIP);
    const int begin = first < last ? first / STRIP : 0;
    const int end = first < last ? tiles_of(last, STRIP) : 0;
    for (int strip = 0; strip < strips; ++strip) {
      const int row = strip * STRIP;
      if (strip < begin || strip >= end) {
        clear(dx_of(row, n), STEPS);
        continue;
      }
      form(task, scores, n, row, first > row ? first : row, last < row + STRIP ? last : row + STRIP,
           also);
    }
    if (begin == end || !t.of_keys) return;
    if (t.p.d_v)
      add_to_keys(begin, end, d_o_, weight_pairs_, dims_v_, t.p.fwd.Dv, t.p.d_o_stride,
                  static_cast<const T*>(t.p.d_o), task, dv_t_ + int64_t(n) * PANEL * dims_v_);
    if (t.p.d_k)
      add_to_keys(begin, end, q_, dx_pairs_, dims_k_, t.p.fwd.D, t.p.fwd.q_stride,
                  static_cast<const T*>(t.p.fwd.q), task, dk_t_ + int64_t(n) * PANEL * dims_k_);
  }

  // dQ += dX K, the panels of the block that a strip of rows sees.
  template <class Score>
  void finish_tile(const BwdTask& t, const Score* scores, const Task& task, int, int) {
    if (!t.of_queries || !t.p.d_q) return;
    const KeyPanels<float> panels = {j0_, j1_ - j0_};
    for (int row = 0; row < task.rows(); row += STRIP) {
      const int rest = task.rows() - row, i = task.query(row);
      const int queries = task.query(row + (rest < STRIP ? rest : STRIP) - 1) + 1 - i;
      const int first = panels.first(scores, task.group, i, queries);
      const int last = panels.last(scores, task.group, i, queries);
      if (first >= last) continue;
      float* const to = dq(t, task.i0) + int64_t(row) * dims_k_;
      const int64_t next = STEPS * TILE_HALVES, at = first * PANEL_STEPS * TILE_HALVES;
      for (int d = 0; d < dims_k_ / TILE_ROWS; d += 2)
        multiply_block<T, Block::ADD>((last - first) * PANEL_STEPS, {dx_of(row, first), next},
                                      {keys_.k + d * next + at, next}, to + d * TILE_FLOATS,
                                      dims_k_ * TILE_ROWS, TILE_FLOATS);
      for (int n = 0; n < keys_.odd.count; ++n)
        if (const int j = keys_.odd.index[n]; j >= first * PANEL && j < last * PANEL)
          add_odd_key(task, row, j, to);
    }
  }

  void store_queries(const BwdTask& t) const {
    const AttentionParams& f = t.p.fwd;
    for (int i = t.i0; i < t.i1; i += tile_queries_) {
      const Task task = t.rows(i, t.i1 - i < tile_queries_ ? t.i1 - i : tile_queries_);
      const float factor = scale_ / *dq_unit(t, i);
      for (int r = 0; r < task.rows(); ++r) {
        T* const to = static_cast<T*>(t.p.d_q) + task.row_offset(t.p.d_q_stride, r);
        const float* const from = dq_row(dq(t, i), r);
        for (int d = 0; d < f.D; d += L::COUNT)
          L::store(to + d, L::load(from + d / TILE_ROWS * TILE_FLOATS) * factor, f.D - d);
      }
    }
  }
  void store_keys(const BwdTask& t, int j0, int j1) const {
    const AttentionBwdParams& p = t.p;
    if (p.d_k)
      store_keys(t, j0, j1, p.d_k, p.d_k_stride, p.fwd.D, dims_k_, dk_t_, scale_ / dk_unit_);
    if (p.d_v)
      store_keys(t, j0, j1, p.d_v, p.d_v_stride, p.fwd.Dv, dims_v_, dv_t_, 1 / weight_unit_);
  }

 private:
  static void clear(T* tiles, int64_t next) {
    for (int m = 0; m < STRIP / TILE_ROWS; ++m)
      memset(tiles + m * next * TILE_HALVES, 0, PANEL_STEPS * TILE_BYTES);
  }
  // Tiles of dX of 32 rows from `row` on and of panel n; the next 16 rows lie STEPS tiles behind.
  T* dx_of(int row, int n) const {
    return dx_ + (int64_t(row / TILE_ROWS) * STEPS + n * PANEL_STEPS) * TILE_HALVES;
  }
  int tile(const BwdTask& t, int i) const { return (i - t.i0) / tile_queries_; }
  float* dq(const BwdTask& t, int i) const { return dq_ + int64_t(tile(t, i)) * padded_ * dims_k_; }
  float* dq_unit(const BwdTask& t, int i) const { return dq_unit_ + tile(t, i); }
  float* dq_row(float* tiles, int row) const {
    return tiles + int64_t(row / TILE_ROWS) * TILE_ROWS * dims_k_ + row % TILE_ROWS * TILE_ROWS;
  }

  // |dX| <= slope (kept |dO · V| + |delta|)
  float largest_dx(int rows) const {
    float delta = 0;
    for (int r = 0; r < rows; ++r) {
      const float x = ::fabs(statistics_.delta[r]);
      if (x > delta) delta = x;
    }
    return product_bound_ * d_o_.largest_number * keys_.largest_v + delta_bound_ * delta;
  }
  static void convert(float to, float* unit, float* sums, int64_t n) {
    if (*unit == to) return;
    const float factor = to / *unit;
    for (int64_t x = 0; x < n; x += L::COUNT) L::store(sums + x, L::load(sums + x) * factor);
    *unit = to;
  }

  // P and dX of rows [first, last), which lie in the strip that begins with `row`.
  template <class Score, class Also>
  void form(const Task& task, const Score* scores, int n, int row, int first, int last, Also also) {
    const int at = n * PANEL;
    multiply_keys(q_.rows, keys_.k_t, q_.depth, row, at, s_);
    multiply_keys(d_o_.rows, keys_.v_t, d_o_.depth, row, at, dp_);
    T* const dx = dx_of(row, n);
    T* const weight_pairs = weight_pairs_ + row / STRIP * TILE_HALVES;
    T* const dx_pairs = dx_pairs_ + row / STRIP * TILE_HALVES;
    const int64_t column = column_;
    const float weight_unit = weight_unit_, unit = unit_;
    const int rows = task.rows();
    first -= first % 2, last += last % 2;  // whole pairs; a row too many adds nothing
    if (last - first < STRIP) {
      clear(dx, STEPS);
      for (int c = 0; c < COLUMNS; ++c) {
        memset(weight_pairs + c * column, 0, TILE_BYTES);
        memset(dx_pairs + c * column, 0, TILE_BYTES);
      }
    }
    fetch_mask(task, scores, row + STRIP, STRIP, j0_ + at, PANEL);
    const Cells<float> cells = {task, statistics_, first, last, j0_ + at, j1_, j0_};
    const int skip = (first - row) * PANEL;
    Rounded<T> weights[PANEL_VECS], gradients[PANEL_VECS];  // of a row
    // Of the one before.
    Rounded<T> even_weights[PANEL_VECS] = {}, even_gradients[PANEL_VECS] = {};
    differences<float, PANEL_VECS, TileExponential>(
        cells, scores, s_ + skip, dp_ + skip, kept_,
        [&, row, rows, column, dx, weight_pairs, dx_pairs](int r, int v, Float weight, Float dy,
                                                           Float d) __attribute__((always_inline)) {
          if (r < rows) also(r, v, dy);
          if constexpr (!Unit<T>::ONE) weight *= weight_unit, d *= unit;
          weights[v] = weight, gradients[v] = d;
          if (v < PANEL_VECS - 1) return;
          const unsigned at = r - row;
          T* const to = dx + (at / TILE_ROWS * STEPS * TILE_ROWS + at % TILE_ROWS) * TILE_DEPTH;
#pragma GCC unroll 4
          for (int n = 0; n < PANEL_STEPS; ++n)
            _mm512_store_si512(to + n * TILE_HALVES, pairs(gradients[2 * n], gradients[2 * n + 1]));
          T* const w = weight_pairs + at / 2 * TILE_DEPTH;
          T* const x = dx_pairs + at / 2 * TILE_DEPTH;
#pragma GCC unroll 4
          for (int n = 0; n < PANEL_VECS; ++n)
            if (at % 2 == 0) {
              even_weights[n] = weights[n], even_gradients[n] = gradients[n];
            } else {
              _mm512_store_si512(w + n * column, pairs(even_weights[n], weights[n]));
              _mm512_store_si512(x + n * column, pairs(even_gradients[n], gradients[n]));
            }
        });
  }
  // to [32 rows, PANEL] = rows keysᵀ
  static void multiply_keys(const T* rows, const T* keys, int depth, int row, int key, float* to) {
    const int64_t next = depth * TILE_HALVES;
    rows += row / TILE_ROWS * next, keys += key / TILE_ROWS * next;
    for (int n = 0; n < COLUMNS; n += 2)
      multiply_block<T, Block::SET, PANEL* int(sizeof(float))>(
          depth, {rows, next}, {keys + n * next, next}, to + n * TILE_ROWS, TILE_ROWS * PANEL,
          TILE_ROWS);
  }

  // to [COLUMNS][dims, 16] += rowsᵀ [dims, strips begin ... end - 1] pairs
  void add_to_keys(int begin, int end, const TileRows<T>& rows, const T* pairs, int dims, int cols,
                   const Strides& stride, const T* tensor, const Task& task, float* to) const {
    const int64_t at = begin * TILE_HALVES, column = int64_t(dims) * TILE_ROWS;
    for (int d = 0; d < dims / TILE_ROWS; d += 2)
      for (int n = 0; n < COLUMNS; n += 2)
        multiply_block<T, Block::ADD>(end - begin, {rows.t + d * rows.row_t + at, rows.row_t},
                                      {pairs + n * column_ + at, column_},
                                      to + n * column + d * TILE_FLOATS, TILE_FLOATS, column);
    for (int n = 0; n < rows.odd.count; ++n) {
      const int r = rows.odd.index[n];
      if (r < begin * STRIP || r >= end * STRIP) continue;
      const T* const row = tensor + task.row_offset(stride, r);
      for (int x = 0; x < PANEL; ++x) {
        const float weight = to_float(
            pairs[x / TILE_ROWS * column_ + r / 2 * TILE_DEPTH + x % TILE_ROWS * 2 + r % 2]);
        float* const sums = to + x / TILE_ROWS * column + x % TILE_ROWS;
        for (int d = 0; weight != 0 && d < cols; ++d)
          sums[d * TILE_ROWS] += weight * to_float(row[d]);
      }
    }
  }
  // dQ of 32 rows += dX K for a nonfinite row of K.
  void add_odd_key(const Task& task, int row, int j, float* to) const {
    const AttentionParams& f = task.p;
    const T* const key = static_cast<const T*>(f.k) + task.key_offset(f.k_stride, j0_ + j);
    for (int r = 0; r < STRIP; ++r) {
      const float weight = to_float(
          dx_of(row + r / TILE_ROWS * TILE_ROWS,
                0)[j / TILE_DEPTH * TILE_HALVES + r % TILE_ROWS * TILE_DEPTH + place_in_row(j)]);
      float* const sums = dq_row(to, r);
      for (int d = 0; weight != 0 && d < f.D; ++d)
        sums[d / TILE_ROWS * TILE_FLOATS + d % TILE_ROWS] += weight * to_float(key[d]);
    }
  }

  void store_keys(const BwdTask& t, int j0, int j1, void* tensor, const Strides& stride, int cols,
                  int dims, const float* from, float factor) const {
    const Task task = t.rows(t.i0, 0);
    for (int n = 0; n < tiles_of(j1 - j0, TILE_DEPTH) * 2; ++n) {
      T* rows[TILE_ROWS];
      for (int c = 0; c < TILE_ROWS; ++c) {
        const int j = j0 + n * TILE_ROWS + c;
        rows[c] = j < j1 ? static_cast<T*>(tensor) + task.key_offset(stride, j) : unwanted_;
      }
      unpack_columns<float>(from + int64_t(n) * TILE_ROWS * dims, TILE_ROWS,
                            Lanes<float>::all(factor), TILE_ROWS, cols, rows);
    }
  }

  TileRegisters registers_;
  int dims_k_, dims_v_;                // D and Dv up to whole steps
  int padded_;                         // rows of a tile up to whole strips
  int tile_queries_;                   // queries of a tile
  int j0_, j1_;                        // keys of the block
  float scale_;                        // what dQ and dK lack
  float product_bound_, delta_bound_;  // largest_dx
  float weight_unit_, unit_;           // of weights; of dX of the tile and the block
  float dk_unit_;                      // of the sums in dk_t_
  TileKeys<T, BLOCK_KV> keys_;
  TileRows<T> q_, d_o_;
  RowStatistics<float> statistics_;
  float* dq_;            // of each tile of the task: [padded / 16][dims / 16] tiles
  float* dq_unit_;       // of each tile of the task
  float *dk_t_, *dv_t_;  // [BLOCK_KV / 16][dims, 16]
  float *s_, *dp_;       // [STRIP, PANEL]
  KeptBits<float, BLOCK_KV / DROPOUT_BLOCK> kept_;  // by dropout
  T* dx_;                                           // [padded / 16][STEPS] tiles [16 rows, 32 keys]
  T *weight_pairs_, *dx_pairs_;  // of a panel: [COLUMNS][padded / 32] tiles [16 pairs, 16 keys]
  int64_t column_;               // of those: numbers from one 16 keys to the next
  T* unwanted_;                  // a row for keys that do not exist
};

}  // namespace atx::ATX_TARGET
