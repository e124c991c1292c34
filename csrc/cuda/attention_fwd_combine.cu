// The results of a call of few queries from those of its chunks (split.cuh), always added up in
// the same order: o = Σ_c exp(lse_c) o_c / (Σ_c exp(lse_c) + exp(sink)), and the logarithm of that
// denominator.
//
// - block: one row
// - warp w: the chunks w, w + WARPS ..., whose shares meet in shared memory
// - lane: of those, the four columns from 4 lane on, from 4 lane + 128 on, and so on
#include "csrc/core/kernels.h"
#include "csrc/cuda/split.cuh"

namespace atx::ATX_TARGET {
namespace combine {  // not unnamed: nvcc and g++ are to mangle the kernels alike

constexpr int WARPS = 8, THREADS = 32 * WARPS, MOST_COLS = WIDE_DV, STEP = 32 * 4;
static_assert(MOST_CHUNKS <= 64 && MOST_COLS % STEP == 0);

struct Smem {
  float o[WARPS][MOST_COLS];
};

// What the chunks count for: lane l has chunks l and l + 32.
struct Weights {
  float of[2];
  RowEnd end;

  __device__ __forceinline__ Weights(const float* lse, const Split& split, float sink)
      : Weights(load(lse, split, 0), load(lse, split, 1), sink) {}
  __device__ __forceinline__ float of_chunk(int c) const {
    return simt::shfl(c < 32 ? of[0] : of[1], c % 32);
  }

 private:
  __device__ __forceinline__ static float load(const float* lse, const Split& split, int half) {
    const int c = int(threadIdx.x % 32) + 32 * half;
    return c < split.chunks ? lse[c * split.rows] : -INFINITY;
  }
  __device__ __forceinline__ static float top_of(float a, float b) {
    float top = fmaxf(a, b);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, simt::shfl_xor(top, mask));
    return top;
  }
  __device__ __forceinline__ static float sum_of(float a, float b) {
    float sum = a + b;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += simt::shfl_xor(sum, mask);
    return sum;
  }
  __device__ __forceinline__ Weights(float a, float b, float sink)
      : Weights(a, b, top_of(a, b), sink) {}
  // A chunk without a key counts for nothing, also if no chunk has one.
  __device__ __forceinline__ Weights(float a, float b, float top, float sink)
      : of{weight(a, top), weight(b, top)}, end(top, sum_of(of[0], of[1]), sink) {
    of[0] *= end.factor, of[1] *= end.factor;
  }
  __device__ __forceinline__ static float weight(float lse, float top) {
    return simt::exp2((lse - (top == -INFINITY ? 0.f : top)) * LOG2_E);
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    attention_fwd_combine(const __grid_constant__ AttentionParams p) {
  const Split split(p);
  const int64_t row = blockIdx.x;
  const int i = int(row % p.Sq), h = int(row / p.Sq % p.Hq), b = int(row / p.Sq / p.Hq);
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  Smem& smem = simt::shared<Smem>();
  const float sink =
      p.sinks.data ? static_cast<const float*>(p.sinks.data)[b * p.sinks.batch + h * p.sinks.head]
                   : -INFINITY;
  const Weights weights(split.lse(p) + row, split, sink);
  if (p.lse && threadIdx.x == 0)
    static_cast<float*>(p.lse)[b * p.lse_batch + h * p.lse_head + i] = weights.end.lse;

#pragma unroll 1
  for (int d = lane * 4; d < (split.pitch + STEP - 1) / STEP * STEP; d += STEP) {
    const float* const o = split.o(p) + row * split.pitch + (d < split.pitch ? d : 0);
    Float4 sum = {};
#pragma unroll 4
    for (int c = warp; c < split.chunks; c += WARPS) {
      const Float4 x = *reinterpret_cast<const Float4*>(o + c * split.rows * split.pitch);
      const float weight = weights.of_chunk(c);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.x[e] += weight == 0.f ? 0.f : weight * x.x[e];
    }
    reinterpret_cast<Float4&>(smem.o[warp][d]) = sum;
  }
  simt::sync();  // threads add up what all warps have written

  T* const to = static_cast<T*>(p.o) + row0(p.o_stride, b, h, i);
#pragma unroll 1
  for (int d = int(threadIdx.x); d < p.Dv; d += THREADS) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += smem.o[w][d];
    to[d] = from_float<T>(sum);
  }
}

}  // namespace combine

Status launch_attention_fwd_combine(const AttentionParams& p, const Exec& exec) {
  const auto kernel = p.dtype == DType::f32   ? combine::attention_fwd_combine<float>
                      : p.dtype == DType::f16 ? combine::attention_fwd_combine<f16>
                                              : combine::attention_fwd_combine<bf16>;
  return simt::launch(kernel, Split(p).rows, combine::THREADS, int(sizeof(combine::Smem)),
                      exec.stream, p);
}

}  // namespace atx::ATX_TARGET
