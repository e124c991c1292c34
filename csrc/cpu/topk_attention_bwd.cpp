// The gradients of attention over listed keys (params.h has the equations). Nothing is scattered:
//   d_q  of a query sums over its list, all heads of a group at once
//   d_k, d_v  of a key sum over its readers, in ascending order, head by head
// so that every number has one owner and no order but this. Weights are recomputed from lse.
// As the forward was measured (topk_attention_fwd.cpp), time per pair over that of the dense
// backward, D 64 and 128: AVX2 f32 6.4 and 5.5 where no heads share a list, 5.4 and 4.3 where 8 do,
// bf16 6.9 and 5.0, 5.0 and 4.4; AVX-512 f32 8.1 and 7.5, 6.0 and 5.4.
#include "csrc/cpu/attention_bwd_rows.h"
#include "csrc/cpu/for_tasks.h"
#include "csrc/cpu/listed_rows.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {
namespace {

// The rows of one (batch, head) of a tensor, of whatever type.
struct HeadRows {
  DType dtype;
  const void* data;
  int64_t stride;

  HeadRows(DType dtype, const void* tensor, const Strides& s, int b, int h)
      : dtype(dtype),
        data(static_cast<const char*>(tensor) + row0(s, b, h, 0) * size_of(dtype)),
        stride(s.row) {}
  template <class A>
  void load(int64_t row, int width, A* to) const {
    with_dtype<A>(dtype, data, [&]<class T>(const T* x) { pack_row(x + row * stride, width, to); });
  }
};

template <class A>
void store_row(DType dtype, void* tensor, int64_t at, const A* from, int width) {
  using L = Lanes<A>;
  with_dtype<A>(dtype, tensor, [&]<class T>(T* to) {
    for (int d = 0; d < width; d += L::COUNT) L::store(to + at + d, L::load(from + d), width - d);
  });
}

// s and d_weight, `count` products q · k and dO · v, become P and d(q · k). log2_sum and delta of
// pair n are those of its query: f(n) loads COUNT of them.
template <class A, class Sum, class Delta>
void weights_and_slopes(const AttentionParams& p, int count, Sum log2_sum, Delta delta, A* s,
                        A* d_weight) {
  using L = Lanes<A>;
  const A unit = A(p.scale * LOG2_E), scale = A(p.scale);
  for (int n = 0; n < count; n += L::COUNT) {
    const typename L::Float w = L::exp2(L::load(s + n) * unit - log2_sum(n));
    L::store(s + n, w);
    L::store(d_weight + n, w * (L::load(d_weight + n) - delta(n)) * scale);
  }
}

template <class A>
class QueryGradient {
  using L = Lanes<A>;

 public:
  void take(Scratch& scratch, const AttentionParams& p) {
    const int group = p.Hq / p.Hkv;
    stride_ = whole_vectors<L>(p.D);
    q_ = scratch.take<A>(int64_t(group) * p.D);
    d_o_ = scratch.take<A>(int64_t(group) * p.Dv);
    d_q_ = scratch.take<A>(int64_t(group) * stride_);
    s_ = scratch.take<A>(int64_t(group) * LISTED_BLOCK);
    d_weight_ = scratch.take<A>(int64_t(group) * LISTED_BLOCK);
  }

  void compute(const TopkAttentionBwdParams& params, const Task& task) {
    const AttentionBwdParams& p = params.bwd;
    const AttentionParams& f = p.fwd;
    for (int r = 0; r < task.group; ++r) {
      const int h = task.head(r);
      HeadRows(f.dtype, f.q, f.q_stride, task.b, h).load(task.i0, f.D, q_ + int64_t(r) * f.D);
      HeadRows(f.dtype, p.d_o, p.d_o_stride, task.b, h)
          .load(task.i0, f.Dv, d_o_ + int64_t(r) * f.Dv);
    }
    memset(d_q_, 0, sizeof(A) * task.group * stride_);
    by_lists(params.lists, task.group,
             [&](int row, int rows) { walk_list(params, task, row, rows); });
    for (int r = 0; r < task.group; ++r) {
      A* const d_q = d_q_ + int64_t(r) * stride_;
      // of a row that attends to nothing, whose keys may have put a nan there
      if (static_cast<const A*>(f.lse)[task.lse_offset(r)] == -A(INFINITY))
        memset(d_q, 0, sizeof(A) * stride_);
      store_row(f.dtype, p.d_q, task.row_offset(p.d_q_stride, r), d_q, f.D);
    }
  }

