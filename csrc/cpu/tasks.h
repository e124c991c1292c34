// How an attention call becomes tasks. One task = one (batch, key head, block of queries); the
// query heads of a group are rows of the same task, so that k and v are read and converted once per
// group. Generic over how a task is computed:
//   Many     a class for tasks of many rows, with their accumulation type, its preferred rows of a
//            task, and take(scratch, p, rows), attend(task, scores); if it LOOKS_AHEAD, under a
//            block mask attend is told the next task and its scores, too
//   FewRows  the same for up to FewRows::MAX rows (decoding)
#pragma once
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/scratch.h"

namespace atx::ATX_TARGET {

struct Call {
  const AttentionParams& p;
  int group, queries;  // heads per key head, queries of a task
  int64_t blocks;      // tasks of a (batch, key head)
  int64_t tasks;
};

// Enough tasks for every thread to have its share of long and short ones. A row's result does not
// depend on it.
inline Call plan(const AttentionParams& p, int task_rows, int num_threads) {
  const int group = p.Hq / p.Hkv;
  const int64_t heads = int64_t(p.B) * p.Hkv, wanted = num_threads > 1 ? 4 * num_threads : 1;
  int queries = group < task_rows ? task_rows / group : 1;
  // Queries of one block of a mask see the same keys, or none at all.
  if (const int block = 1 << p.blocks.log2_q; p.blocks.visited && queries > block) queries = block;
  while (queries > 1 && queries * group > SMALLEST_BLOCK_ROWS &&
         heads * ((p.Sq + queries - 1) / queries) < wanted)
    queries = (queries + 1) / 2;
  if (queries > p.Sq) queries = p.Sq;
  const int64_t blocks = (p.Sq + queries - 1) / queries;
  return {p, group, queries, blocks, heads * blocks};
}

// Task t of a call, and what its heads' scores are. First, last, second, last but one ...: causal
// blocks grow, and every stretch of this order has its share.
template <class Score>
Task task_of(const Call& call, int64_t t, Score* scores) {
  const AttentionParams& p = call.p;
  const int64_t head = t / call.blocks, n = t % call.blocks;
  const int b = int(head / p.Hkv), hk = int(head % p.Hkv);
  const int i0 = int(n % 2 ? call.blocks - 1 - n / 2 : n / 2) * call.queries;
  const Sequence seq = sequence(p, b);
  for (int g = 0; g < call.group; ++g) scores[g] = Score(p, seq, b, hk * call.group + g);
  return {p, seq, b, hk, call.group, i0, seq.sq - i0 < call.queries ? seq.sq - i0 : call.queries};
}
template <class Score>
bool sees_keys(const Task& task, const Score* scores) {
  return task.queries > 0 &&
         end_before(scores, task.group, task.i0, task.i0 + task.queries, task.seq.sk) > 0;
}

template <class Many, class FewRows, class Score>
void run_tasks(const Call& call, int64_t first, int64_t last) {
  const AttentionParams& p = call.p;
  Scratch scratch;
  Many many_rows;
  FewRows few_rows;
  Score *scores, *after_scores;
  const auto carve = [&] {
    scores = scratch.take<Score>(call.group);
    after_scores = scratch.take<Score>(call.group);
    many_rows.take(scratch, p, call.queries * call.group);
    few_rows.take(scratch, p);
  };
  carve();
  scratch.allocate();
  carve();

  int64_t after = first;  // the next task that sees keys
  for (int64_t t = first; t < last; ++t) {
    const Task task = task_of(call, t, scores);
    if (task.queries <= 0) continue;
    // The choice between two roundings is the sequence's own: neither the tasks nor the batch may
    // matter.
    if (int64_t(task.seq.sq) * call.group <= FewRows::MAX) {
      few_rows.attend(task, scores);
    } else if constexpr (Score::SPARSE && Many::LOOKS_AHEAD) {
      if (after <= t) {
        after = t + 1;
        while (after < last && !sees_keys(task_of(call, after, after_scores), after_scores))
          ++after;
      }
      const Task then = task_of(call, after < last ? after : t, after_scores);
      many_rows.attend(task, scores, after < last ? &then : nullptr, after_scores);
    } else {
      many_rows.attend(task, scores);
    }
  }
}

template <class Many, class FewRows, class Score>
void run(const AttentionParams& p, const Exec& exec) {
  const Call call = plan(p, Many::TASK_ROWS, exec.num_threads);
  exec.parallel_for(
      call.tasks,
      [](const void* call, int64_t first, int64_t last) {
        run_tasks<Many, FewRows, Score>(*static_cast<const Call*>(call), first, last);
      },
      &call);
}

template <class Many, class FewRows>
void run_by_score(const AttentionParams& p, const Exec& exec) {
  using A = typename Many::Accumulator;
  // A scale that is not positive would turn the maximum of the raw scores around; General
  // multiplies before it.
  switch (p.scale > 0 || p.blocks.visited ? score_id(p) : ScoreId::General) {
    case ScoreId::Window:
      return run<Many, FewRows, Window<A>>(p, exec);
    case ScoreId::General:
      return run<Many, FewRows, General<A>>(p, exec);
    case ScoreId::Blocks:
      return run<Many, FewRows, Blocks<A>>(p, exec);
  }
}

}  // namespace atx::ATX_TARGET
