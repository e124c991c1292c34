// d_mask = dY, summed over the dimensions along which the mask is broadcast. A block owns a tile of
// d_mask's cells and walks over all that is summed into it, batch entries, heads, queries and keys,
// in this order: no addition is atomic. Scores are computed once more, which takes no memory.
#pragma once
#include "csrc/cuda/attention_bwd.cuh"

namespace atx::ATX_TARGET {

// One dimension of the mask: a block owns one of `cells` tiles of it; where it is summed, all of
// it.
struct MaskDimension {
  int size, tile;
  bool summed;
  __device__ __host__ __forceinline__ MaskDimension(int size, int64_t stride, int tile)
      : size(size), tile(tile), summed(stride == 0) {}
  __device__ __host__ __forceinline__ int cells() const {
    return summed ? 1 : int((int64_t(size) + tile - 1) / tile);
  }
  __device__ __forceinline__ int begin(int cell) const { return summed ? 0 : cell * tile; }
  __device__ __forceinline__ int end(int cell) const {
    return summed || cell * tile + tile > size ? size : cell * tile + tile;
  }
};

struct MaskCells {
  MaskDimension batch, head, row, col;
  __device__ __host__ __forceinline__ MaskCells(const AttentionBwdParams& p, int block, int step)
      : batch(p.fwd.B, p.d_mask_batch, 1),
        head(p.fwd.Hq, p.d_mask_head, 1),
        row(p.fwd.Sq, p.d_mask_row, block),
        col(p.fwd.Sk, p.d_mask_col, step) {}
};

// The sums of a block's pairs.
template <class Engine, class Score>
struct MaskSum {
  using Tile = typename Engine::Tile;
  using T = typename Engine::T;
  static constexpr int THREADS = Tile::THREADS, ROWS = Engine::ROWS, COLS = Engine::COLS;

  const AttentionBwdParams& p;
  typename Engine::Smem& smem;
  const Engine engine;
  typename Engine::Products sums = {};

  __device__ __forceinline__ MaskSum(const AttentionBwdParams& p, typename Engine::Smem& smem)
      : p(p), smem(smem), engine(smem) {}

  template <class Stream, class To>
  __device__ __forceinline__ static void load(To& tile, const void* tensor, const Strides& stride,
                                              int b, int h, int rows, int cols, int first) {
    const GlobalMatrix<const T> from(tensor, stride, b, h, 0, rows, cols);
    Stream(from, first).load(tile, first);
  }

