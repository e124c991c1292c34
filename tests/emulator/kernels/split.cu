// A carrier of planted bugs: one query row against keys split over blocks, then a kernel that
// merges the parts. Four lanes hold one key; 32 keys are in flight per block.
#include "problem.h"

namespace atx::ATX_TARGET {
namespace {
constexpr int D = 64, THREADS = 128, LANES_PER_KEY = 4, KEYS = THREADS / LANES_PER_KEY,
              PIECE = D / LANES_PER_KEY;

struct Shared {
  float o[KEYS][D], m[KEYS], l[KEYS];
};
}  // namespace

__global__ void __launch_bounds__(THREADS) split(const __grid_constant__ Problem p) {
  using namespace simt;
  Shared& s = shared<Shared>();
  const int group = threadIdx.x / LANES_PER_KEY, part = threadIdx.x % LANES_PER_KEY;
  const int h = blockIdx.x / p.splits, piece = blockIdx.x % p.splits;
  const int per_split = ((p.Sk + p.splits - 1) / p.splits + KEYS - 1) / KEYS * KEYS;
  const int begin = piece * per_split, end = begin + per_split < p.Sk ? begin + per_split : p.Sk;
  const float* q = static_cast<const float*>(p.q) + h * p.q_head + part * PIECE;
  const float* k = static_cast<const float*>(p.k) + h * p.kv_head + part * PIECE;
  const float* v = static_cast<const float*>(p.v) + h * p.kv_head + part * PIECE;

  float acc[PIECE] = {}, m = -INFINITY, l = 0;
  for (int j0 = begin; j0 < end; j0 += KEYS) {
    const int j = j0 + group;
    const bool exists = BUG(5) ? j <= end : j < end;
    if (BUG(8) && !exists) break;  // lanes leave before a shuffle of the whole warp
    float dot = 0;
    if (exists || BUG(13))  // 13: loads that nothing uses
      for (int d = 0; d < PIECE; ++d) dot += q[d] * p.scale * k[j * p.kv_row + d];
    dot += shfl_xor(dot, 1);
    dot += shfl_xor(dot, 2);
    if (!exists) continue;
    const float top = fmaxf(m, dot), shrink = expf(m - top), weight = expf(dot - top);
    m = top;
    l = l * shrink + weight;
    for (int d = 0; d < PIECE; ++d) acc[d] = acc[d] * shrink + weight * v[j * p.kv_row + d];
  }
  for (int d = 0; d < PIECE; ++d) s.o[group][part * PIECE + d] = acc[d];
  if (part == 0) {
    s.m[group] = m;
    s.l[group] = l;
  }
  if (!BUG(2)) sync();  // every group's part is written
  const int d = threadIdx.x;
  if (d >= D) return;
  float top = -INFINITY, sum = 0, o = 0;
  for (int g = 0; g < KEYS; ++g) top = fmaxf(top, s.m[g]);
  for (int g = 0; g < KEYS; ++g) {
    const float weight = s.m[g] == -INFINITY ? 0.0f : expf(s.m[g] - top);
    sum += weight * s.l[g];
    o += weight * s.o[g][d];
  }
  const int64_t slot = int64_t(h) * (BUG(18) ? p.splits - 1 : p.splits) + piece;
  p.part_o[slot * D + d] = sum > 0 ? o / sum : 0.0f;
  if (d == 0) p.part_lse[slot] = sum > 0 ? top + logf(sum) : -INFINITY;
}

__global__ void __launch_bounds__(D) merge(const __grid_constant__ Problem p) {
  const int h = blockIdx.x, d = threadIdx.x;
  float top = -INFINITY, sum = 0, o = 0;
  for (int i = 0; i < p.splits; ++i) top = fmaxf(top, p.part_lse[h * p.splits + i]);
  for (int i = 0; i < p.splits; ++i) {
    const float weight = top == -INFINITY ? 0.0f : expf(p.part_lse[h * p.splits + i] - top);
    sum += weight;
    o += weight * p.part_o[(h * p.splits + i) * D + d];
  }
  static_cast<float*>(p.o)[h * p.o_head + d] = sum > 0 ? o / sum : 0.0f;
  if (d == 0) p.lse[h] = sum > 0 ? top + logf(sum) : -INFINITY;
}

}  // namespace atx::ATX_TARGET

extern "C" const char* run_split(const atx::ATX_TARGET::Problem* p, const atx::Exec* exec) {
  using namespace atx::ATX_TARGET;
  return guarded([&] {
    void* const stream = const_cast<atx::Exec*>(exec);
    const atx::Status status =
        simt::launch(split, int64_t(p->H) * p->splits, THREADS, sizeof(Shared), stream, *p);
    return status ? status : simt::launch(merge, p->H, D, 0, stream, *p);
  });
}
