// The only door to the GPU. Kernels include this and nothing from CUDA; the same names exist on
// both sides: simt_gpu.h (nvcc: PTX) and simt_host.h (g++: the emulator of this folder).
//
// - threadIdx blockIdx blockDim gridDim, __global__ __device__ __launch_bounds__ __forceinline__
//   __grid_constant__
// - opaque(x): x, unrecognizably, so that what follows from it is computed again
// - sync(), sync_warp(): barriers of the block, of the warp
// - sync_or(p): a barrier of the block that returns whether p holds in any thread
// - shfl(x, lane), shfl_xor(x, mask): of float, int, uint32_t; all 32 lanes take part
// - any(p), ballot(p): votes of the warp
// - shared<T>(): the dynamic shared memory, as a T&
// - smem_address(pointer): its 32-bit address, for the four below
// - cp_async16(smem, global, bytes): 16 bytes to shared memory, the last 16 - bytes of them zeros;
//   asynchronous
// - cp_async_commit(), cp_async_wait<N>(): close a group; wait until at most N groups of this
//   thread are in flight
// - ldmatrix_x4(r, smem), ldmatrix_x4_trans(r, smem): four 8x8 matrices of 16-bit elements
// - load_words(r, smem): four words of shared memory, by their address
// - mma(d, a, b0, b1, T{}): d += a b, m16n8k16 for T = bf16 or f16, m16n8k8 for tf32; float
//   accumulators (fragment.h: who holds what)
// - exp2(x): 2^x, ex2.approx.ftz on the GPU
// - pack2<T>(lo, hi): two floats rounded to T, in one register
// - to_tf32(x): the register of a tf32 operand, x rounded to nearest
// - launch(kernel, grid, threads, shared_bytes, stream, params): a Status; the only place that
//   checks a launch
//
// Everything is in namespace atx::ATX_TARGET::simt.
#pragma once
#if defined(__CUDACC__)
#include "simt_gpu.h"
#else
#include "simt_host.h"
#endif
