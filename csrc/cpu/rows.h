// Attention of a task with few rows, as in decoding: k and v are read once, where they lie, and
// used for all rows of the group at once. Too few rows to fill the lanes of a panel, so here the
// lanes hold head dimensions for the products (S = Q Kᵀ by dot products, O += P V) and keys for the
// softmax.
// Against torch's enable_gqa, one AVX2 thread, 32 heads on 8, 8192 keys, D 128: f32 1.9x,
// bf16 8.5x, f16 4.3x; against the group hand-packed as query rows: 1.0x, 1.1x, 1.4x.
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/dropout_lanes.h"
#include "csrc/cpu/few_products.h"
#include "csrc/cpu/finish_rows.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/softmax.h"

namespace atx::ATX_TARGET {

template <class A>
class FewRows {
  using L = Lanes<A>;
  using Float = typename L::Float;

 public:
  static constexpr int MAX = FEW_ROWS<L>;

  void take(Scratch& scratch, const AttentionParams& p) {
    stride_ = (p.Dv + L::COUNT - 1) / L::COUNT * L::COUNT;
    q_ = scratch.take<A>(int64_t(MAX) * p.D);
    o_ = scratch.take<A>(MAX * stride_);
    part_ = scratch.take<A>(MAX * stride_);
    s_ = scratch.take<A>(MAX * BLOCK_KV);
    weights_ = scratch.take<A>(MAX * BLOCK_KV);
    if (p.dropout > 0) kept_.take(scratch, MAX);
  }

  template <class Score>
  void attend(const Task& task, const Score* scores) {
    load_rows(task);
    const int i1 = task.i0 + task.queries;
    const auto next = [&](int j) { return next_key(scores, task.group, task.i0, i1, j); };
    const auto end = [&](int j) { return end_before(scores, task.group, task.i0, i1, j); };
    const int last = end(task.seq.sk);
    for (int j = next(0), j1; j < last; j = next(j1)) {
      const int tile = j / BLOCK_KV * BLOCK_KV;
      j1 = end(tile + BLOCK_KV);
      const int keys = j1 - j;
      multiply_keys(task, j, keys);
      for (int r = 0; r < task.rows(); ++r) softmax(task, scores[r % task.group], r, j, keys);
      if (task.p.dropout > 0) drop(task, tile, j, keys);
      multiply_values(task, j, keys);
    }
    store_rows(task);
  }

