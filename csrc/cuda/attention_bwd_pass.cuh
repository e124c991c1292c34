// A pass of the backward (attention_bwd.cuh) over the partners of a block's rows: copies, weights
// and gradients of a tile's pairs, and sums, by an Engine's products.
#pragma once
#include "csrc/cuda/attention_bwd_block.cuh"
#include "csrc/cuda/heuristics.h"
#include "csrc/cuda/nonfinite.cuh"

namespace atx::ATX_TARGET {

template <class Engine>
struct BwdSmem : Engine::Smem {
  RowStat stats[Engine::Tile::STAGES][Engine::STEP];  // of a tile's queries, where keys are owned
};

// A pass over the partners of a block's rows.
template <class Engine, class Score>
struct BwdPass {
  using Tile = typename Engine::Tile;
  using T = typename Tile::T;
  using Smem = BwdSmem<Engine>;
  // So many threads copy a tile: all of them, or half of them A' and the others B'.
  static constexpr int COPIERS = Engine::COPIERS, TEAMS = Tile::THREADS / COPIERS;
  using Stream = TileStream<typename Engine::OtherTile, COPIERS, TEAMS>;
  static constexpr Pass PASS = Tile::PASS;
  static constexpr bool KEYS = owns_keys(PASS);
  static constexpr bool SUMS_A = PASS != Pass::V, SUMS_B = PASS == Pass::V || PASS == Pass::KV;
  static constexpr bool SHARES = !Score::LINEAR && !Score::SPARSE;
  // What plain tiles save is little beside products on FMA units, or the logits of General.
  static constexpr bool TELLS_PLAIN = Score::LINEAR && !std::is_same_v<T, float>;
  static constexpr int STEP = Tile::STEP, STAGES = Tile::STAGES, THREADS = Tile::THREADS;
  static constexpr int ROWS = Engine::ROWS, COLS = Engine::COLS;

  const AttentionBwdParams& p;
  const BwdBlock& block;
  Smem& smem;
  const Steps steps;
  Engine engine;
  Stream a, b;         // of the next tile
  int stage = 0;       // where this tile is
  int64_t stat_at;     // KEYS: where the next tile's query threadIdx.x has its lse and delta
  RowStat stat;        // and what they are
  RowStat rows[ROWS];  // otherwise: of this lane's rows
  typename Engine::SumsA sums_a = {};
  typename Engine::SumsB sums_b = {};
  float shares[ROWS] = {};  // of this lane's rows (params.h, row_shares), General only

  __device__ __forceinline__ BwdPass(const AttentionBwdParams& p, const BwdBlock& block, Smem& smem,
                                     Steps steps, const GlobalMatrix<const T>& other_a,
                                     const GlobalMatrix<const T>& other_b)
      : p(p),
        block(block),
        smem(smem),
        steps(steps),
        engine(smem),
        a(other_a, steps.first),
        b(other_b, steps.first),
        stat_at(head_offset(p.fwd, block.seq, block.b, block.h0) +
                (KEYS ? steps.first + int(threadIdx.x) : block.first)),
        stat{0, 0} {
    if constexpr (!KEYS) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        rows[r] =
            row_stat<Score>(p, stat_at + engine.row(r), block.first + engine.row(r) < block.seq.sq);
    }
  }

  // Starts the copies of the tile at `at`. WHOLE: TileStream's.
  template <bool WHOLE>
  __device__ __forceinline__ void fetch(int to, int at) {
    if (Stream::Walk::is_of_team(0)) a.template load<WHOLE>(smem.other[2 * to], at);
    if (Stream::Walk::is_of_team(1)) b.template load<WHOLE>(smem.other[2 * to + 1], at);
    simt::cp_async_commit();
    if (KEYS && threadIdx.x < STEP)
      stat = row_stat<Score>(p, stat_at, at + int(threadIdx.x) < a.from.rows);
  }

  // Moves on to the tile after the one at `at` of head h, and fetches it, if there is one. A sparse
  // policy stops at the head's end.
  template <bool WHOLE>
  __device__ __forceinline__ void fetch_next(const Score& score, int to, int h, int at) {
    if constexpr (Score::SPARSE) return fetch_from(score, to, at, at + STEP);
    const bool same_head = at + STEP < steps.last;
    if (!same_head && (!KEYS || h + 1 == block.h1)) return;
    const int next = same_head ? at + STEP : steps.first;
    a.move((next - at) * a.from.stride + (same_head ? 0 : p.fwd.q_stride.head));
    b.move((next - at) * b.from.stride + (same_head ? 0 : p.d_o_stride.head));
    if (KEYS) stat_at += next - at + (same_head ? 0 : p.fwd.lse_head);
    fetch<WHOLE>(to, next);
  }

