// o = w_a o_a + w_b o_b: bound by memory. Eight neighboring lanes share a row, 16 bytes each at a
// time, so that a warp reads whole sectors and a row's dot product takes three shuffles.
#include "csrc/core/kernels.h"
#include "csrc/core/merge.h"
#include "csrc/cuda/pieces.cuh"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {
namespace merge {  // not unnamed: nvcc and g++ are to mangle the kernels alike

constexpr int LANES = 8, THREADS = 256, ROWS = THREADS / LANES;

template <class T, class Pointer>
__device__ __forceinline__ Pieces<T> row_of(const MergeStatesParams& p, Pointer* tensor,
                                            const Strides& s, int64_t r) {
  return {static_cast<T*>(tensor) + merge_row(p, s, r), p.Dv};
}

__device__ __forceinline__ float weighted(float w, float x) { return w == 0.f ? 0.f : w * x; }

// What a lane knows of its row.
struct Place {
  int64_t row;
  int lane;
  bool exists;
  __device__ __forceinline__ explicit Place(const MergeStatesParams& p)
      : row(int64_t(blockIdx.x) * ROWS + threadIdx.x / LANES),
        lane(int(threadIdx.x % LANES)),
        exists(row < p.B * p.H * p.S) {}
  __device__ __forceinline__ float load(const MergeStatesParams& p, const void* tensor,
                                        const Strides& s) const {
    return static_cast<const float*>(tensor)[merge_row(p, s, row)];
  }
  __device__ __forceinline__ void store(const MergeStatesParams& p, void* tensor, const Strides& s,
                                        float x) const {
    if (lane == 0) static_cast<float*>(tensor)[merge_row(p, s, row)] = x;
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ MergeStatesParams p) {
  constexpr int PIECE = Pieces<T>::PIECE;
  const Place at(p);
  if (!at.exists) return;
  const MergeWeights<float> w(at.load(p, p.lse_a, p.lse_a_stride),
                              at.load(p, p.lse_b, p.lse_b_stride));
  at.store(p, p.lse, p.lse_stride, w.lse);
  const auto a = row_of<const T>(p, p.o_a, p.o_a_stride, at.row);
  const auto b = row_of<const T>(p, p.o_b, p.o_b_stride, at.row);
  const auto o = row_of<T>(p, p.o, p.o_stride, at.row);
#pragma unroll 1
  for (int d = at.lane * PIECE; d < p.Dv; d += LANES * PIECE) {
    float x[PIECE], y[PIECE];
    a.load(d, x);
    b.load(d, y);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) x[i] = weighted(w.a, x[i]) + weighted(w.b, y[i]);
    o.store(d, x);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    backward(const __grid_constant__ MergeStatesBwdParams p) {
  constexpr int PIECE = Pieces<T>::PIECE;
  const MergeStatesParams& f = p.fwd;
  Place at(f);
  const bool exists = at.exists;
  if (!exists) at.row = 0;  // shuffles want every lane: the others work along, and store nothing
  const MergeWeights<float> w(at.load(f, f.lse_a, f.lse_a_stride),
                              at.load(f, f.lse_b, f.lse_b_stride));
  const auto a = row_of<const T>(f, f.o_a, f.o_a_stride, at.row);
  const auto b = row_of<const T>(f, f.o_b, f.o_b_stride, at.row);
  const auto d_o = row_of<const T>(f, p.d_o, p.d_o_stride, at.row);
  const auto d_o_a = row_of<T>(f, p.d_o_a, p.d_o_a_stride, at.row);
  const auto d_o_b = row_of<T>(f, p.d_o_b, p.d_o_b_stride, at.row);
  // Of parts that both count; elsewhere the sum is multiplied by 0 and must be a number.
  const bool both = w.a != 0.f && w.b != 0.f;
  float sum = 0;
#pragma unroll 1
  for (int d = at.lane * PIECE; d < f.Dv; d += LANES * PIECE) {
    float x[PIECE], y[PIECE], g[PIECE];
    a.load(d, x);
    b.load(d, y);
    d_o.load(d, g);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
      if (both) sum += g[i] * (x[i] - y[i]);
      x[i] = weighted(w.a, g[i]);
      y[i] = weighted(w.b, g[i]);
    }
    if (!exists) continue;
    d_o_a.store(d, x);
    d_o_b.store(d, y);
  }
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) sum += simt::shfl_xor(sum, mask);
  if (!exists) return;
  const float d_lse = at.load(f, p.d_lse, p.d_lse_stride);
  at.store(f, p.d_lse_a, p.d_lse_a_stride, weighted(w.a, d_lse + w.b * sum));
  at.store(f, p.d_lse_b, p.d_lse_b_stride, weighted(w.b, d_lse - w.a * sum));
}

int64_t blocks(const MergeStatesParams& p) { return (p.B * p.H * p.S + ROWS - 1) / ROWS; }

template <class Params>
Status launch(DType dtype, void (*f32_kernel)(Params), void (*f16_kernel)(Params),
              void (*bf16_kernel)(Params), int64_t grid, const Exec& exec, const Params& p) {
  const auto kernel = dtype == DType::f32   ? f32_kernel
                      : dtype == DType::f16 ? f16_kernel
                                            : bf16_kernel;
  return simt::launch(kernel, grid, THREADS, 0, exec.stream, p);
}

}  // namespace merge

Status merge_states(const MergeStatesParams& p, const Exec& exec) {
  return merge::launch(p.dtype, merge::forward<float>, merge::forward<f16>, merge::forward<bf16>,
                       merge::blocks(p), exec, p);
}

Status merge_states_bwd(const MergeStatesBwdParams& p, const Exec& exec) {
  return merge::launch(p.fwd.dtype, merge::backward<float>, merge::backward<f16>,
                       merge::backward<bf16>, merge::blocks(p.fwd), exec, p);
}

}  // namespace atx::ATX_TARGET
