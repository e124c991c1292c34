// One small kernel per primitive, and one per way to fail.
#include "csrc/simt/simt.h"
#include "guarded.h"

namespace atx::ATX_TARGET {

struct Io {
  const void* in;
  void* out;
  int n;
};

namespace {
const float* floats(const Io& io) { return static_cast<const float*>(io.in); }
const uint16_t* halves(const Io& io) { return static_cast<const uint16_t*>(io.in); }
uint32_t* words(const Io& io) { return static_cast<uint32_t*>(io.out); }
uint32_t pair(const uint16_t* lo, const uint16_t* hi) {
  return uint32_t(*lo) | uint32_t(*hi) << 16;
}
}  // namespace

// Passing primitives.

__global__ void indices(const __grid_constant__ Io io) {
  uint32_t* out = words(io) + (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  out[0] = threadIdx.x;
  out[1] = blockIdx.x;
  out[2] = blockDim.x;
  out[3] = gridDim.x;
}

__global__ void shuffles(const __grid_constant__ Io io) {
  const int lane = threadIdx.x;
  uint32_t* out = words(io);
  out[lane] = simt::shfl(uint32_t(lane), lane + 3);
  out[32 + lane] = uint32_t(simt::shfl_xor(lane, 5));
  out[64 + lane] = uint32_t(simt::shfl_xor(float(lane), 16));
}

__global__ void votes(const __grid_constant__ Io io) {
  const int thread = threadIdx.x;
  uint32_t* out = words(io);
  out[thread] = simt::ballot(thread % 3 == 0);
  out[64 + thread] = simt::any(thread == 40);
  out[128 + thread] = simt::sync_or(thread == 40);
  out[192 + thread] = simt::sync_or(thread == 64);
}

// Element values are matrix * 64 + row * 8 + column.
__global__ void matrices(const __grid_constant__ Io io) {
  auto& tile = simt::shared<uint16_t[32][8]>();
  const int lane = threadIdx.x;
  for (int c = 0; c < 8; ++c) tile[lane][c] = uint16_t(lane * 8 + c);
  simt::sync_warp();
  uint32_t r[4], t[4];
  simt::ldmatrix_x4(r, simt::smem_address(&tile[lane]));
  simt::ldmatrix_x4_trans(t, simt::smem_address(&tile[lane]));
  for (int i = 0; i < 4; ++i) {
    words(io)[lane * 4 + i] = r[i];
    words(io)[128 + lane * 4 + i] = t[i];
  }
}

// A [16, 16], B [16, 8] as 16-bit patterns, then C [16, 8] as floats. The layout is spelled out
// here once more, in the terms of the PTX manual, so that fragment.h does not check itself.
template <class T>
__global__ void product(const __grid_constant__ Io io) {
  const uint16_t *a = halves(io), *b = a + 256;
  const float* c = reinterpret_cast<const float*>(b + 128);
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  uint32_t a_frag[4], b_frag[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8, col = in_group * 2 + (i >= 2 ? 8 : 0);
    a_frag[i] = pair(&a[row * 16 + col], &a[row * 16 + col + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int row = in_group * 2 + i * 8;
    b_frag[i] = pair(&b[row * 8 + group], &b[(row + 1) * 8 + group]);
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  simt::mma(d, a_frag, b_frag[0], b_frag[1], T{});
  float* out = static_cast<float*>(io.out);
  for (int i = 0; i < 4; ++i) out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
}

// The same of words, A [16, 8] and B [8, 8], once as they come and once rounded.
__global__ void product_tf32(const __grid_constant__ Io io) {
  const float *a = floats(io), *b = a + 128, *c = b + 64;
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  for (int rounds = 0; rounds < 2; ++rounds) {
    const auto word = [&](float x) { return rounds ? simt::to_tf32(x) : bit_cast<uint32_t>(x); };
    const uint32_t a_frag[4] = {word(a[group * 8 + in_group]), word(a[(group + 8) * 8 + in_group]),
                                word(a[group * 8 + in_group + 4]),
                                word(a[(group + 8) * 8 + in_group + 4])};
    const uint32_t b_frag[2] = {word(b[in_group * 8 + group]), word(b[(in_group + 4) * 8 + group])};
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    simt::mma(d, a_frag, b_frag[0], b_frag[1], tf32{});
    float* out = static_cast<float*>(io.out) + rounds * 128;
    for (int i = 0; i < 4; ++i)
      out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
  }
}

// Two groups of copies: what is there at issue, with the first group landed, and with both. Lane 0
// copies nothing but zeros, lane 1 half of its 16 bytes.
__global__ void copies(const __grid_constant__ Io io) {
  auto& tile = simt::shared<float[2][32][4]>();
  const int lane = threadIdx.x;
  const float* in = floats(io) + lane * 4;
  for (int g = 0; g < 2; ++g) {
    simt::cp_async16(simt::smem_address(&tile[g][lane]), in, lane == 0 ? 0 : lane == 1 ? 8 : 16);
    simt::cp_async_commit();
  }
  float* out = static_cast<float*>(io.out) + lane * 24;
  const auto look = [&](int time) {
    for (int g = 0; g < 2; ++g)
      for (int i = 0; i < 4; ++i) out[time * 8 + g * 4 + i] = tile[g][lane][i];
  };
  look(0);
  simt::cp_async_wait<1>();
  look(1);
  simt::cp_async_wait<0>();
  look(2);
}

__global__ void numbers(const __grid_constant__ Io io) {
  words(io)[0] = bit_cast<uint32_t>(simt::exp2(floats(io)[0]));
  words(io)[1] = simt::pack2<bf16>(floats(io)[1], floats(io)[2]);
  words(io)[2] = simt::pack2<f16>(floats(io)[1], floats(io)[2]);
  words(io)[3] = simt::shared<uint32_t>();
  words(io)[4] = simt::to_tf32(floats(io)[3]);
}

// In which order threads run between two barriers.
__global__ void order(const __grid_constant__ Io io) {
  auto& turn = simt::shared<uint32_t>();
  if (threadIdx.x == 0) turn = 0;
  simt::sync();
  words(io)[blockIdx.x * blockDim.x + threadIdx.x] = turn++;
}

// Failing ones.

__global__ void bad_address(const __grid_constant__ Io io) {
  if (threadIdx.x == 7) words(io)[1ll << 33] = 1;
}
__global__ void division(const __grid_constant__ Io io) { words(io)[0] = 7 / uint32_t(io.n); }
__global__ void overrun(const __grid_constant__ Io io) {
  volatile char* s = &simt::shared<char>();
  if (threadIdx.x == 0) s[io.n] = 1;
}
__global__ void overflow(const __grid_constant__ Io io) {
  volatile char frame[4096];
  frame[0] = char(io.n);
  if (io.n) overflow({io.in, io.out, io.n - 1});
  words(io)[0] = uint32_t(frame[0]);
}
__global__ void spin(const __grid_constant__ Io io) {
  while (*static_cast<volatile uint32_t*>(io.out) != 1) {
  }
}
__global__ void spin_politely(const __grid_constant__ Io io) {
  while (*static_cast<volatile uint32_t*>(io.out) != 1) simt::sync_warp();
}
__global__ void lanes_missing(const __grid_constant__ Io io) {
  if (int(threadIdx.x) != io.n) words(io)[threadIdx.x] = simt::ballot(true);
}
__global__ void two_barriers(const __grid_constant__ Io) {
  if (threadIdx.x < 32)
    simt::sync();
  else
    simt::sync();
}
__global__ void two_shuffles(const __grid_constant__ Io io) {
  if (threadIdx.x % 2)
    words(io)[0] = simt::ballot(true);
  else
    words(io)[0] = simt::shfl(1u, 0);
}
__global__ void early_return(const __grid_constant__ Io) {
  if (threadIdx.x < 32) return;
  simt::sync();
}
__global__ void wrong_lane(const __grid_constant__ Io io) { words(io)[0] = simt::shfl_xor(1u, 32); }
__global__ void unaligned_tile(const __grid_constant__ Io io) {
  uint32_t r[4];
  simt::ldmatrix_x4(r, simt::smem_address(&simt::shared<char[1024]>()) + threadIdx.x * 16 + 8);
  words(io)[0] = r[0];
}
__global__ void not_shared(const __grid_constant__ Io io) {
  words(io)[0] = simt::smem_address(io.out);
}
__global__ void too_large(const __grid_constant__ Io io) {
  words(io)[0] = simt::shared<uint32_t[1024]>()[0];
}

// Accesses for the analysis.
__global__ void write_input(const __grid_constant__ Io io) {
  const_cast<float*>(floats(io))[threadIdx.x] = 1;
}
// Element n of the input.
__global__ void read_element(const __grid_constant__ Io io) {
  if (threadIdx.x == 0) words(io)[0] = static_cast<const uint32_t*>(io.in)[io.n];
}
// Every thread reads a word of shared memory n words after its neighbor's.
__global__ void strided(const __grid_constant__ Io io) {
  auto& tile = simt::shared<uint32_t[32 * 32]>();
  for (int i = 0; i < 32; ++i) tile[i * 32 + threadIdx.x] = 0;
  simt::sync();
  words(io)[threadIdx.x] = tile[threadIdx.x * io.n % 1024];
}
__global__ void between_blocks(const __grid_constant__ Io io) {
  if (threadIdx.x == 0) words(io)[io.n * blockIdx.x] = blockIdx.x;
}
// A word of each warp is read by its lanes and then written by one of them, with or without a
// barrier in between.
__global__ void write_after_read(const __grid_constant__ Io io) {
  auto& word = simt::shared<uint32_t[2]>();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) word[warp] = 1;
  simt::sync();
  words(io)[threadIdx.x] = word[io.n == 2 ? 1 - warp : warp];
  if (io.n == 1) simt::sync_warp();
  if (io.n == 3) simt::sync();
  if (threadIdx.x % 32 == 31) word[warp] = 2;
}

}  // namespace atx::ATX_TARGET

#define ENTRY(kernel)                                                                             \
  extern "C" const char* run_##kernel(const atx::ATX_TARGET::Io* io, int64_t grid, int threads,   \
                                      int shared, atx::Exec* exec) {                              \
    using namespace atx::ATX_TARGET;                                                              \
    return guarded(                                                                               \
        [&] { return simt::launch(atx::ATX_TARGET::kernel, grid, threads, shared, exec, *io); }); \
  }

namespace atx::ATX_TARGET {
constexpr auto product_bf16 = product<bf16>;
constexpr auto product_f16 = product<f16>;
}  // namespace atx::ATX_TARGET

ENTRY(indices)
ENTRY(shuffles)
ENTRY(votes)
ENTRY(matrices)
ENTRY(product_bf16)
ENTRY(product_f16)
ENTRY(product_tf32)
ENTRY(copies)
ENTRY(numbers)
ENTRY(order)
ENTRY(bad_address)
ENTRY(division)
ENTRY(overrun)
ENTRY(overflow)
ENTRY(spin)
ENTRY(spin_politely)
ENTRY(lanes_missing)
ENTRY(two_barriers)
ENTRY(two_shuffles)
ENTRY(early_return)
ENTRY(wrong_lane)
ENTRY(unaligned_tile)
ENTRY(not_shared)
ENTRY(too_large)
ENTRY(write_input)
ENTRY(read_element)
ENTRY(strided)
ENTRY(between_blocks)
ENTRY(write_after_read)