  // The first tile at or after `at` with a partner of the block's rows; steps.last: there is none.
  __device__ __forceinline__ int tile_from(const Score& score, int at) const {
    if constexpr (!Score::SPARSE) {
      return at;
    } else {
      const int own_end = block.first + Tile::BLOCK;
      const int next = KEYS ? score.next_query(block.first, own_end, at)
                            : score.next_key(block.first, own_end, at);
      return next < steps.last ? next / STEP * STEP : steps.last;
    }
  }
  // Sparse policies only: moves on from the tile at `at` to the head's first one from `from` on,
  // and fetches it. If there is none, goes to the start of the next head.
  __device__ __forceinline__ void fetch_from(const Score& score, int to, int at, int from) {
    const int next = tile_from(score, from);
    const bool ends = next >= steps.last;
    const int rows = (ends ? steps.first : next) - at;
    a.move(rows * a.from.stride + (KEYS && ends ? p.fwd.q_stride.head : 0));
    b.move(rows * b.from.stride + (KEYS && ends ? p.d_o_stride.head : 0));
    if (KEYS) stat_at += rows + (ends ? p.fwd.lse_head : 0);
    if (!ends) fetch<false>(to, next);
  }

  // Where tiles start that are plain: whole and chunked, as the one after it is, and nothing in it
  // is masked. Two bounds, found once: asked tile by tile, as a sparse policy must be, what the
  // answer takes stays in registers.
  __device__ __forceinline__ Steps plain_steps(const Score& score) const {
    if (!a.chunked() || !b.chunked()) return {0, 0};
    const int own_end = block.first + Tile::BLOCK, whole = a.from.rows - 2 * STEP + 1;
    const Steps full = KEYS ? full_query_steps<STEP>(score, block.first, own_end)
                            : full_key_steps<STEP>(score, block.first, own_end);
    return {full.first, full.last < whole ? full.last : whole};
  }
  // Of a sparse policy, for the tile at `at`: fetch_from looks after the one after it.
  __device__ __forceinline__ bool is_plain(const Score& score, int at) const {
    if (!a.chunked() || !b.chunked() || at + STEP > a.from.rows) return false;
    const int own_end = block.first + Tile::BLOCK;
    if (KEYS) return score.full(at, at + STEP, block.first, own_end);
    return score.full(block.first, own_end, at, at + STEP);
  }

  // Of the query of this lane's row r and column c.
  __device__ __forceinline__ RowStat stat_of(int r, int c) const {
    if constexpr (KEYS) return smem.stats[stage][engine.col(c)];
    return rows[KEYS ? 0 : r];
  }
  // The pair of this lane's row r and column c in the tile at `at`.
  __device__ __forceinline__ Pair place(int r, int c, int at) const {
    const int own = block.first + engine.row(r), other = at + engine.col(c);
    return KEYS ? Pair{other, own} : Pair{own, other};
  }

  // x ← weights, d ← dX, but for a linear policy's factor.
  template <bool MASKED>
  __device__ __forceinline__ void differentiate(const Score& score, typename Engine::Products& x,
                                                typename Engine::Products& d, int at,
                                                uint64_t seen) const {
    const float unit_log2 = float(p.fwd.scale) * LOG2_E;
    for_grid<ROWS, COLS>([&](int r, int c) {
      const auto [i, j] = place(r, c, at);
      const RowStat row = stat_of(r, c);
      bool attends = true;
      if constexpr (MASKED) {
        // A query that does not exist has the base of one that attends to nothing.
        attends = (j < score.sk) & (row.base != -INFINITY);
        if constexpr (Score::SPARSE)
          attends &= bool(seen >> (r * COLS + c) & 1);
        else
          attends &= bool(score.template keep<OneLane<float>>(i, j, 1));
      }
      const PairGradient g =
          pair_gradient(unit_log2, engine.at(x, r, c), engine.at(d, r, c), row, attends);
      engine.at(x, r, c) = g.weight;
      engine.at(d, r, c) = g.product;
    });
  }

  // The same for a policy that is not linear.
  __device__ __forceinline__ void differentiate_logits(const Score& score,
                                                       typename Engine::Products& x,
                                                       typename Engine::Products& d, int h, int at,
                                                       Pair from, Pair to, uint64_t seen) {
    const auto pair = [&](int r, int c) { return place(r, c, at); };
    uint32_t kept = ~0u;
    if (p.fwd.dropout > 0)
      kept =
          kept_pairs<Calls<ROWS, COLS, KEYS, Engine::NEIGHBORS ? 2 : 1>>(p.fwd, block.b, h, pair);
    typename Engine::Products y;
    for_grid<ROWS, COLS>([&](int r, int c) { engine.at(y, r, c) = engine.at(x, r, c); });
    const auto d_at = [&](int r, int c) -> float& { return engine.at(d, r, c); };
    grid_gradients<T, ROWS, COLS, Engine::NEIGHBORS && !KEYS>(
        p.fwd, score, block.seq.sq, from, to, seen, kept,
        [&](int r, int c) -> float& { return engine.at(y, r, c); }, d_at, pair,
        [&](int r, int c) { return stat_of(r, c); });
    if constexpr (PASS == Pass::Q && SHARES)
      for_grid<ROWS, COLS>([&](int r, int c) {
        const auto [i, j] = pair(r, c);
        shares[r] -= engine.at(d, r, c) * score.template share<OneLane<float>>(i, j);
      });
    through_scale_and_cap<T, ROWS, COLS>(
        score, [&](int r, int c) { return engine.at(x, r, c); }, d_at);
    for_grid<ROWS, COLS>([&](int r, int c) { engine.at(x, r, c) = engine.at(y, r, c); });
  }

