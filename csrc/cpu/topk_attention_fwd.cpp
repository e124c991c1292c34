// o_i = Σ_n softmax_n(scale q_i · k_list(i, n)) v_list(i, n), with k and v where they lie. One task
// is one query of one key head: its heads are rows (listed_rows.h), and the softmax is online over
// blocks of the list.
//
// One thread, S 2048, 256 random keys a query, 8 heads, time per pair over dense attention's, D 64
// and 128: AVX2 f32 4.4 and 5.4 where no heads share a list, 2.3 and 2.8 where 8 do, bf16 5.6 and
// 4.4, 3.0 and 2.3; AVX-512 f32 5.0 and 6.5, 2.7 and 3.2. So lists of an eighth of the keys take
// 1 / 1.2 to 1 / 3.5 of dense attention's time. Where no heads share a list, reading the rows is
// the time: at D 64 in f32 11 to 13 ns a pair, of which a loop that only adds up the listed rows of
// k and v takes 13 ns (random rows, L2 cache; prefetched 12). Keys gathered for torch's SDPA take
// 32 and 10 times as long on AVX-512, 27 and 7 on AVX2 (f32, S 1024, 128 keys, D 64).
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/finish_rows.h"
#include "csrc/cpu/for_tasks.h"
#include "csrc/cpu/listed_rows.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {
namespace {

template <class A>
class ListedAttention {
  using L = Lanes<A>;
  using Float = typename L::Float;

 public:
  void take(Scratch& scratch, const AttentionParams& p) {
    const int group = p.Hq / p.Hkv;
    stride_ = whole_vectors<L>(p.Dv);
    q_ = scratch.take<A>(int64_t(group) * p.D);
    o_ = scratch.take<A>(int64_t(group) * stride_);
    s_ = scratch.take<A>(int64_t(group) * LISTED_BLOCK);
    max_ = scratch.take<A>(group);
    sum_ = scratch.take<A>(group);
    alpha_ = scratch.take<A>(group);
  }

  void attend(const TopkAttentionParams& p, const Task& task) {
    load_rows(task);
    by_lists(p.lists, task.group, [&](int row, int rows) { attend_list(p, task, row, rows); });
    store_rows(task);
  }

 private:
  void load_rows(const Task& task) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.q, [&]<class T>(const T* q) {
      for (int r = 0; r < task.group; ++r)
        pack_row(q + task.row_offset(p.q_stride, r), p.D, q_ + int64_t(r) * p.D);
    });
    for (int r = 0; r < task.group; ++r) max_[r] = -A(INFINITY), sum_[r] = 0;
    memset(o_, 0, sizeof(A) * task.group * stride_);
  }

  void attend_list(const TopkAttentionParams& params, const Task& task, int row, int rows) {
    const AttentionParams& p = task.p;
    const A* const q = q_ + int64_t(row) * p.D;
    A* const o = o_ + int64_t(row) * stride_;
    A* const s = s_ + row * LISTED_BLOCK;
    const int64_t k0 = task.key_offset(p.k_stride, 0), v0 = task.key_offset(p.v_stride, 0);
    const char *const k = static_cast<const char*>(p.k) + k0 * size_of(p.dtype),
                      *const v = static_cast<const char*>(p.v) + v0 * size_of(p.dtype);
    ListedKeys list(params.lists, p.Sk, task.b, task.head(row), task.i0);
    RowNumbers keys;
    while (list.next(&keys)) {
      multiply_listed(p.dtype, rows, p.D, q, k, p.k_stride.row, keys, s);
      for (int r = row; r < row + rows; ++r) softmax(p, r, keys.count);
      add_listed(p.dtype, rows, p.Dv, s, v, p.v_stride.row, keys, alpha_ + row, o, stride_);
    }
  }

  // s of row r becomes 2^(unit s - m).
  void softmax(const AttentionParams& p, int r, int count) {
    const A unit = A(p.scale * LOG2_E);
    A* const s = s_ + r * LISTED_BLOCK;
    Float top = L::all(-INFINITY), sum = L::all(0);
    for (int n = 0; n < count; n += L::COUNT) {
      const typename L::Bool exists = L::less(L::positions(n), count);
      const Float x = L::select(exists, L::load(s + n) * unit, L::all(-INFINITY));
      L::store(s + n, x);
      top = L::max(top, x);
    }
    const A block_max = L::max(top), m = block_max > max_[r] ? block_max : max_[r];
    const A origin = m == -A(INFINITY) ? 0 : m;
    for (int n = 0; n < count; n += L::COUNT) {
      const Float w = L::exp2(L::load(s + n) - origin);
      L::store(s + n, w);
      sum += w;
    }
    alpha_[r] = L::exp2(L::all(max_[r] - origin))[0];
    max_[r] = m;
    sum_[r] = sum_[r] * alpha_[r] + L::sum(sum);
  }

  void store_rows(const Task& task) {
    const AttentionParams& p = task.p;
    with_dtype<A>(p.dtype, p.o, [&]<class T>(T* o) {
      for (int first = 0; first < task.group; first += L::COUNT) {
        const int n = task.group - first < L::COUNT ? task.group - first : L::COUNT;
        const Float factor =
            finish_rows<L>(task, first, n, L::load(max_ + first, n), L::load(sum_ + first, n));
        for (int r = 0; r < n; ++r) {
          T* const to = o + task.row_offset(p.o_stride, first + r);
          const A* const from = o_ + int64_t(first + r) * stride_;
          for (int d = 0; d < p.Dv; d += L::COUNT)
            L::store(to + d, L::load(from + d) * factor[r], p.Dv - d);
        }
      }
    });
  }

  int stride_;              // Dv up to whole vectors
  A *q_, *o_, *s_;          // [group, D], [group, stride], [group, LISTED_BLOCK]
  A *max_, *sum_, *alpha_;  // [group]
};

template <class A>
void run(const TopkAttentionParams& params, const Exec& exec) {
  const AttentionParams& p = params.fwd;
  for_tasks(exec, int64_t(p.B) * p.Hkv * p.Sq, [&](int64_t first, int64_t last) {
    Scratch scratch;
    ListedAttention<A> rows;
    rows.take(scratch, p);
    scratch.allocate();
    rows.take(scratch, p);
    for (int64_t t = first; t < last; ++t) {
      const int64_t head = t / p.Sq;
      const int b = int(head / p.Hkv), hk = int(head % p.Hkv);
      rows.attend(params, Task{p, sequence(p, b), b, hk, p.Hq / p.Hkv, int(t % p.Sq), 1});
    }
  });
}

}  // namespace

Status topk_attention_fwd(const TopkAttentionParams& p, const Exec& exec) {
  p.fwd.dtype == DType::f64 ? run<double>(p, exec) : run<float>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