 private:
  void walk_list(const TopkAttentionBwdParams& params, const Task& task, int row, int rows) {
    const AttentionBwdParams& p = params.bwd;
    const AttentionParams& f = p.fwd;
    const HeadRows k(f.dtype, f.k, f.k_stride, task.b, task.hk);
    const HeadRows v(f.dtype, f.v, f.v_stride, task.b, task.hk);
    A *const s = s_ + row * LISTED_BLOCK, *const d_weight = d_weight_ + row * LISTED_BLOCK;
    ListedKeys list(params.lists, f.Sk, task.b, task.head(row), task.i0);
    RowNumbers keys;
    while (list.next(&keys)) {
      multiply_listed(f.dtype, rows, f.D, q_ + int64_t(row) * f.D, k.data, k.stride, keys, s);
      multiply_listed(f.dtype, rows, f.Dv, d_o_ + int64_t(row) * f.Dv, v.data, v.stride, keys,
                      d_weight);
      for (int r = row; r < row + rows; ++r) slopes(p, task, r, keys.count);
      add_listed<A>(f.dtype, rows, f.D, d_weight, k.data, k.stride, keys, nullptr,
                    d_q_ + int64_t(row) * stride_, stride_);
    }
  }
  void slopes(const AttentionBwdParams& p, const Task& task, int r, int count) {
    const int64_t at = task.lse_offset(r);
    const A log2_sum = A(LOG2_E) * static_cast<const A*>(p.fwd.lse)[at];
    const A delta = static_cast<const A*>(p.delta)[at];
    weights_and_slopes<A>(
        p.fwd, count, [&](int) { return log2_sum; }, [&](int) { return delta; },
        s_ + r * LISTED_BLOCK, d_weight_ + r * LISTED_BLOCK);
  }

  int stride_;          // D up to whole vectors
  A *q_, *d_o_, *d_q_;  // [group, D], [group, Dv], [group, stride]
  A *s_, *d_weight_;    // [group, LISTED_BLOCK]
};

template <class A>
class KeyGradients {
  using L = Lanes<A>;

 public:
  // Keys of a task: q and d_o of one query head, from which their readers come at random, stay in
  // the L2 cache for all of them. 8 heads of 2048 queries on one key head, f32: 1.6x of one key at
  // a time on AVX2, D 64 and 128.
  static constexpr int KEYS = 64;

  void take(Scratch& scratch, const AttentionParams& p) {
    k_ = scratch.take<A>(p.D);
    v_ = scratch.take<A>(p.Dv);
    k_stride_ = whole_vectors<L>(p.D), v_stride_ = whole_vectors<L>(p.Dv);
    d_k_ = scratch.take<A>(KEYS * k_stride_);
    d_v_ = scratch.take<A>(KEYS * v_stride_);
    s_ = scratch.take<A>(LISTED_BLOCK);
    d_weight_ = scratch.take<A>(LISTED_BLOCK);
    log2_sum_ = scratch.take<A>(LISTED_BLOCK);
    delta_ = scratch.take<A>(LISTED_BLOCK);
  }

  void compute(const TopkAttentionBwdParams& params, int b, int hk, int j0, int keys) {
    const AttentionBwdParams& p = params.bwd;
    const AttentionParams& f = p.fwd;
    const int group = f.Hq / f.Hkv;
    const HeadRows k(f.dtype, f.k, f.k_stride, b, hk), v(f.dtype, f.v, f.v_stride, b, hk);
    memset(d_k_, 0, sizeof(A) * keys * k_stride_);
    memset(d_v_, 0, sizeof(A) * keys * v_stride_);
    for (int h = hk * group; h < (hk + 1) * group; ++h)
      for (int n = 0; n < keys; ++n) {
        k.load(j0 + n, f.D, k_);
        v.load(j0 + n, f.Dv, v_);
        add_head(params, b, h, j0 + n, d_k_ + n * k_stride_, d_v_ + n * v_stride_);
      }
    for (int n = 0; n < keys; ++n) {
      const auto at = [&](const Strides& s) { return row0(s, b, hk, j0 + n); };
      if (p.d_k) store_row(f.dtype, p.d_k, at(p.d_k_stride), d_k_ + n * k_stride_, f.D);
      if (p.d_v) store_row(f.dtype, p.d_v, at(p.d_v_stride), d_v_ + n * v_stride_, f.Dv);
    }
  }

