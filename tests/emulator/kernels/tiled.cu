// A carrier of planted bugs: attention in float, 32 query rows per block and four threads per row,
// tiles of 32 keys, probabilities handed from lane to lane through shared memory.
#include "problem.h"

namespace atx::ATX_TARGET {
namespace {
constexpr int D = 32, ROWS = 32, KEYS = 32, THREADS = 128;

struct Shared {
  float q[ROWS][D + 1], k[KEYS][D + 1], v[KEYS][D + 1], p[ROWS][KEYS + 1];
};
}  // namespace

__global__ void __launch_bounds__(THREADS) tiled(const __grid_constant__ Problem p) {
  using namespace simt;
  Shared& s = shared<Shared>();
  const int thread = threadIdx.x, row = thread / 4, part = thread % 4;
  const int tiles = (p.Sq + ROWS - 1) / ROWS, h = blockIdx.x / tiles,
            first = blockIdx.x % tiles * ROWS;
  const float* q = static_cast<const float*>(p.q) + h * p.q_head;
  const float* k = static_cast<const float*>(p.k) + h * p.kv_head;
  const float* v = static_cast<const float*>(p.v) + h * p.kv_head;
  for (int i = thread; i < ROWS * D; i += THREADS)
    s.q[i / D][i % D] =
        first + i / D < p.Sq ? q[(first + i / D) * p.q_row + i % D] * p.scale : 0.0f;

  float acc[D / 4] = {}, m = -INFINITY, l = 0;
  const int diagonal = p.Sk - p.Sq;
  const int end =
      p.causal ? (first + ROWS + diagonal < p.Sk ? first + ROWS + diagonal : p.Sk) : p.Sk;
  for (int j0 = 0; j0 < end; j0 += KEYS) {
    if (!BUG(1)) sync();  // the tile before this one has been read
    for (int i = thread; i < KEYS * D; i += THREADS) {
      const int r = i / D, c = i % D;
      const bool exists = BUG(5) ? j0 + r <= p.Sk : j0 + r < p.Sk;
      s.k[r][c] = exists ? k[(j0 + r) * p.kv_row + c] : 0.0f;
      s.v[r][c] = exists ? v[(j0 + r) * p.kv_row + c] : 0.0f;
    }
    if (BUG(9) && thread >= 64) sync();  // a second barrier, for half of the block
    if (!BUG(2)) sync();                 // the tile is written
    float x[KEYS / 4], top = m;
    for (int n = 0; n < KEYS / 4; ++n) {
      const int j = j0 + n * 4 + part;
      float dot = 0;
      for (int d = 0; d < D; ++d) dot += s.q[row][d] * s.k[n * 4 + part][d];
      const bool keep =
          (BUG(5) ? j <= p.Sk : j < p.Sk) && (!p.causal || j <= first + row + diagonal);
      x[n] = keep ? dot : -INFINITY;
      top = fmaxf(top, x[n]);
    }
    top = fmaxf(top, shfl_xor(top, 1));
    if (!BUG(8) || part < 2) top = fmaxf(top, shfl_xor(top, 2));  // 8: half of the lanes
    const float base = top == -INFINITY ? 0.0f : top, shrink = expf(m - base);
    float sum = 0;
    for (int n = 0; n < KEYS / 4; ++n) {
      x[n] = expf(x[n] - base);
      s.p[row][n * 4 + part] = x[n];
      sum += x[n];
    }
    sum += shfl_xor(sum, 1);
    sum += shfl_xor(sum, 2);
    l = l * shrink + sum;
    m = top;
    if (!BUG(7)) sync_warp();  // the row of probabilities is written by four lanes
    for (int i = 0; i < D / 4; ++i) {
      float a = acc[i] * shrink;
      for (int j = 0; j < KEYS; ++j) a += s.p[row][j] * s.v[j][i * 4 + part];
      acc[i] = a;
    }
    if (!BUG(14)) sync_warp();  // not needed: the barrier of the next tile orders the same accesses
  }
  if (first + row >= p.Sq) return;
  float* o = static_cast<float*>(p.o) + h * p.o_head + (first + row) * p.o_row;
  const float inverse = l > 0 ? 1 / l : 0.0f;
  for (int i = 0; i < D / 4; ++i) o[i * 4 + part] = acc[i] * inverse;
  if (part == 0) p.lse[int64_t(h) * p.Sq + first + row] = l > 0 ? m + logf(l) : -INFINITY;
}

}  // namespace atx::ATX_TARGET

extern "C" const char* run_tiled(const atx::ATX_TARGET::Problem* p, const atx::Exec* exec) {
  using namespace atx::ATX_TARGET;
  const int64_t blocks = int64_t((p->Sq + ROWS - 1) / ROWS) * p->H;
  return guarded([&] {
    return simt::launch(tiled, blocks, THREADS, sizeof(Shared), const_cast<atx::Exec*>(exec), *p);
  });
}