 private:
  void load_rows(const Task& task) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.q, [&]<class T>(const T* q) {
      for (int r = 0; r < task.rows(); ++r)
        pack_rows(q + task.row_offset(p.q_stride, r), 0, 1, p.D, q_ + r * p.D);
    });
    for (int r = 0; r < task.rows(); ++r) max_[r] = -A(INFINITY), sum_[r] = 0;
    memset(o_, 0, sizeof(A) * task.rows() * stride_);
    memset(
        weights_, 0,
        sizeof(A) * MAX * BLOCK_KV);  // also of rows that do not exist, which are multiplied along
  }

  void multiply_keys(const Task& task, int j0, int keys) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.k, [&]<class T>(const T* k) {
      const T* const first = k + task.key_offset(p.k_stride, j0);
      by_rows<MAX>(task.rows(), [&]<int ROWS>() {
        dot_products<L, ROWS>(
            p.D, task.rows(), q_, keys,
            [first, step = p.k_stride.row](int n) { return first + n * step; }, s_, BLOCK_KV);
      });
    });
  }
  void multiply_values(const Task& task, int j0, int keys) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.v, [&]<class T>(const T* v) {
      const T* const values = v + task.key_offset(p.v_stride, j0);
      by_rows<MAX>(task.rows(), [&]<int ROWS>() { weighted_sums<ROWS>(task, keys, values); });
      if (!add_part(task.rows())) add_attended(task, keys, values);
    });
  }

  // weights of row r = 2^(unit s - m); s stays, −inf where masked.
  template <class Score>
  void softmax(const Task& task, const Score& score, int r, int j0, int keys) {
    const A unit = log2_unit<A, Score>(task.p);
    A* const s = s_ + r * BLOCK_KV;
    if constexpr (Score::SPARSE)
      CappedProducts<A>(task.p).cap((keys + L::COUNT - 1) / L::COUNT * L::COUNT, s);
    Float top = L::all(-INFINITY), sum = L::all(0);
    for (int j = 0; j < keys; j += L::COUNT) {
      const int n = keys - j;
      const Float x = logits<L>(score, L::load(s + j), task.query(r), j0 + j, n);
      const Float exists = L::select(L::less(L::positions(j), keys), x, L::all(-INFINITY));
      L::store(s + j, exists);
      top = L::max(top, exists);
    }
    const A tile_max = L::max(top) * unit, m = tile_max > max_[r] ? tile_max : max_[r];
    const A origin = m == -A(INFINITY) ? 0 : m;
    for (int j = 0; j < keys; j += L::COUNT) {
      const Float w = L::exp2(L::load(s + j) * unit - origin);
      L::store(weights_ + r * BLOCK_KV + j, w);
      sum += w;
    }
    alpha_[r] = L::exp2(L::all(max_[r] - origin))[0];
    max_[r] = m;
    sum_[r] = sum_[r] * alpha_[r] + L::sum(sum);
  }

  // part [rows, Dv] = weights v
  template <int ROWS, class T>
  void weighted_sums(const Task& task, int keys, const T* v) {
    constexpr int VECS = ROWS < 8 ? 8 / ROWS : 1;
    const int Dv = task.p.Dv;
    int d = 0;
    for (; d + VECS * L::COUNT <= Dv; d += VECS * L::COUNT)
      weighted_columns<ROWS, VECS>(task, keys, v + d, part_ + d);
    for (; d + L::COUNT <= Dv; d += L::COUNT)
      weighted_columns<ROWS, 1>(task, keys, v + d, part_ + d);
    if (d == Dv) return;
    for (int r = 0; r < task.rows(); ++r) {
      Float acc = L::all(0);
      for (int j = 0; j < keys; ++j)
        acc += L::load(v + j * task.p.v_stride.row + d, Dv - d) * weights_[r * BLOCK_KV + j];
      L::store(part_ + r * stride_ + d, acc);
    }
  }
  template <int ROWS, int VECS, class T>
  void weighted_columns(const Task& task, int keys, const T* v, A* part) {
    Float acc[ROWS][VECS];
    multiply<L>(acc, keys, weights_, BLOCK_KV, 1, v, task.p.v_stride.row);
    for (int r = 0; r < ROWS && r < task.rows(); ++r)
      for (int n = 0; n < VECS; ++n) L::store(part + r * stride_ + n * L::COUNT, acc[r][n]);
  }

  void drop(const Task& task, int tile, int j0, int keys) {
    kept_.draw(task, 0, task.rows(), tile, j0, j0 + keys);
    for (int r = 0; r < task.rows(); ++r)
      for (int j = 0; j < keys; j += L::COUNT) {
        A* const at = weights_ + r * BLOCK_KV + j;
        L::store(at, kept_.kept(r, j0 + j - tile, L::load(at)));
      }
  }

  // o = o alpha + part, unless part is not finite: then a masked key may have put an inf or a nan
  // there.
  bool add_part(int rows) {
    Float zero = L::all(0);
    for (int n = 0; n < rows * stride_; n += L::COUNT) zero += L::load(part_ + n) * 0;
    const bool finite = L::sum(zero) == 0;
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < stride_; d += L::COUNT) {
        A* const at = o_ + r * stride_ + d;
        L::store(at,
                 L::load(at) * alpha_[r] + (finite ? L::load(part_ + r * stride_ + d) : L::all(0)));
      }
    return finite;
  }
  template <class T>
  void add_attended(const Task& task, int keys, const T* v) {
    for (int r = 0; r < task.rows(); ++r)
      for (int j = 0; j < keys; ++j) {
        if (s_[r * BLOCK_KV + j] == -A(INFINITY)) continue;
        const T* const row = v + j * task.p.v_stride.row;
        for (int d = 0; d < task.p.Dv; ++d)
          o_[r * stride_ + d] += weights_[r * BLOCK_KV + j] * A(to_float(row[d]));
      }
  }

  void store_rows(const Task& task) {
    const AttentionParams& p = task.p;
    const Float factor =
        kept_factor<A>(p) * finish_rows<L>(task, 0, task.rows(), L::load(max_, task.rows()),
                                           L::load(sum_, task.rows()));
    with_dtype<A>(p.dtype, p.o, [&]<class T>(T* o) {
      for (int r = 0; r < task.rows(); ++r) {
        T* const to = o + task.row_offset(p.o_stride, r);
        for (int d = 0; d < p.Dv; d += L::COUNT)
          L::store(to + d, L::load(o_ + r * stride_ + d) * factor[r], p.Dv - d);
      }
    });
  }

  int stride_;         // Dv up to whole vectors
  A *q_, *o_, *part_;  // [rows, D], [rows, stride], [rows, stride]
  A *s_, *weights_;    // [rows, BLOCK_KV]
  A max_[MAX], sum_[MAX], alpha_[MAX];
  KeptBits<A, BLOCK_KV / DROPOUT_BLOCK> kept_;  // by dropout
};

}  // namespace atx::ATX_TARGET
