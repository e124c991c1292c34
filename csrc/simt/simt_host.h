// The emulator's side of simt.h: what a kernel sees when g++ compiles it. Declarations only, so a
// kernel file compiles fast and can be instrumented while the machine in emulator/ is not. A CUDA
// thread is a fiber; whatever blocks or checks is a call into emulator/. The default argument
// `site` gives every primitive its line in a report.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "csrc/core/kernels.h"
#include "csrc/core/numeric.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace atx::ATX_TARGET {

struct Index {
  unsigned x, y, z;
};
// Initial-exec: kernels read these in their inner loops, and a dlopen'ed library would call
// __tls_get_addr each time.
#define ATX_SIMT_TLS extern constinit thread_local __attribute__((tls_model("initial-exec")))
ATX_SIMT_TLS Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

using Site = std::source_location;

// A kernel launch with its types erased.
struct Launch {
  void (*kernel)();
  int64_t grid;
  int threads, shared_bytes;
  const Exec* exec;  // names the buffers that the kernel may touch; null: any memory
  void (*call)(void (*kernel)(), const void* params);
  const void* params;
  size_t params_bytes;
};

Status run(const Launch&);  // throws what a kernel does wrong, as std::runtime_error
void barrier(Site);
bool barrier_or(bool, Site);
void warp_barrier(Site);
uint32_t exchange(uint32_t value, int source, Site);  // source: the lane to read
uint32_t vote(bool, Site);
int lane();
void* shared_memory(size_t bytes, size_t alignment, Site);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bf16, Site);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, f16, Site);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, tf32, Site);
void load_matrices(uint32_t* r, uint32_t smem, bool transposed, Site);
void load_words(uint32_t* r, uint32_t smem, Site);
void wait_copies(int groups);

inline void sync(Site site = Site::current()) { barrier(site); }
inline bool sync_or(bool p, Site site = Site::current()) { return barrier_or(p, site); }
inline void sync_warp(Site site = Site::current()) { warp_barrier(site); }

template <class T>
T shfl(T x, int lane, Site site = Site::current()) {
  static_assert(sizeof(T) == 4);
  return bit_cast<T>(exchange(bit_cast<uint32_t>(x), lane & 31, site));
}
template <class T>
T shfl_xor(T x, int mask, Site site = Site::current()) {
  static_assert(sizeof(T) == 4);
  return bit_cast<T>(exchange(bit_cast<uint32_t>(x), lane() ^ mask, site));
}
inline bool any(bool p, Site site = Site::current()) { return vote(p, site) != 0; }
inline uint32_t ballot(bool p, Site site = Site::current()) { return vote(p, site); }

template <class T>
T& shared(Site site = Site::current()) {
  return *static_cast<T*>(shared_memory(sizeof(T), alignof(T), site));
}
uint32_t smem_address(const void* pointer, Site site = Site::current());

void cp_async16(uint32_t smem, const void* global, int bytes, Site site = Site::current());
void cp_async_commit();
template <int N>
void cp_async_wait() {
  wait_copies(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem, Site site = Site::current()) {
  load_matrices(r, smem, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem, Site site = Site::current()) {
  load_matrices(r, smem, true, site);
}
inline void load_words(uint32_t (&r)[4], uint32_t smem, Site site = Site::current()) {
  load_words(&r[0], smem, site);
}
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type,
         Site site = Site::current()) {
  multiply(d, a, b0, b1, type, site);
}

// Only registers of a GPU are worth hiding a value from the compiler.
template <class X>
X opaque(X x) {
  return x;
}

// ex2.approx.ftz: a subnormal result is flushed to zero.
inline float exp2(float x) { return x < -126.0f ? 0.0f : ::exp2f(x); }

// rcp.approx.ftz, which is off by one unit at most.
inline float reciprocal(float x) { return 1 / x; }

template <class T>
uint32_t pack2(float lo, float hi) {
  return uint32_t(from_float<T>(lo).bits) | uint32_t(from_float<T>(hi).bits) << 16;
}
inline uint32_t to_tf32(float x) { return bit_cast<uint32_t>(rounded_to_tf32(x)); }

template <class Params>
Status launch(void (*kernel)(Params), int64_t grid, int threads, int shared_bytes, void* stream,
              const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "parameters travel by value");
  const auto call = [](void (*kernel)(), const void* params) {
    reinterpret_cast<void (*)(Params)>(kernel)(*static_cast<const Params*>(params));
  };
  return run({.kernel = reinterpret_cast<void (*)()>(kernel),
              .grid = grid,
              .threads = threads,
              .shared_bytes = shared_bytes,
              .exec = static_cast<const Exec*>(stream),
              .call = call,
              .params = &params,
              .params_bytes = sizeof(Params)});
}

}  // namespace simt
}  // namespace atx::ATX_TARGET
