// The verbs of a tensor-core kernel: tiles in shared memory, copies between them and global memory,
// 16 x 16 fragments, and products of fragments with a tile. A block copies a tile together; a warp
// multiplies with it.
//
// A row of a tile is cut into 16-byte chunks, the unit of cp.async and of ldmatrix. ldmatrix reads
// one chunk column of eight rows at once, which in a plain layout is a single bank group; so chunk
// c of row r is kept at place c ^ key(r): eight rows then spread one column over all 32 banks, and
// one row's chunks still fill one line.
//
// An f32 number is multiplied as tf32, the word as a tensor core reads it. Its 16-byte rows of four
// are moved by the same instructions as rows of eight 16-bit numbers, but none transposes them:
// what "nn" takes instead is in multiply_nn.
#pragma once
#include <type_traits>

#include "csrc/core/numeric.h"
#include "csrc/core/params.h"
#include "csrc/core/sequence.h"
#include "csrc/simt/fragment.h"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

constexpr int CHUNK_BYTES = 16;

struct alignas(CHUNK_BYTES) Chunk {
  uint32_t word[4];
};
struct alignas(8) Float2 {
  float x[2];
};
struct alignas(16) Float4 {
  float x[4];
};
__device__ __forceinline__ Chunk& as_chunk(void* p) { return *static_cast<Chunk*>(p); }

// The sign bits of the elements in a 32-bit word.
template <class T>
constexpr uint32_t SIGNS = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;

// One product of the tensor core is over 32 bytes of each row: this many columns.
template <class T>
constexpr int K_STEP = 2 * CHUNK_BYTES / int(sizeof(T));
// So many accumulators share what multiply_nn loads.
template <class T>
constexpr int N_STEP = sizeof(T) == 2 ? 2 : 4;

// A number of a tile, as products take it.
template <class T>
__device__ __forceinline__ T operand(T x) {
  return x;
}
__device__ __forceinline__ tf32 operand(tf32 x) { return {simt::to_tf32(to_float(x))}; }

template <class T_, int ROWS_, int COLS_>
struct SmemTile {
  using T = T_;
  static constexpr int ROWS = ROWS_, COLS = COLS_;
  static constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));  // elements
  static constexpr int CHUNKS = COLS / CHUNK;                 // per row
  static constexpr int PITCH = COLS * int(sizeof(T));         // bytes
  // Eight chunks are a line of 32 banks. Rows of whole lines permute groups of 8 by r % 8. Rows
  // that end on half a line alternate between its halves, so groups of 4 permuted by r / 2 % 4 do.
  static constexpr int GROUP = CHUNKS % 8 == 0 ? 8 : 4;
  static_assert(CHUNKS % 4 == 0 && ROWS % 16 == 0);

  alignas(128) T data[ROWS * COLS];

  // Byte offset of a chunk. In a loop, unsigned: quotients of what may be negative take longer.
  template <class Int>
  __device__ __forceinline__ static int offset(Int row, Int chunk) {
    return int(row * PITCH + (chunk ^ (GROUP == 8 ? row % 8 : row / 2 % 4)) * CHUNK_BYTES);
  }
  __device__ __forceinline__ T* chunk(unsigned row, unsigned c) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(data) + offset(row, c));
  }
  __device__ __forceinline__ T& at(unsigned row, unsigned col) {
    return chunk(row, col / CHUNK)[col % CHUNK];
  }
};

// A matrix in global memory, of one (sequence, head): rows of cols elements.
template <class T>
struct GlobalMatrix {
  T* data;
  int64_t stride;  // elements from row to row
  int rows, cols;

  template <class Pointer>
  __device__ __forceinline__ GlobalMatrix(Pointer* tensor, const Strides& s, int b, int h,
                                          int64_t first_row, int rows, int cols)
      : data(static_cast<T*>(tensor) + row0(s, b, h, first_row)),
        stride(s.row),
        rows(rows),
        cols(cols) {}

  // Whether rows are whole 16-byte chunks on 16-byte boundaries, as cp.async and wide stores need.
  // The place of any chunk tells; asking again is cheaper than a register that remembers.
  __device__ __forceinline__ bool chunked(const T* chunk) const {
    const uint64_t bytes = reinterpret_cast<uintptr_t>(chunk) | uint64_t(stride) * sizeof(T) |
                           uint64_t(cols) * sizeof(T);
    return bytes % CHUNK_BYTES == 0;
  }
};

