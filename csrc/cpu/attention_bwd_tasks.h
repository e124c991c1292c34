// How a backward call becomes tasks, and the passes over rows before and after them. Generic over
// Gradients, the class that computes a task: its accumulation type, its BLOCK_Q and BLOCK_KV, and
// take(scratch, p, queries), compute(task, scores).
// Where (batch, key head) pairs can feed the threads, one task has all queries and all keys of one:
// five products per tile. Where they cannot, tasks of a stretch of queries form dQ and tasks of a
// stretch of keys form dK and dV: seven products, with the same arithmetic in the same order, so
// that the bits do not depend on the choice.
#pragma once
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_bwd_cells.h"
#include "csrc/cpu/attention_bwd_rows.h"
#include "csrc/cpu/for_tasks.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

// Queries of a task of the pass that forms delta.
constexpr int DELTA_QUERIES = 256;
// Tiles of queries or blocks of keys of a task that does not have all of them: each packs the other
// side anew.
constexpr int LARGEST_STRETCH = 4;

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Batch entries and key heads. `inner` of them are one task's, because they share what it writes.
struct Heads {
  int outer_b, outer_h, inner_b, inner_h;
  int64_t tasks() const { return int64_t(outer_b) * outer_h; }
};

// How the scores of the heads are cut into tasks, along queries or along keys.
struct Cut {
  Heads heads;
  bool of_queries, of_keys;
  int stretch;     // queries (keys) of a task
  int64_t pieces;  // tasks for the same heads
};

inline Cut whole(Heads heads, bool of_queries, bool of_keys) {
  return {heads, of_queries, of_keys, MAX_LENGTH, 1};
}
// `length` in stretches of a multiple of `unit`, enough for every thread to have its share of long
// and short ones.
inline Cut stretches(Heads heads, bool of_queries, int length, int unit, int num_threads) {
  const int64_t units = ceil_div(length, unit);
  int64_t n = heads.tasks() * units / (4 * num_threads);
  n = n < 1 ? 1 : n < LARGEST_STRETCH ? n : LARGEST_STRETCH;
  return {heads, of_queries, !of_queries, int(n * unit), length > 0 ? ceil_div(units, n) : 1};
}

template <class Gradients, class Score>
void run_tasks(const AttentionBwdParams& p, const Cut& cut, int64_t first, int64_t last) {
  const AttentionParams& f = p.fwd;
  const int group = f.Hq / f.Hkv;
  Scratch scratch;
  Gradients gradients;
  Score* scores;
  const auto carve = [&] {
    scores = scratch.take<Score>(group);
    gradients.take(scratch, p, !cut.of_queries ? 0 : cut.stretch < f.Sq ? cut.stretch : f.Sq);
  };
  carve();
  scratch.allocate();
  carve();

  const auto compute = [&](int b, int hk, int64_t from) {
    const Sequence seq = sequence(f, b);
    const auto clip = [](int64_t x, int length) { return int(x < length ? x : length); };
    BwdTask task = {p, seq, b, hk, group, 0, seq.sq, 0, seq.sk, cut.of_queries, cut.of_keys};
    if (cut.of_queries)
      task.i0 = clip(from, seq.sq), task.i1 = clip(from + cut.stretch, seq.sq);
    else
      task.j0 = clip(from, seq.sk), task.j1 = clip(from + cut.stretch, seq.sk);
    for (int g = 0; g < group; ++g) scores[g] = Score(f, seq, b, hk * group + g);
    gradients.compute(task, scores);
  };
  const Heads& heads = cut.heads;
  for (int64_t t = first; t < last; ++t) {
    // Neighbors are of different batch entries, which may differ in length, and first, last, second
    // ... stretches, which causality makes differ in work: every thread has its share.
    const int64_t head = t % heads.tasks(), n = t / heads.tasks();
    const int b = int(head % heads.outer_b), hk = int(head / heads.outer_b);
    const int64_t from = (n % 2 ? cut.pieces - 1 - n / 2 : n / 2) * cut.stretch;
    for (int inner_h = 0; inner_h < heads.inner_h; ++inner_h)
      for (int inner_b = 0; inner_b < heads.inner_b; ++inner_b)
        compute(b + inner_b, hk + inner_h, from);
  }
}

template <class Gradients, class Score>
void run(const AttentionBwdParams& p, const Exec& exec) {
  using A = typename Gradients::Accumulator;
  const AttentionParams& f = p.fwd;
  const auto pass = [&](const Cut& cut) {
    for_tasks(exec, cut.heads.tasks() * cut.pieces, [&](int64_t first, int64_t last) {
      run_tasks<Gradients, Score>(p, cut, first, last);
    });
  };
  const bool of_mask = MaskCells<A>::serve(p);
  const bool of_queries = p.d_q || p.row_shares || of_mask, of_keys = p.d_k || p.d_v;
  if (!of_queries && !of_keys) return;
  const Heads each = {f.B, f.Hkv, 1, 1};
  Heads sharing = each;
  if (of_mask && MaskCells<A>::share_batch(p)) sharing.outer_b = 1, sharing.inner_b = f.B;
  if (of_mask && MaskCells<A>::share_heads(p)) sharing.outer_h = 1, sharing.inner_h = f.Hkv;
  // Five products on the threads that have heads, or seven on all.
  const int64_t threads = exec.num_threads, tasks = sharing.tasks();
  if (threads == 1 ||
      (of_queries && of_keys && 5 * threads * ceil_div(tasks, threads) <= 7 * tasks))
    return pass(whole(sharing, of_queries, of_keys));
  if (of_queries)
    pass(stretches(sharing, true, f.Sq, queries_of_tile(f, Gradients::BLOCK_Q), exec.num_threads));
  if (of_keys) pass(stretches(each, false, f.Sk, Gradients::BLOCK_KV, exec.num_threads));
}

template <class Gradients>
void run_by_score(const AttentionBwdParams& p, const Exec& exec) {
  using A = typename Gradients::Accumulator;
  const AttentionParams& f = p.fwd;
  const int64_t heads = int64_t(f.B) * f.Hq, pieces = ceil_div(f.Sq, DELTA_QUERIES);
  for_tasks(exec, heads * pieces, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t head = t / pieces;
      sum_rows<A>(p, int(head / f.Hq), int(head % f.Hq), int(t % pieces) * DELTA_QUERIES,
                  DELTA_QUERIES);
    }
  });
  switch (score_id(f)) {
    case ScoreId::Window:
      run<Gradients, Window<A>>(p, exec);
      break;
    case ScoreId::General:
      run<Gradients, General<A>>(p, exec);
      break;
    case ScoreId::Blocks:
      run<Gradients, Blocks<A>>(p, exec);
  }
  if (p.d_alibi || p.d_sinks)
    for_tasks(exec, heads, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) sum_head<A>(p, int(t / f.Hq), int(t % f.Hq));
    });
}

}  // namespace atx::ATX_TARGET
