// What the files of the CPU attention backward share: tile sizes and the task.
#pragma once
#include "csrc/core/kernels.h"
#include "csrc/core/target.h"
#include "csrc/cpu/attention_fwd.h"

namespace atx::ATX_TARGET {

Status attention_bwd(const AttentionBwdParams& p, const Exec& exec);

// Keys of a block and rows (queries times heads of the group) of a tile: the depths of the sums
// over keys and over rows. They start at multiples of these whatever the task.
constexpr int BWD_BLOCK_KV = 128, BWD_TILE_ROWS = 96;

inline int queries_of_tile(const AttentionParams& p, int tile_rows = BWD_TILE_ROWS) {
  const int group = p.Hq / p.Hkv;
  return group < tile_rows ? tile_rows / group : 1;
}

// Queries [i0, i1) and keys [j0, j1) of one (batch, key head): whose gradients this is to be.
// Those of the queries are right only if all keys are here, those of the keys only if all queries
// are.
struct BwdTask {
  const AttentionBwdParams& p;
  Sequence seq;
  int b, hk, group;
  int i0, i1, j0, j1;
  bool of_queries, of_keys;

  // The rows of some of the queries, as the forward numbers them.
  Task rows(int i, int queries) const { return {p.fwd, seq, b, hk, group, i, queries}; }
};

}  // namespace atx::ATX_TARGET