// How a block shares out a tile's chunks: GROUP neighboring threads take neighboring chunks of a
// row. A thread's further chunks lie whole swizzle periods away, so that their places differ from
// its first by constants. Larger blocks have TEAMS of THREADS, for a tile each.
template <class Tile, int THREADS, int TEAMS = 1>
struct ChunkWalk {
  static constexpr int LANES = Tile::GROUP, STEP = THREADS / LANES;  // STEP rows at a time
  static constexpr int ROW_STEPS = Tile::ROWS / STEP, CHUNK_STEPS = Tile::CHUNKS / LANES;
  static_assert(Tile::ROWS % STEP == 0 && STEP % 8 == 0);
  int row = int(thread() / LANES), chunk = int(thread() % LANES);

  __device__ __forceinline__ static unsigned thread() {
    return TEAMS == 1 ? threadIdx.x : threadIdx.x % THREADS;
  }
  // Whether this thread's team is the n-th; one team walks over all tiles.
  __device__ __forceinline__ static bool is_of_team(int n) {
    return TEAMS == 1 || int(threadIdx.x / THREADS) == n;
  }

  // visit(row, chunk) for each of this thread's chunks.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < ROW_STEPS; ++i) {
#pragma unroll
      for (int j = 0; j < CHUNK_STEPS; ++j) visit(row + i * STEP, chunk + j * LANES);
    }
  }
  // The same in turn, for what is loaded ahead takes registers from the products. From a start that
  // is unknown to the compiler: places that follow from it are not found ahead either.
  template <class Visit>
  __device__ __forceinline__ void for_each_in_turn(Visit visit) const {
#pragma unroll 1
    for (int i = simt::opaque(0); i < ROW_STEPS * CHUNK_STEPS; ++i)
      visit(row + i / CHUNK_STEPS * STEP, chunk + i % CHUNK_STEPS * LANES);
  }
};

// Rounds this thread's chunks of the tile.
template <int THREADS, class Tile>
__device__ __forceinline__ void round_chunks(Tile& tile) {
  ChunkWalk<Tile, THREADS>().for_each_in_turn([&](int row, int chunk) {
    Chunk& place = as_chunk(tile.chunk(row, chunk));
    Chunk words = place;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.word[i] = operand(tf32{words.word[i]}).bits;
    place = words;
  });
}

// Tiles of a matrix, from one that starts at first_row on, wherever it is moved. load(tile,
// first_row) sets the tile to the ROWS rows from first_row on, zeros beyond the matrix's edges,
// outside of which nothing is read. It is asynchronous: cp_async_commit, a wait, settle and a
// barrier make it visible, as products take it. WHOLE says that the matrix is chunked and that none
// of the rows is beyond its end; otherwise that is looked up, and a matrix that is not chunked is
// copied element by element.
template <class Tile, int THREADS, int TEAMS = 1>
struct TileStream {
  using T = typename Tile::T;
  using Walk = ChunkWalk<Tile, THREADS, TEAMS>;

  const GlobalMatrix<const T>& from;
  const Walk walk;
  const T* source;  // this thread's first chunk of the tile

  __device__ __forceinline__ TileStream(const GlobalMatrix<const T>& from, int first_row)
      : from(from),
        source(from.data + (first_row + walk.row) * from.stride + walk.chunk * Tile::CHUNK) {}

  __device__ __forceinline__ bool chunked() const { return from.chunked(source); }
  __device__ __forceinline__ void step_back(int rows) { source -= rows * from.stride; }
  __device__ __forceinline__ void move(int64_t elements) { source += elements; }

  template <bool WHOLE = false>
  __device__ __forceinline__ void load(Tile& tile, int first_row) const {
    if (!WHOLE && !chunked()) return load_elements(tile, first_row);
    const uint32_t target = simt::smem_address(&tile) + Tile::offset(walk.row, walk.chunk);
    const int rows_left = from.rows - walk.row - first_row;
#pragma unroll
    for (int i = 0; i < Walk::ROW_STEPS; ++i) {
#pragma unroll
      for (int j = 0; j < Walk::CHUNK_STEPS; ++j) {
        const int skipped = j * Walk::LANES;
        const bool inside = (WHOLE || i * Walk::STEP < rows_left) &&
                            (walk.chunk + skipped) * Tile::CHUNK < from.cols;
        simt::cp_async16(target + i * Walk::STEP * Tile::PITCH + skipped * CHUNK_BYTES,
                         source + i * Walk::STEP * from.stride + skipped * Tile::CHUNK,
                         inside ? CHUNK_BYTES : 0);
      }
    }
  }

