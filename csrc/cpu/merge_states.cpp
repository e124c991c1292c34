// o = w_a o_a + w_b o_b, a row at a time: bound by memory, so all there is to do is to read every
// number once.
#include "csrc/cpu/merge_states.h"

#include "csrc/core/merge.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/simd.h"

namespace atx::ATX_TARGET {
namespace {

template <class A>
const A& at(const void* data, int64_t i) {
  return static_cast<const A*>(data)[i];
}
template <class A>
A& at(void* data, int64_t i) {
  return static_cast<A*>(data)[i];
}

template <class A>
MergeWeights<A> weights_of(const MergeStatesParams& p, int64_t r) {
  return {at<A>(p.lse_a, merge_row(p, p.lse_a_stride, r)),
          at<A>(p.lse_b, merge_row(p, p.lse_b_stride, r))};
}

// w x, and 0 for w = 0 whatever x is.
template <class L, class A>
ATX_HD typename L::Float weighted(A w, typename L::Float x) {
  return w == 0 ? L::all(0) : x * w;
}

template <class A>
void merge_rows(const MergeStatesParams& p, int64_t first, int64_t last) {
  using L = Lanes<A>;
  with_dtype<A>(p.dtype, p.o, [&]<class T>(T* o) {
    for (int64_t r = first; r < last; ++r) {
      const MergeWeights<A> w = weights_of<A>(p, r);
      const T* const a = static_cast<const T*>(p.o_a) + merge_row(p, p.o_a_stride, r);
      const T* const b = static_cast<const T*>(p.o_b) + merge_row(p, p.o_b_stride, r);
      T* const to = o + merge_row(p, p.o_stride, r);
      for (int d = 0; d < p.Dv; d += L::COUNT)
        L::store(
            to + d,
            weighted<L>(w.a, L::load(a + d, p.Dv - d)) + weighted<L>(w.b, L::load(b + d, p.Dv - d)),
            p.Dv - d);
      at<A>(p.lse, merge_row(p, p.lse_stride, r)) = w.lse;
    }
  });
}

template <class A>
void merge_rows_bwd(const MergeStatesBwdParams& p, int64_t first, int64_t last) {
  using L = Lanes<A>;
  const MergeStatesParams& f = p.fwd;
  with_dtype<A>(f.dtype, p.d_o_a, [&]<class T>(T* d_o_a) {
    for (int64_t r = first; r < last; ++r) {
      const MergeWeights<A> w = weights_of<A>(f, r);
      const T* const a = static_cast<const T*>(f.o_a) + merge_row(f, f.o_a_stride, r);
      const T* const b = static_cast<const T*>(f.o_b) + merge_row(f, f.o_b_stride, r);
      const T* const d_o = static_cast<const T*>(p.d_o) + merge_row(f, p.d_o_stride, r);
      T* const d_a = d_o_a + merge_row(f, p.d_o_a_stride, r);
      T* const d_b = static_cast<T*>(p.d_o_b) + merge_row(f, p.d_o_b_stride, r);
      typename L::Float sum = L::all(0);
      for (int d = 0; d < f.Dv; d += L::COUNT) {
        const int n = f.Dv - d;
        const typename L::Float g = L::load(d_o + d, n);
        // Of parts that both count; elsewhere the sum is multiplied by 0 and must be a number.
        if (w.a != 0 && w.b != 0) sum += g * (L::load(a + d, n) - L::load(b + d, n));
        L::store(d_a + d, weighted<L>(w.a, g), n);
        L::store(d_b + d, weighted<L>(w.b, g), n);
      }
      const A g = L::sum(sum), d_lse = at<A>(p.d_lse, merge_row(f, p.d_lse_stride, r));
      at<A>(p.d_lse_a, merge_row(f, p.d_lse_a_stride, r)) = w.a == 0 ? 0 : w.a * (d_lse + w.b * g);
      at<A>(p.d_lse_b, merge_row(f, p.d_lse_b_stride, r)) = w.b == 0 ? 0 : w.b * (d_lse - w.a * g);
    }
  });
}

template <class Params, void (*OF_DOUBLE)(const Params&, int64_t, int64_t),
          void (*OF_FLOAT)(const Params&, int64_t, int64_t)>
void each_row(const Params& params, const MergeStatesParams& p, const Exec& exec) {
  const auto body =
      p.dtype == DType::f64
          ? [](const void* p, int64_t first,
               int64_t last) { OF_DOUBLE(*static_cast<const Params*>(p), first, last); }
          : [](const void* p, int64_t first, int64_t last) {
              OF_FLOAT(*static_cast<const Params*>(p), first, last);
            };
  exec.parallel_for(p.B * p.H * p.S, body, &params);
}

}  // namespace

Status merge_states(const MergeStatesParams& p, const Exec& exec) {
  each_row<MergeStatesParams, merge_rows<double>, merge_rows<float>>(p, p, exec);
  return nullptr;
}

Status merge_states_bwd(const MergeStatesBwdParams& p, const Exec& exec) {
  each_row<MergeStatesBwdParams, merge_rows_bwd<double>, merge_rows_bwd<float>>(p, p.fwd, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
