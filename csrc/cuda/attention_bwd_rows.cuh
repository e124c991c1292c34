// What the backward computes once per row and once per head, around its passes:
//
// - before: delta = rowsum(dO ∘ O) - dlse; eight lanes own a row
// - after: dsink = -Σ exp(sink - lse) delta, and dalibi from its rows' shares; a block owns a head
//
// A row that attends to nothing has delta 0, whatever its dO holds.
#pragma once
#include "csrc/cuda/attention_bwd_block.cuh"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

constexpr int BWD_ROWS_THREADS = 128, BWD_ROWS_BLOCK = 64, LANES_PER_ROW = 8;

// Σ of x · y over this lane's chunks of a row, whose elements come in one order whether or not they
// lie on 16-byte boundaries.
template <class T>
__device__ __forceinline__ float dot_chunks(const GlobalMatrix<const T>& x,
                                            const GlobalMatrix<const T>& y, int row, int lane) {
  constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));
  const T *const x_row = x.data + row * x.stride, *const y_row = y.data + row * y.stride;
  const bool chunked = x.chunked(x_row) && y.chunked(y_row);
  float sum = 0;
  for (int at = lane * CHUNK; at < x.cols; at += LANES_PER_ROW * CHUNK) {
    if (chunked) {
      struct alignas(CHUNK_BYTES) Elements {
        T x[CHUNK];
      };
      const Elements a = *reinterpret_cast<const Elements*>(x_row + at);
      const Elements b = *reinterpret_cast<const Elements*>(y_row + at);
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) sum = fmaf(to_float(a.x[e]), to_float(b.x[e]), sum);
    } else {
      for (int e = at; e < at + CHUNK && e < x.cols; ++e)
        sum = fmaf(to_float(x_row[e]), to_float(y_row[e]), sum);
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(BWD_ROWS_THREADS)
    attention_bwd_delta(const __grid_constant__ AttentionBwdParams p) {
  const AttentionParams& f = p.fwd;
  const BwdBlock block(f, BWD_ROWS_BLOCK, false);
  const auto [b, h_kv, h, h1, first, seq] = block;
  const GlobalMatrix<const T> o(f.o, f.o_stride, b, h, seq.q_row, seq.sq, f.Dv);
  const GlobalMatrix<const T> d_o(p.d_o, p.d_o_stride, b, h, seq.q_row, seq.sq, f.Dv);
  const int64_t at = head_offset(f, seq, b, h);
  const float* const lse = static_cast<const float*>(f.lse) + at;
  float* const delta = static_cast<float*>(p.delta) + at;
  const int lane = int(threadIdx.x % LANES_PER_ROW);
  for (int row = int(threadIdx.x / LANES_PER_ROW); row < BWD_ROWS_BLOCK;
       row += BWD_ROWS_THREADS / LANES_PER_ROW) {
    const int i = first + row;
    const bool exists = i < seq.sq;
    float sum = exists ? dot_chunks(o, d_o, i, lane) : 0.f;
#pragma unroll
    for (int mask = 1; mask < LANES_PER_ROW; mask *= 2) sum += simt::shfl_xor(sum, mask);
    if (!exists || lane != 0) continue;
    if (p.d_lse) sum -= static_cast<const float*>(p.d_lse)[at + i];
    delta[i] = lse[i] == -INFINITY ? 0.f : sum;
  }
}

// Σ over a head's rows of share(i), in a fixed order; for thread 0.
template <class Share>
__device__ __forceinline__ float sum_rows(int rows, float (&parts)[BWD_ROWS_THREADS], Share share) {
  float sum = 0;
  for (int i = int(threadIdx.x); i < rows; i += BWD_ROWS_THREADS) sum += share(i);
  simt::sync();  // nobody still reads the parts of the last sum
  parts[threadIdx.x] = sum;
  simt::sync();  // parts are there for thread 0
  sum = 0;
  if (threadIdx.x == 0)
    for (const float part : parts) sum += part;
  return sum;
}

template <class A>
struct BwdHeadsSmem {
  A parts[BWD_ROWS_THREADS];
};

template <class A>
__global__ void __launch_bounds__(BWD_ROWS_THREADS)
    attention_bwd_heads(const __grid_constant__ AttentionBwdParams p) {
  const AttentionParams& f = p.fwd;
  const int b = int(blockIdx.x) / f.Hq, h = int(blockIdx.x) % f.Hq;
  const Sequence seq = sequence(f, b);
  const int64_t at = head_offset(f, seq, b, h), out = int64_t(b) * f.Hq + h;
  auto& parts = simt::shared<BwdHeadsSmem<A>>().parts;
  const auto store = [&](void* to, A sum) {
    if (threadIdx.x == 0) static_cast<A*>(to)[out] = sum;
  };
  if (p.d_sinks) {
    const A sink = static_cast<const A*>(f.sinks.data)[b * f.sinks.batch + h * f.sinks.head];
    const A *const lse = static_cast<const A*>(f.lse) + at, *const delta =
                                                                static_cast<const A*>(p.delta) + at;
    store(p.d_sinks, sum_rows(seq.sq, parts, [&](int i) {
            return lse[i] == -INFINITY ? A(0) : -simt::exp2((sink - lse[i]) * LOG2_E) * delta[i];
          }));
  }
  if (p.d_alibi) {
    const A* const shares = static_cast<const A*>(p.row_shares) + at;
    store(p.d_alibi, sum_rows(seq.sq, parts, [&](int i) { return shares[i]; }));
  }
}

template <class T>
Status launch_attention_bwd_delta(const AttentionBwdParams& p, const Exec& exec) {
  return simt::launch(attention_bwd_delta<T>, bwd_blocks(p.fwd, BWD_ROWS_BLOCK, false),
                      BWD_ROWS_THREADS, 0, exec.stream, p);
}

template <class A>
Status launch_attention_bwd_heads(const AttentionBwdParams& p, const Exec& exec) {
  if (!p.d_sinks && !p.d_alibi) return nullptr;
  return simt::launch(attention_bwd_heads<A>, int64_t(p.fwd.B) * p.fwd.Hq, BWD_ROWS_THREADS,
                      int(sizeof(BwdHeadsSmem<A>)), exec.stream, p);
}

}  // namespace atx::ATX_TARGET
