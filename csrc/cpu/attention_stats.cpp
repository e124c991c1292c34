// With the weights P = exp(Y - lse), which are not kept:
//   entropy_i = -Σ_j P_ij ln P_ij,  top weight max_j P_ij and its first j,  column sum_j = Σ_i P_ij
// Blocks of keys outside, tiles of rows inside. Where (batch, key head) pairs can feed the threads,
// one task has all rows and all keys of one: S = Q Kᵀ is formed once. Where they cannot, tasks of a
// stretch of queries form the statistics of rows, and tasks of a block of keys those of columns: S
// is formed twice, with the same arithmetic in the same order, so that the bits do not depend on
// the choice.
// All four statistics in the time of attention_fwd, one thread, B1 H8 S2048, best of 9 rounds on a
// busy machine: AVX2 f32 D 64 0.66, causal 0.62, bf16 D 128 0.57; AVX-512 f32 D 64 0.65, bf16 D 128
// 0.55.
#include "csrc/cpu/attention_stats.h"

#include "csrc/cpu/attention_stats_tile.h"

namespace atx::ATX_TARGET {
namespace {

// Queries of a task that has all keys but not all queries: as many rows as a block has keys.
int stretch_of_queries(const AttentionParams& p) {
  const int group = p.Hq / p.Hkv;
  return group < STATS_BLOCK_KV ? STATS_BLOCK_KV / group : 1;
}

struct Part {
  Task rows;
  int j0, j1;  // keys
  bool of_rows, of_columns;
};

template <class A>
class Statistics {
  static constexpr int PANEL = StatsKeys<A>::PANEL;

 public:
  void take(Scratch& scratch, const AttentionParams& p, int rows) {
    const int group = p.Hq / p.Hkv;
    tile_queries_ = group < STATS_TILE_ROWS ? STATS_TILE_ROWS / group : 1;
    tile_.take(scratch, p, tile_queries_ * group);
    keys_.take(scratch, p);
    products_ = scratch.take<A>(int64_t(tile_queries_) * group * PANEL);
    row_stats_.take(scratch, rows);
    column_sums_.take(scratch, group);
  }

  template <class Score>
  void compute(const AttentionStatsParams& p, const Part& part, const Score* scores) {
    const Task& rows = part.rows;
    if (part.of_rows) row_stats_.clear(rows.rows());
    for (int j = part.j0; j < part.j1; j += STATS_BLOCK_KV) {
      const int end = part.j1 - j < STATS_BLOCK_KV ? part.j1 : j + STATS_BLOCK_KV;
      if (part.of_columns) column_sums_.clear(rows.group);
      add_block(part, scores, j, end);
      if (part.of_columns) column_sums_.store(p, rows, j, end);
    }
    if (part.of_rows) row_stats_.store(p, rows);
  }

 private:
  template <class Score>
  void add_block(const Part& part, const Score* scores, int j0, int j1) {
    const Task& rows = part.rows;
    bool loaded = false;
    for (int i = rows.i0, last = rows.i0 + rows.queries; i < last; i += tile_queries_) {
      const int queries = last - i < tile_queries_ ? last - i : tile_queries_;
      int begin = scores->kv_begin(i, i + queries), end = scores->kv_end(i, i + queries);
      if (begin < j0) begin = j0;
      if (end > j1) end = j1;
      if (begin >= end) continue;
      if (!loaded) keys_.load(rows, j0, j1);
      loaded = true;
      const Task tile = {rows.p, rows.seq, rows.b, rows.hk, rows.group, i, queries};
      tile_.load(tile);
      for (int j = begin - (begin - j0) % PANEL; j < end; j += PANEL)
        add_panel<PANEL_VECS>(part, tile, scores, j);
    }
  }

  // Every row of the tile with the panel that starts with key j.
  template <int VECS, class Score>
  void add_panel(const Part& part, const Task& tile, const Score* scores, int j) {
    constexpr int WIDTH = VECS * Lanes<A>::COUNT;
    if constexpr (VECS > 1)
      if (keys_.width(j) < WIDTH) return add_panel<VECS - 1>(part, tile, scores, j);
    const AttentionParams& p = tile.p;
    Gemm<A, VECS>::scores(tile.rows(), p.D, sum_run(p.dtype, p.D), tile_.q, keys_.panel(j, p.D),
                          products_);
    if (scores->full(tile.i0, tile.i0 + tile.queries, j, j + WIDTH))
      log2_weights<true>(tile, scores, tile_.log2_sum, j, keys_.end, WIDTH, products_);
    else
      log2_weights<false>(tile, scores, tile_.log2_sum, j, keys_.end, WIDTH, products_);
    const int first_row = (tile.i0 - part.rows.i0) * tile.group;
    if (part.of_rows) row_stats_.add(first_row, tile.rows(), j, WIDTH, products_);
    if (part.of_columns) column_sums_.add(tile, j - keys_.first, WIDTH, products_);
  }