  // Adds the pairs of queries from i0 on and keys from j0 on.
  __device__ __forceinline__ void add(int b, int h, int i0, int j0) {
    const AttentionParams& f = p.fwd;
    const Sequence seq = sequence(f, b);
    const Score score(f, seq, b, h);
    const int i1 = i0 + Tile::BLOCK < seq.sq ? i0 + Tile::BLOCK : seq.sq;
    if (score.kv_begin(i0, i1) >= j0 + Tile::STEP || score.kv_end(i0, i1) <= j0) return;
    const int h_kv = h / (f.Hq / f.Hkv);
    simt::sync();  // no warp still reads the last tiles
    using Own = TileStream<typename Engine::OwnTile, THREADS>;
    using Stream =
        TileStream<typename Engine::OtherTile, Engine::COPIERS, THREADS / Engine::COPIERS>;
    using Walk = typename Stream::Walk;
    load<Own>(smem.own[0], f.q, f.q_stride, b, h, seq.sq, f.D, i0);
    load<Own>(smem.own[1], p.d_o, p.d_o_stride, b, h, seq.sq, f.Dv, i0);
    if (Walk::is_of_team(0)) load<Stream>(smem.other[0], f.k, f.k_stride, b, h_kv, seq.sk, f.D, j0);
    if (Walk::is_of_team(1))
      load<Stream>(smem.other[1], f.v, f.v_stride, b, h_kv, seq.sk, f.Dv, j0);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    simt::sync();  // the tiles have landed for every thread
    if constexpr (std::is_same_v<T, tf32>) {
      round_chunks<THREADS>(smem.own[0]);
      round_chunks<THREADS>(smem.own[1]);
      round_chunks<THREADS>(smem.other[0]);
      round_chunks<THREADS>(smem.other[1]);
      simt::sync();  // every warp reads what all threads have rounded
    }
    typename Engine::Products x = {}, d = {};
    engine.template multiply<0, 2>(x, 0);
    engine.template multiply<1, 2>(d, 1);
    engine.gather(x, d);
    const auto place = [&](int r, int c) { return Pair{i0 + engine.row(r), j0 + engine.col(c)}; };
    uint32_t kept = ~0u;
    if (f.dropout > 0)
      kept = kept_pairs<Calls<ROWS, COLS, false, Engine::NEIGHBORS ? 2 : 1>>(f, b, h, place);
    RowStat stats[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int at = i0 + engine.row(r);
      stats[r] = row_stat<Score>(p, head_offset(f, seq, b, h) + at, at < seq.sq);
    }
    grid_gradients<T, ROWS, COLS, Engine::NEIGHBORS>(
        f, score, seq.sq, Pair{i0, j0}, Pair{i0 + Tile::BLOCK, j0 + Tile::STEP}, ~uint64_t(0), kept,
        [&](int r, int c) -> float& { return engine.at(x, r, c); },
        [&](int r, int c) -> float& { return engine.at(d, r, c); }, place,
        [&](int r, int) { return stats[r]; });
    for_grid<ROWS, COLS>([&](int r, int c) { engine.at(sums, r, c) += engine.at(d, r, c); });
  }
};

__device__ __forceinline__ void store_cell(const AttentionBwdParams& p, int64_t at, float x) {
  switch (p.d_mask_dtype) {
    case DType::f64:
      static_cast<double*>(p.d_mask)[at] = x;
      break;
    case DType::f32:
      static_cast<float*>(p.d_mask)[at] = x;
      break;
    case DType::f16:
      static_cast<f16*>(p.d_mask)[at] = from_float<f16>(x);
      break;
    default:
      static_cast<bf16*>(p.d_mask)[at] = from_float<bf16>(x);
  }
}

template <class Engine, class Score>
__global__ void __launch_bounds__(Engine::Tile::THREADS, Engine::Tile::BLOCKS)
    attention_bwd_mask(const __grid_constant__ AttentionBwdParams p) {
  using Sum = MaskSum<Engine, Score>;
  constexpr int BLOCK = Engine::Tile::BLOCK, STEP = Engine::STEP, THREADS = Sum::THREADS;
  const MaskCells cells(p, BLOCK, STEP);
  int rest = int(blockIdx.x);
  const auto next = [&](const MaskDimension& dimension) {
    const int count = dimension.cells(), cell = rest % count;
    rest /= count;
    return cell;
  };
  const int col = next(cells.col), row = next(cells.row), head = next(cells.head), batch = rest;
  auto& smem = simt::shared<typename Engine::Smem>();

  Sum sum(p, smem);
  for (int b = cells.batch.begin(batch); b < cells.batch.end(batch); ++b)
    for (int h = cells.head.begin(head); h < cells.head.end(head); ++h)
      for (int i = cells.row.begin(row); i < cells.row.end(row); i += BLOCK)
        for (int j = cells.col.begin(col); j < cells.col.end(col); j += STEP) sum.add(b, h, i, j);

  auto& tile = *reinterpret_cast<float (*)[BLOCK][STEP]>(&smem);
  static_assert(sizeof(tile) <= sizeof(smem));
  simt::sync();  // no warp still reads the last tiles, which the sums overwrite
#pragma unroll
  for (int r = 0; r < Sum::ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < Sum::COLS; ++c)
      tile[sum.engine.row(r)][sum.engine.col(c)] = sum.engine.at(sum.sums, r, c);
  }
  simt::sync();  // sums are there for every thread
  const int thread = int(threadIdx.x);
  if (cells.row.summed && thread < STEP)
    for (int i = 1; i < BLOCK; ++i) tile[0][thread] += tile[i][thread];
  simt::sync();  // the first row's sums are there for every thread
  if (cells.col.summed && thread < BLOCK)
    for (int j = 1; j < STEP; ++j) tile[thread][0] += tile[thread][j];
  simt::sync();  // the first column's sums are there for every thread

  const int64_t origin = batch * p.d_mask_batch + head * p.d_mask_head;
  const int rows = cells.row.summed ? 1 : cells.row.end(row) - row * BLOCK;
  const int cols = cells.col.summed ? 1 : cells.col.end(col) - col * STEP;
  for (int at = thread; at < BLOCK * STEP; at += THREADS) {
    const int i = at / STEP, j = at % STEP;
    if (i < rows && j < cols)
      store_cell(
          p,
          origin + int64_t(row * BLOCK + i) * p.d_mask_row + int64_t(col * STEP + j) * p.d_mask_col,
          tile[i][j]);
  }
}

template <class Engine, class Score>
Status launch_bwd_mask(const AttentionBwdParams& p, const Exec& exec) {
  using Tile = typename Engine::Tile;
  const MaskCells cells(p, Tile::BLOCK, Tile::STEP);
  const int64_t grid =
      int64_t(cells.batch.cells()) * cells.head.cells() * cells.row.cells() * cells.col.cells();
  return simt::launch(attention_bwd_mask<Engine, Score>, grid, Tile::THREADS, Tile::SHARED_BYTES,
                      exec.stream, p);
}

template <class T>
Status launch_attention_bwd_mask(const AttentionBwdParams& p, const Exec& exec) {
  using Score = General<float>;
  return with_dim_of<MASK_GRADIENT_DIMS<T>>(
      p.fwd.D > p.fwd.Dv ? p.fwd.D : p.fwd.Dv, [&]<int D>(HeadDim<D>) {
        using Engine = typename BwdEngines<T, Score>::template Engine<D, D, Pass::MASK>;
        return launch_bwd_mask<Engine, Score>(p, exec);
      });
}

// Head dimensions beyond 256.
template <class T>
Status launch_attention_bwd_wide_mask(const AttentionBwdParams& p, const Exec& exec) {
  return launch_bwd_mask<BwdWideWarp<WideBwdTile<T, Pass::MASK>>, General<float>>(p, exec);
}

}  // namespace atx::ATX_TARGET
