// The names of simt.h on a GPU: PTX of sm_80, one instruction or one runtime call each, and the
// launch.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "csrc/core/kernels.h"
#include "csrc/core/numeric.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET::simt {

constexpr unsigned ALL_LANES = 0xffffffffu;

template <class X>
__device__ __forceinline__ X opaque(X x) {
  static_assert(sizeof(X) == 4);
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ bool sync_or(bool p) { return __syncthreads_or(p); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <class X>
__device__ __forceinline__ X shfl(X x, int lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}
template <class X>
__device__ __forceinline__ X shfl_xor(X x, int mask) {
  return __shfl_xor_sync(ALL_LANES, x, mask);
}
__device__ __forceinline__ bool any(bool p) { return __any_sync(ALL_LANES, p); }
__device__ __forceinline__ uint32_t ballot(bool p) { return __ballot_sync(ALL_LANES, p); }

// Aligned to a swizzle period of 128 bytes, so that tile offsets can be combined with XOR
// (tile.cuh).
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return *reinterpret_cast<T*>(dynamic_shared);
}
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void cp_async16(uint32_t smem, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
__device__ __forceinline__ void load_words(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// Not volatile: products are pure, and the compiler may move them past loads.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cvt takes the high half first.
template <class T>
__device__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// One-dimensional grids only: x alone reaches 2^31 - 1 blocks, y and z end at 65535.
template <class Params>
Status launch(void (*kernel)(Params), int64_t grid, int threads, int shared_bytes, void* stream,
              const Params& params) {
  if (grid == 0) return nullptr;
  if (grid > INT_MAX) return "the problem needs more than 2^31 - 1 blocks";
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr int WITHOUT_OPT_IN = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > WITHOUT_OPT_IN) {
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaErrorInvalidValue) {
      cudaGetLastError();  // as below
      return "the kernel's tiles need more shared memory than a block of this GPU may have";
    }
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, dim3(unsigned(grid)), dim3(threads), arguments, shared_bytes,
                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the error is reported here, once: leave none behind for the next caller
  return cudaGetErrorString(error);
}

}  // namespace atx::ATX_TARGET::simt