  int tile_queries_;
  StatsKeys<A> keys_;
  StatsRows<A> tile_;
  A* products_;  // [rows of a tile, PANEL]
  RowStats<A> row_stats_;
  ColumnSums<A> column_sums_;
};

// How the scores of each (batch, key head) are cut into tasks, along queries or along keys.
struct Call {
  const AttentionStatsParams& p;
  bool of_rows, of_columns;
  int queries, keys;  // of a task
  int64_t pieces;     // tasks of a (batch, key head)
};

template <class A, class Score>
void run_tasks(const Call& call, int64_t first, int64_t last) {
  const AttentionParams& p = call.p.fwd;
  const int group = p.Hq / p.Hkv;
  Scratch scratch;
  Statistics<A> statistics;
  Score* scores;
  const auto carve = [&] {
    scores = scratch.take<Score>(group);
    statistics.take(scratch, p, call.of_rows ? call.queries * group : 0);
  };
  carve();
  scratch.allocate();
  carve();

  for (int64_t t = first; t < last; ++t) {
    const int64_t head = t / call.pieces, n = t % call.pieces;
    const int b = int(head / p.Hkv), hk = int(head % p.Hkv);
    const Sequence seq = sequence(p, b);
    // First, last, second, last but one ...: causality makes them differ in work, and every stretch
    // of this order has its share.
    const int64_t piece = n % 2 ? call.pieces - 1 - n / 2 : n / 2;
    const auto clip = [](int64_t x, int length) { return int(x < length ? x : length); };
    const bool along_queries = !call.of_columns;
    const int i0 = along_queries ? clip(piece * call.queries, seq.sq) : 0;
    const int i1 = along_queries ? clip((piece + 1) * call.queries, seq.sq) : seq.sq;
    const int j0 = along_queries ? 0 : clip(piece * call.keys, seq.sk);
    const int j1 = along_queries ? seq.sk : clip((piece + 1) * call.keys, seq.sk);
    for (int g = 0; g < group; ++g) scores[g] = Score(p, seq, b, hk * group + g);
    const Task rows = {p, seq, b, hk, group, i0, i1 - i0};
    statistics.compute(call.p, Part{rows, j0, j1, call.of_rows, call.of_columns}, scores);
  }
}

template <class A, class Score>
void run(const AttentionStatsParams& p, const Exec& exec) {
  const AttentionParams& f = p.fwd;
  const int64_t heads = int64_t(f.B) * f.Hkv, threads = exec.num_threads;
  const auto pass = [&](bool of_rows, bool of_columns, int queries, int keys, int64_t pieces) {
    const Call call = {p, of_rows, of_columns, queries, keys, pieces};
    exec.parallel_for(
        heads * pieces,
        [](const void* call, int64_t first, int64_t last) {
          run_tasks<A, Score>(*static_cast<const Call*>(call), first, last);
        },
        &call);
  };
  const bool of_rows = p.entropy || p.top_weight || p.top_index, of_columns = p.column_sum;
  // One product on the threads that have heads, or two on all.
  if (of_rows && of_columns && (heads + threads - 1) / threads * threads <= 2 * heads)
    return pass(true, true, f.Sq, f.Sk, 1);
  const int queries = stretch_of_queries(f), keys = STATS_BLOCK_KV;
  if (of_rows) pass(true, false, queries, f.Sk, (int64_t(f.Sq) + queries - 1) / queries);
  if (of_columns) pass(false, true, f.Sq, keys, (int64_t(f.Sk) + keys - 1) / keys);
}

template <class A>
void by_score(const AttentionStatsParams& p, const Exec& exec) {
  switch (score_id(p.fwd)) {
    case ScoreId::Window:
      return run<A, Window<A>>(p, exec);
    default:
      return run<A, General<A>>(p, exec);
  }
}

}  // namespace

Status attention_stats(const AttentionStatsParams& p, const Exec& exec) {
  if (p.fwd.B == 0 || p.fwd.Hq == 0) return nullptr;
  p.fwd.dtype == DType::f64 ? by_score<double>(p, exec) : by_score<float>(p, exec);
  return nullptr;
}

}  // namespace atx::ATX_TARGET
