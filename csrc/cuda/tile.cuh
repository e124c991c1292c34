// The verbs of a tensor-core kernel: tiles in shared memory, copies between them and global memory,
// 16 x 16 fragments, and products of fragments with a tile. A block copies a tile together; a warp
// multiplies with it.
//
// A row of a tile is cut into 16-byte chunks, the unit of cp.async and of ldmatrix. ldmatrix reads
// one chunk column of eight rows at once, which in a plain layout is a single bank group; so chunk
// c of row r is kept at place c ^ key(r): eight rows then spread one column over all 32 banks, and
// one row's chunks still fill one line.
#pragma once
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

// Of the elements in a 32-bit word: their sign bits, their exponent bits (all ones: inf or nan).
template <class T>
constexpr uint32_t SIGNS = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
template <class T>
constexpr uint32_t EXPONENTS = 0x7f800000u;
template <>
constexpr uint32_t EXPONENTS<bf16> = 0x7f807f80u;
template <>
constexpr uint32_t EXPONENTS<f16> = 0x7c007c00u;

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

  __device__ __forceinline__ static int key(int row) { return GROUP == 8 ? row % 8 : row / 2 % 4; }
  // Byte offset of a chunk.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return row * PITCH + (chunk ^ key(row)) * CHUNK_BYTES;
  }
  __device__ __forceinline__ T* chunk(int row, int c) {
    return data + offset(row, c) / int(sizeof(T));
  }
  __device__ __forceinline__ T& at(int row, int col) {
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
// its first by constants.
template <class Tile, int THREADS>
struct ChunkWalk {
  static constexpr int LANES = Tile::GROUP, STEP = THREADS / LANES;  // STEP rows at a time
  static constexpr int ROW_STEPS = Tile::ROWS / STEP, CHUNK_STEPS = Tile::CHUNKS / LANES;
  static_assert(Tile::ROWS % STEP == 0 && STEP % 8 == 0);
  int row = int(threadIdx.x / LANES), chunk = int(threadIdx.x % LANES);

  // visit(row, chunk) for each of this thread's chunks.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < ROW_STEPS; ++i) {
#pragma unroll
      for (int j = 0; j < CHUNK_STEPS; ++j) visit(row + i * STEP, chunk + j * LANES);
    }
  }
};

// Tiles of a matrix, from one that starts at first_row on, wherever it is moved. load(tile,
// first_row) sets the tile to the ROWS rows from first_row on, zeros beyond the matrix's edges,
// outside of which nothing is read. It is asynchronous: cp_async_commit, a wait and a barrier make
// it visible. WHOLE says that the matrix is chunked and that none of the rows is beyond its end;
// otherwise that is looked up, and a matrix that is not chunked is copied element by element.
template <class Tile, int THREADS>
struct TileStream {
  using T = typename Tile::T;
  using Walk = ChunkWalk<Tile, THREADS>;

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

  __device__ __forceinline__ void load_elements(Tile& tile, int first_row) const {
    const T* first = source - walk.row * from.stride - walk.chunk * Tile::CHUNK;
#pragma unroll 1
    for (int at = int(threadIdx.x); at < Tile::ROWS * Tile::COLS; at += THREADS) {
      const int r = at / Tile::COLS, c = at % Tile::COLS;
      const bool inside = first_row + r < from.rows && c < from.cols;
      tile.at(r, c) = inside ? first[r * from.stride + c] : T{};
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

// One lane's ldmatrix addresses in a tile. A 16 x 16 fragment arrives as four 8 x 8 matrices, two
// of its upper eight rows and two of its lower. They come in the order in which mma takes them, for
// a pair of registers must be neighbors:
// - DOWN, for A and for B of "nn": upper left, lower left, upper right, lower right
// - ACROSS, for B of "nt": upper left, upper right, lower left, lower right
enum class Order { DOWN, ACROSS };

template <class Tile, Order ORDER = Order::DOWN>
struct FragmentAddress {
  static_assert(sizeof(typename Tile::T) == 2);
  static constexpr int PERIOD = Tile::GROUP * CHUNK_BYTES;
  uint32_t first;  // of the fragment at (0, 0); tiles are aligned to PERIOD, so stepping a column
                   // is an XOR

  __device__ __forceinline__ FragmentAddress(const Tile& tile, int first_row, int lane) {
    const int minor = lane / 8 % 2, major = lane / 16;
    const int down = ORDER == Order::DOWN ? minor : major,
              across = ORDER == Order::DOWN ? major : minor;
    first = simt::smem_address(&tile) + Tile::offset(first_row + lane % 8 + down * 8, across);
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
    there.first = first + cols * 2;
    return there;
  }
  // row, col: multiples of 16, constants after unrolling.
  __device__ __forceinline__ uint32_t at(int row, int col) const {
    const int bytes = col * 2;
    return (first ^ (bytes % PERIOD)) + bytes / PERIOD * PERIOD + row * Tile::PITCH;
  }
};

// c[m] += a[m] bᵀ over 16 columns of the tile b [8 N, K]: both operands lie along k ("nt").
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

// c[m] += a[m] b over 16 rows of the tile b [K, 8 N], from column col: b lies across k and is
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

}  // namespace atx::ATX_TARGET