  // After the wait, before the barrier: rounds what this thread has copied, where that is due.
  template <bool WHOLE = false>
  __device__ __forceinline__ void settle(Tile& tile) const {
    if constexpr (std::is_same_v<T, tf32>)
      if (WHOLE || chunked()) round_chunks<THREADS>(tile);  // otherwise load_elements has done so
  }

  __device__ __forceinline__ void load_elements(Tile& tile, int first_row) const {
    const T* first = source - walk.row * from.stride - walk.chunk * Tile::CHUNK;
#pragma unroll 1
    for (int at = int(Walk::thread()); at < Tile::ROWS * Tile::COLS; at += THREADS) {
      const int r = at / Tile::COLS, c = at % Tile::COLS;
      const bool inside = first_row + r < from.rows && c < from.cols;
      tile.at(r, c) = inside ? operand(first[r * from.stride + c]) : T{};
    }
  }
};

template <int THREADS, class Tile>
__device__ __forceinline__ void negate(Tile& tile) {
  ChunkWalk<Tile, THREADS>().for_each([&](int row, int chunk) {
    Chunk& words = as_chunk(tile.chunk(row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) words.word[i] ^= SIGNS<typename Tile::T>;
  });
}

// Rows of the matrix from first_row on ← ROWS rows of the tile from tile_row on, by THREADS
// neighboring threads.
template <int ROWS, int THREADS, class Tile, class T>
__device__ __forceinline__ void store_rows(const GlobalMatrix<T>& to, int first_row, Tile& tile,
                                           int tile_row) {
  const unsigned thread = threadIdx.x % THREADS;
  if (to.chunked(to.data)) {
#pragma unroll
    for (int step = 0; step < ROWS * Tile::CHUNKS; step += THREADS) {
      const int r = int((step + thread) / Tile::CHUNKS), c = int((step + thread) % Tile::CHUNKS);
      if (first_row + r < to.rows && c * Tile::CHUNK < to.cols)
        as_chunk(to.data + (first_row + r) * to.stride + c * Tile::CHUNK) =
            as_chunk(tile.chunk(tile_row + r, c));
    }
  } else {
#pragma unroll 1
    for (int at = int(thread); at < ROWS * Tile::COLS; at += THREADS) {
      const int r = at / Tile::COLS, c = at % Tile::COLS;
      if (first_row + r < to.rows && c < to.cols)
        to.data[(first_row + r) * to.stride + c] = tile.at(tile_row + r, c);
    }
  }
}

// One lane's ldmatrix addresses in a tile. A fragment of 16 rows of 32 bytes arrives as four
// matrices of 8 rows of 16 bytes, two of its upper eight rows and two of its lower. They come in
// the order in which mma takes them, for a pair of registers must be neighbors:
// - DOWN, for A and for B of "nn": upper left, lower left, upper right, lower right
// - ACROSS, for B of "nt": upper left, upper right, lower left, lower right
// - PAIRS, for B of "nn" in tf32, which is no ldmatrix: multiply_nn
enum class Order { DOWN, ACROSS, PAIRS };

template <class Tile, Order ORDER = Order::DOWN>
struct FragmentAddress {
  static constexpr int PERIOD = Tile::GROUP * CHUNK_BYTES;
  uint32_t first;  // of the fragment at (0, 0); tiles are aligned to PERIOD, so stepping a column
                   // is an XOR

  __device__ __forceinline__ FragmentAddress(const Tile& tile, int first_row, int lane) {
    const int minor = lane / 8 % 2, major = lane / 16;
    const int down = ORDER == Order::DOWN ? minor : major,
              across = ORDER == Order::DOWN ? major : minor;
    first = simt::smem_address(&tile) +
            (ORDER == Order::PAIRS ? Tile::offset(first_row + lane % 4 * 2, lane / 4)
                                   : Tile::offset(first_row + lane % 8 + down * 8, across));
  }
  // The same, unknown to the compiler: addresses that follow from it are not moved out of a loop,
  // where they would occupy a dozen registers.
  __device__ __forceinline__ FragmentAddress here() const { return here(0); }
  // The same in the tile that lies `tiles` tiles further.
  __device__ __forceinline__ FragmentAddress here(int tiles) const {
    FragmentAddress there = *this;
    there.first = simt::opaque(first + tiles * int(sizeof(Tile)));
    return there;
  }
  // The same from a column on, a whole number of swizzle periods.
  __device__ __forceinline__ FragmentAddress beyond(int cols) const {
    FragmentAddress there = *this;
    there.first = first + cols * int(sizeof(typename Tile::T));
    return there;
  }
  // row, col: multiples of a fragment's, constants after unrolling.
  __device__ __forceinline__ uint32_t at(int row, int col) const {
    const int bytes = col * int(sizeof(typename Tile::T));
    return (first ^ (bytes % PERIOD)) + bytes / PERIOD * PERIOD + row * Tile::PITCH;
  }
  // One row further down, from an even one: of the keys of two such rows, the last bit differs.
  __device__ __forceinline__ uint32_t below(int row, int col) const {
    return (at(row, col) ^ CHUNK_BYTES) + Tile::PITCH;
  }
};

// Addresses of B of "nn".
template <class Tile>
using DownAddress =
    FragmentAddress<Tile, sizeof(typename Tile::T) == 2 ? Order::DOWN : Order::PAIRS>;

// c[m] += a[m] bᵀ over K_STEP columns of the tile b [8 N, K]: both operands lie along k ("nt").
template <int M, int N, class Tile>
__device__ __forceinline__ void multiply_nt(float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                            const FragmentAddress<Tile, Order::ACROSS>& b,
                                            int col) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t r[4];
    simt::ldmatrix_x4(r, b.at(n * 8, col));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      simt::mma(c[m][n], a[m], r[0], r[1], typename Tile::T{});
      simt::mma(c[m][n + 1], a[m], r[2], r[3], typename Tile::T{});
    }
  }
}

