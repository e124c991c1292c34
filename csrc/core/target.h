// Which machine this translation unit is compiled for.
// The build compiles every kernel source once per target through a generated wrapper that defines
// ATX_TARGET (scalar, avx2, avx512, amx, neon, gpu, simt) and, for CPU targets, ATX_VEC_BYTES. Code
// lives in namespace atx::ATX_TARGET, because template functions are weak symbols: in one namespace
// the linker would keep one target's copy for all of them. Plain data shared by all rooms
// (params.h, kernels.h) lives in namespace atx.
#pragma once

#ifndef ATX_TARGET
#error \
    "ATX_TARGET is not defined; kernel sources are compiled through the wrappers that setup.py writes"
#endif

#if defined(__CUDACC__)
#define ATX_HD __host__ __device__ __forceinline__
#else
#define ATX_HD inline __attribute__((always_inline))
#endif