 private:
  // What the readers of one query head add.
  void add_head(const TopkAttentionBwdParams& params, int b, int h, int j, A* d_k, A* d_v) {
    const AttentionBwdParams& p = params.bwd;
    const AttentionParams& f = p.fwd;
    const HeadRows q(f.dtype, f.q, f.q_stride, b, h), d_o(f.dtype, p.d_o, p.d_o_stride, b, h);
    const Readers readers = readers_of(params, b, h, j);
    RowNumbers queries;
    for (int64_t next = 0; next < readers.count;) {
      next = load_block(p, b, h, readers, next, &queries);
      if (queries.count == 0) continue;
      multiply_listed(f.dtype, 1, f.D, k_, q.data, q.stride, queries, s_);
      multiply_listed(f.dtype, 1, f.Dv, v_, d_o.data, d_o.stride, queries, d_weight_);
      weights_and_slopes<A>(
          f, queries.count, [&](int n) { return L::load(log2_sum_ + n); },
          [&](int n) { return L::load(delta_ + n); }, s_, d_weight_);
      if (p.d_k)
        add_listed<A>(f.dtype, 1, f.D, d_weight_, q.data, q.stride, queries, nullptr, d_k, f.D);
      if (p.d_v)
        add_listed<A>(f.dtype, 1, f.Dv, s_, d_o.data, d_o.stride, queries, nullptr, d_v, f.Dv);
    }
  }

  // Readers from `next` on that attend to anything, with their sums and deltas; returns where the
  // others begin.
  int64_t load_block(const AttentionBwdParams& p, int b, int h, const Readers& readers,
                     int64_t next, RowNumbers* queries) {
    const int64_t rows = b * p.fwd.lse_batch + h * p.fwd.lse_head;
    const A *const lse = static_cast<const A*>(p.fwd.lse) + rows, *const delta =
                                                                      static_cast<const A*>(
                                                                          p.delta) +
                                                                      rows;
    int count = 0;
    for (; next < readers.count && count < LISTED_BLOCK; ++next) {
      const int i = readers.query[next];
      if (lse[i] == -A(INFINITY)) continue;
      queries->number[count] = i;
      log2_sum_[count] = lse[i] * A(LOG2_E);
      delta_[count++] = delta[i];
    }
    queries->count = count;
    return next;
  }

  int k_stride_, v_stride_;                // D and Dv up to whole vectors
  A *k_, *v_, *d_k_, *d_v_;                // [D], [Dv], [KEYS, k_stride_], [KEYS, v_stride_]
  A *s_, *d_weight_, *log2_sum_, *delta_;  // [LISTED_BLOCK]
};

// f(workspace, b, hk, n) for n in [0, count) of each key head.
template <class Workspace, class F>
void each_of(const AttentionParams& p, const Exec& exec, int count, F f) {
  for_tasks(exec, int64_t(p.B) * p.Hkv * count, [&](int64_t first, int64_t last) {
    Scratch scratch;
    Workspace workspace;
    workspace.take(scratch, p);
    scratch.allocate();
    workspace.take(scratch, p);
    for (int64_t t = first; t < last; ++t) {
      const int64_t head = t / count;
      f(workspace, int(head / p.Hkv), int(head % p.Hkv), int(t % count));
    }
  });
}

template <class A>
void run(const TopkAttentionBwdParams& params, const Exec& exec) {
  const AttentionBwdParams& p = params.bwd;
  const AttentionParams& f = p.fwd;
  const int64_t heads = int64_t(f.B) * f.Hq;
  for_tasks(exec, heads * f.Sq, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      sum_rows<A>(p, int(t / f.Sq / f.Hq), int(t / f.Sq % f.Hq), int(t % f.Sq), 1);
  });
  if (p.d_q)
    each_of<QueryGradient<A>>(f, exec, f.Sq, [&](QueryGradient<A>& gradient, int b, int hk, int i) {
      gradient.compute(params, Task{f, sequence(f, b), b, hk, f.Hq / f.Hkv, i, 1});
    });
  if (p.d_k || p.d_v)
    each_of<KeyGradients<A>>(f, exec, (f.Sk + KeyGradients<A>::KEYS - 1) / KeyGradients<A>::KEYS,
                             [&](KeyGradients<A>& gradients, int b, int hk, int n) {
                               const int j0 = n * KeyGradients<A>::KEYS, rest = f.Sk - j0;
                               gradients.compute(
                                   params, b, hk, j0,
                                   rest < KeyGradients<A>::KEYS ? rest : KeyGradients<A>::KEYS);
                             });
  if (p.d_sinks)
    for_tasks(exec, heads, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) sum_head<A>(p, int(t / f.Hq), int(t % f.Hq));
    });
}

}  // namespace

Status topk_attention_bwd(const TopkAttentionBwdParams& p, const Exec& exec) {
  if (p.bwd.fwd.Hq == 0) return nullptr;
  p.bwd.fwd.dtype == DType::f64 ? run<double>(p, exec) : run<float>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
