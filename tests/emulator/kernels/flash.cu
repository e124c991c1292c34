// A carrier of planted bugs: bf16 attention on tensor cores with double-buffered asynchronous
// copies. 64 query rows per block, 16 per warp; tiles of 64 keys in swizzled shared memory.
#include "csrc/simt/fragment.h"
#include "problem.h"

namespace atx::ATX_TARGET {
namespace {
constexpr int D = 64, ROWS = 64, KEYS = 64, THREADS = 128;
constexpr int CHUNKS = D / 8;  // 16-byte pieces of a row
constexpr uint32_t TILE_BYTES = KEYS * D * 2;

struct Shared {
  bf16 q[ROWS][D], k[2][KEYS][D], v[2][KEYS][D];
};

// Byte offset of a chunk: neighboring rows put the same column into different banks.
__device__ __forceinline__ uint32_t at(const Problem& p, int row, int chunk) {
  return uint32_t(row * D * 2 + (BUG(20) ? chunk : chunk ^ row % 8) * 16);
}

__device__ __forceinline__ void load(const Problem& p, uint32_t to, const bf16* from,
                                     int64_t stride, int first, int rows) {
  using namespace simt;
  for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
    const int r = i / CHUNKS, c = i % CHUNKS;
    const bool exists = BUG(5) ? first + r <= rows : first + r < rows;
    if (BUG(10) && !exists) continue;  // neither copied nor zeroed
    cp_async16(to + at(p, r, c),
               from + (exists ? first + r : 0) * stride + c * 8 + (BUG(11) ? 4 : 0),
               exists ? 16 : 0);
  }
}
}  // namespace