  // sums += weights other[tile]. guarded: the tile holds nan or inf.
  template <class Sums>
  __device__ __forceinline__ void add(Sums& sums, const typename Engine::Products& weights,
                                      int tile, bool guarded) const {
    const auto handed = engine.hand_over(weights);
    if (guarded)
      engine.accumulate_guarded(sums, handed, tile);
    else
      engine.accumulate(sums, handed, tile);
  }

  // The tile at `at` of query head h, which is on its way. PLAIN: is_plain says so; answers false,
  // with nothing done, if one of its rows attends to nothing all the same.
  template <bool PLAIN>
  __device__ __forceinline__ bool step(const Score& score, int h, int at) {
    simt::cp_async_wait<0>();
    a.template settle<PLAIN>(smem.other[2 * stage]);
    b.template settle<PLAIN>(smem.other[2 * stage + 1]);
    if (KEYS && threadIdx.x < STEP) smem.stats[stage][threadIdx.x] = stat;
    // The tile has landed for every thread, and no warp still reads the last one in the other
    // stage, which is overwritten now.
    if (KEYS && PLAIN) {
      if (simt::sync_or(stat.base == -INFINITY)) return false;
    } else {
      simt::sync();
    }
    const int a_tile = 2 * stage, b_tile = 2 * stage + 1;
    const bool guarded =
        !PLAIN && simt::sync_or((SUMS_A && holds_nonfinite<COPIERS, TEAMS>(smem.other[a_tile])) ||
                                (SUMS_B && holds_nonfinite<COPIERS, TEAMS>(smem.other[b_tile])));
    if (STAGES == 2) fetch_next<PLAIN>(score, stage ^ 1, h, at);

    // A linear policy's other tiles are few: not worth the registers that unrolling takes.
    constexpr int UNROLL = PLAIN ? Tile::UNROLL : Score::LINEAR ? 1 : 4;
    const int own = block.first, own_end = own + Tile::BLOCK, end = at + STEP;
    const Pair from = KEYS ? Pair{at, own} : Pair{own, at},
               to = KEYS ? Pair{end, own_end} : Pair{own_end, end};
    uint64_t seen = ~uint64_t(0);
    if constexpr (!PLAIN)
      seen = seen_pairs<ROWS, COLS, KEYS>(score, from, to,
                                          [&](int r, int c) { return place(r, c, at); });
    typename Engine::Products x = {}, d = {};
    engine.template multiply<0, UNROLL>(x, a_tile);
    if constexpr (SUMS_A) engine.template multiply<1, UNROLL>(d, b_tile);
    engine.gather(x, d);
    if constexpr (Score::LINEAR)
      differentiate<!PLAIN>(score, x, d, at, seen);
    else
      differentiate_logits(score, x, d, h, at, from, to, seen);
    engine.template publish<SUMS_B>(d, x);
    if constexpr (SUMS_B) add(sums_b, x, b_tile, guarded);
    if constexpr (SUMS_A) add(sums_a, d, a_tile, guarded);

    if (STAGES == 1) {
      simt::sync();  // no warp still reads the tile, which is overwritten now
      fetch_next<PLAIN>(score, stage, h, at);
    } else {
      stage ^= 1;
    }
    return true;
  }

  // Every tile of query head h. may_be_plain: some of them.
  __device__ __forceinline__ void walk(const Score& score, int h, bool may_be_plain) {
    if constexpr (Score::SPARSE) fetch_from(score, stage, steps.first, steps.first);
    const auto after = [&](int at) { return tile_from(score, at + STEP); };
    Steps plain = {0, 0};
    if constexpr (TELLS_PLAIN && !Score::SPARSE)
      if (may_be_plain) plain = plain_steps(score);
    const auto plain_at = [&](int at) {
      if constexpr (Score::SPARSE)
        return may_be_plain && is_plain(score, at);
      else
        return plain.first <= at && at < plain.last;
    };
    for (int at = tile_from(score, steps.first); at < steps.last; at = after(at)) {
      if constexpr (TELLS_PLAIN)
        while (plain_at(at) && step<true>(score, h, at)) at = after(at);
      if (at < steps.last) step<false>(score, h, at);
    }
  }

  __device__ __forceinline__ void store_shares(const BwdBlock& out) const {
    if (!p.row_shares) return;
    float* const to =
        static_cast<float*>(p.row_shares) + head_offset(p.fwd, out.seq, out.b, out.h0);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float share = engine.sum_row(shares[r]);
      const int i = out.first + engine.row(r);
      if (engine.leads_row() && i < out.seq.sq) to[i] = share;
    }
  }

  // Whether one of the block's queries attends to nothing.
  __device__ __forceinline__ bool holds_void_row() const {
    bool found = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      found |= rows[r].base == -INFINITY && block.first + engine.row(r) < block.seq.sq;
    return simt::sync_or(found);
  }
};

}  // namespace atx::ATX_TARGET