// c[m] += a[m] b over K_STEP rows of the tile b [K, 8 N], from column col: b lies across k and is
// transposed on the way into registers ("nn").
template <int M, int N, class Tile>
__device__ __forceinline__ void multiply_nn(float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                            const FragmentAddress<Tile>& b, int row, int col = 0) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t r[4];
    simt::ldmatrix_x4_trans(r, b.at(row, col + n * 8));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      simt::mma(c[m][n], a[m], r[0], r[1], typename Tile::T{});
      simt::mma(c[m][n + 1], a[m], r[2], r[3], typename Tile::T{});
    }
  }
}

// The same in tf32. A sum over k is one in any order, and so are the columns of c, where they are
// written last: both are chosen so that lanes hold what they need, without shuffles, and what they
// load is 16 bytes, of all banks at once.
// - k: the even rows of b, then the odd ones, so that two neighboring elements of C's layout are
//   what one lane holds of A (to_operand). Lane l reads rows 2 (l % 4) and the next, ...
// - columns: ... of each the chunk l / 4 of eight, a column for each of four accumulators. Column
//   j of accumulator n is column n / 4 · 32 + 4 j + n % 4 (store_sums).
template <int M, int N, class Tile>
__device__ __forceinline__ void multiply_nn(float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                            const FragmentAddress<Tile, Order::PAIRS>& b, int row,
                                            int col = 0) {
  static_assert(Tile::GROUP == 8 && N % 4 == 0);
#pragma unroll
  for (int n = 0; n < N; n += 4) {
    uint32_t even[4], odd[4];
    simt::load_words(even, b.at(row, col + n * 8));
    simt::load_words(odd, b.below(row, col + n * 8));
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) simt::mma(c[m][n + i], a[m], even[i], odd[i], typename Tile::T{});
    }
  }
}

// A operand k of multiply_nn ← the elements of c, rounded: its columns from K_STEP k on.
template <class T, int N>
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const float (&c)[N][4], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const float* pair = &c[2 * k + i / 2][i % 2 * 2];
      a[i] = simt::pack2<T>(pair[0], pair[1]);
    } else {
      a[i] = simt::to_tf32(c[k][i % 2 * 2 + i / 2]);
    }
  }
}

// A row of the tile, as far as this lane holds it ← factor · what multiply_nn has summed up: half r
// of c.
template <int N, class Tile>
__device__ __forceinline__ void store_sums(Tile& tile, int row, const float (&c)[N][4], int r,
                                           float factor) {
  using T = typename Tile::T;
  const int lane = int(threadIdx.x % 32);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      reinterpret_cast<uint32_t&>(tile.at(row, n * 8 + simt::c_place(lane, 0).col)) =
          simt::pack2<T>(c[n][2 * r] * factor, c[n][2 * r + 1] * factor);
  } else {
#pragma unroll
    for (int n = 0; n < N; n += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Float4 columns;
#pragma unroll
        for (int i = 0; i < 4; ++i) columns.x[i] = c[n + i][2 * r + e] * factor;
        reinterpret_cast<Float4&>(*tile.chunk(row, n * 2 + simt::c_place(lane, e).col)) = columns;
      }
    }
  }
}

}  // namespace atx::ATX_TARGET