__global__ void __launch_bounds__(THREADS) flash(const __grid_constant__ Problem p) {
  using namespace simt;
  constexpr float LOG2E = 1.4426950408889634f;
  Shared& s = shared<Shared>();
  const uint32_t q_smem = smem_address(&s.q), k_smem = smem_address(&s.k),
                 v_smem = smem_address(&s.v);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (p.Sq + ROWS - 1) / ROWS, h = blockIdx.x / tiles,
            first = blockIdx.x % tiles * ROWS;
  const bf16* q = static_cast<const bf16*>(p.q) + h * p.q_head;
  const bf16* k = static_cast<const bf16*>(p.k) + h * p.kv_head;
  const bf16* v = static_cast<const bf16*>(p.v) + h * p.kv_head;
  const int diagonal = p.Sk - p.Sq;
  const int last = p.causal && first + ROWS + diagonal < p.Sk ? first + ROWS + diagonal : p.Sk;
  const int steps = last > 0 ? (last + KEYS - 1) / KEYS : 0;

  load(p, q_smem, q, p.q_row, first, p.Sq);
  if (steps > 0) {
    load(p, k_smem, k, p.kv_row, 0, p.Sk);
    load(p, v_smem, v, p.kv_row, 0, p.Sk);
  }
  cp_async_commit();

  float acc[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  uint32_t q_frag[D / 16][4];
  const float scale = p.scale * LOG2E;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2, j0 = step * KEYS;
    if (step + 1 < steps) {
      load(p, k_smem + (1 - stage) * TILE_BYTES, k, p.kv_row, j0 + KEYS, p.Sk);
      load(p, v_smem + (1 - stage) * TILE_BYTES, v, p.kv_row, j0 + KEYS, p.Sk);
    }
    if (!BUG(6)) cp_async_commit();
    if (BUG(3)) cp_async_wait<2>();
    if (!BUG(3)) cp_async_wait<1>();
    if (!BUG(2)) sync();  // the other threads' copies
    if (step == 0)
      for (int kk = 0; kk < D / 16; ++kk)
        ldmatrix_x4(q_frag[kk], q_smem + at(p, warp * 16 + lane % 16, kk * 2 + lane / 16));

    float x[KEYS / 8][4] = {};
    for (int kk = 0; kk < D / 16; ++kk)
      for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, k_smem + stage * TILE_BYTES +
                           at(p, n * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        mma(x[2 * n], q_frag[kk], b[0], b[1], bf16{});
        mma(x[2 * n + 1], q_frag[kk], b[2], b[3], bf16{});
      }
    for (int n = 0; n < KEYS / 8; ++n)
      for (int i = 0; i < 4; ++i) {
        const Place place = c_place(lane, i);
        const int j = j0 + n * 8 + place.col, row = first + warp * 16 + place.row;
        const bool exists = BUG(5) ? j <= p.Sk : j < p.Sk;
        const bool seen = BUG(15) ? j < row + diagonal : j <= row + diagonal;
        if (!exists || (p.causal && !seen)) x[n][i] = -INFINITY;
      }
    for (int r = 0; r < 2; ++r) {
      float top = m[r];
      for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
      top = fmaxf(top, shfl_xor(top, 1));
      if (!BUG(16)) top = fmaxf(top, shfl_xor(top, 2));
      const float base = top == -INFINITY ? 0.0f : top * scale, shrink = exp2(m[r] * scale - base);
      m[r] = top;
      l[r] *= shrink;
      for (int n = 0; n < KEYS / 8; ++n)
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          x[n][i] = exp2(x[n][i] * scale - base);
          l[r] += x[n][i];
        }
      for (int d = 0; d < D / 8; ++d) {
        acc[d][2 * r] *= shrink;
        acc[d][2 * r + 1] *= shrink;
      }
    }
    for (int n = 0; n < KEYS / 16; ++n) {
      uint32_t p_frag[4];
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2, column = i / 2;
        p_frag[BUG(4) ? half * 2 + column : i] =
            pack2<bf16>(x[2 * n + column][half * 2], x[2 * n + column][half * 2 + 1]);
      }
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        const uint32_t rows =
            v_smem + stage * TILE_BYTES + at(p, n * 16 + lane % 16, d * 2 + lane / 16);
        if (BUG(17)) ldmatrix_x4(b, rows);
        if (!BUG(17)) ldmatrix_x4_trans(b, rows);
        mma(acc[2 * d], p_frag, b[0], b[1], bf16{});
        mma(acc[2 * d + 1], p_frag, b[2], b[3], bf16{});
      }
    }
    if (!BUG(1)) sync();  // the next step's copies overwrite this stage
  }
  cp_async_wait<0>();

  // Each warp turns its own 16 rows of Q's tile into rows of O, and stores those as 16-byte pieces.
  for (int r = 0; r < 2; ++r) {
    l[r] += shfl_xor(l[r], 1);
    l[r] += shfl_xor(l[r], 2);
    const float inverse = l[r] > 0 ? 1 / l[r] : 0.0f;
    const int row = warp * 16 + c_place(lane, 2 * r).row;
    for (int d = 0; d < D / 8; ++d) {
      char* const to = reinterpret_cast<char*>(&s.q) + at(p, row, d) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(to) =
          pack2<bf16>(acc[d][2 * r] * inverse, acc[d][2 * r + 1] * inverse);
    }
    if (lane % 4 == 0 && first + row < p.Sq)
      p.lse[int64_t(h) * p.Sq + first + row] = l[r] > 0 ? m[r] * p.scale + logf(l[r]) : -INFINITY;
  }
  if (!BUG(7)) sync_warp();  // a row is written by four lanes and read by others
  struct alignas(16) Chunk {
    uint32_t word[4];
  };
  bf16* o = static_cast<bf16*>(p.o) + h * p.o_head;
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = warp * 16 + i / CHUNKS, c = i % CHUNKS;
    const Chunk chunk =
        *reinterpret_cast<const Chunk*>(reinterpret_cast<const char*>(&s.q) + at(p, row, c));
    if (BUG(12) || first + row < p.Sq)
      *reinterpret_cast<Chunk*>(o + (first + row) * p.o_row + c * 8) = chunk;
  }
}

}  // namespace atx::ATX_TARGET

extern "C" const char* run_flash(const atx::ATX_TARGET::Problem* p, const atx::Exec* exec) {
  using namespace atx::ATX_TARGET;
  const int64_t blocks = int64_t((p->Sq + ROWS - 1) / ROWS) * p->H;
  return guarded([&] {
    return simt::launch(flash, blocks, THREADS, sizeof(Shared), const_cast<atx::Exec*>(exec), *p);
  });
}
