// A tile of an attention mask in shared memory, of 8 or 16 bits an element: copied along with K,
// and read in the C layout of the logits. A lane's own loads would be of 8 rows at once, 16 bytes
// each.
#pragma once
#include "csrc/core/score.h"
#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

template <int ROWS, int COLS>
struct MaskTile {
  SmemTile<bf16, ROWS, COLS> halves;  // elements of 16 bits
  // Of 8 bits, in the same place: the first COLS bytes of rows of half a line or more.
  using Bytes = SmemTile<bf16, ROWS, 32>;
  __device__ __forceinline__ Bytes& bytes() {
    static_assert(sizeof(Bytes) <= sizeof(halves));
    return reinterpret_cast<Bytes&>(halves);
  }
};

// Whether a mask's rows are whole 16-byte chunks on 16-byte boundaries, as cp.async needs, from any
// column on that is a multiple of 16, and near enough to each other for 32 bits to tell. Asking
// again is cheaper than a register that remembers.
template <class Score>
__device__ __forceinline__ bool is_staged(const Score& score) {
  const Mask& mask = score.mask;
  const int size = size_of(mask.dtype);
  const uint32_t bytes =
      uint32_t(reinterpret_cast<uintptr_t>(mask.data)) | uint32_t(mask.row) * size;
  return mask.data && size <= 2 && mask.col == 1 && !score.forgets() && bytes % CHUNK_BYTES == 0 &&
         mask.row < 1 << 30;
}

// tile ← rows [first, first + ROWS) of the mask, or its last one for those beyond it, and COLS
// columns from j on, which exist; asynchronous, like TileStream's load.
template <int THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_mask_tile(MaskTile<ROWS, COLS>& tile, const Mask& mask,
                                               int first, int rows, int j) {
  const auto load = [&]<class To, int CHUNKS>(To& to, std::integral_constant<int, CHUNKS>,
                                              int size) {
    const char* const data = static_cast<const char*>(mask.data);
    const int pitch = int(mask.row) * size;
    const int thread = int(simt::opaque(threadIdx.x));  // as for_each
    const int start = j * size + thread % CHUNKS * CHUNK_BYTES;
    static_assert(THREADS % CHUNKS == 0);
#pragma unroll
    for (int step = 0; step < ROWS * CHUNKS; step += THREADS) {
      const int row = (step + thread) / CHUNKS;
      if (ROWS * CHUNKS % THREADS != 0 && row >= ROWS) break;
      const int i = first + row < rows ? first + row : rows - 1;
      simt::cp_async16(simt::smem_address(&to) + To::offset(row, thread % CHUNKS),
                       data + (int64_t(i) * pitch + start), CHUNK_BYTES);
    }
  };
  if (mask.dtype == DType::boolean)
    load(tile.bytes(), std::integral_constant<int, COLS / 16>{}, 1);
  else
    load(tile.halves, std::integral_constant<int, COLS / 8>{}, 2);
}

// A lane's pairs of a mask that is_staged: of 2 M rows from `row` on and COLS / 4 columns from
// `col` on.
template <int M, int COLS, class Tile>
struct StagedMask {
  Tile& tile;
  const bool there;
  const int row, col;

  // visit(r, c, two): pairs c and c + 1 of row r.
  template <bool BYTES, class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    // Unknown to the compiler: what follows is not moved out of the loop.
    const int lane = int(simt::opaque(threadIdx.x) % 32);
    if constexpr (BYTES) {
      const simt::Place at = simt::c_place(lane, 0);
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n) {
          const auto* const chunk = reinterpret_cast<const uint16_t*>(
              tile.bytes().chunk(row + r * 8 + at.row, col / 16 + n / 2));
          visit(r, 2 * n, chunk[n % 2 * 4 + at.col / 2]);
        }
      }
    } else {
      const FragmentAddress<decltype(tile.halves)> words(tile.halves, row, lane);
#pragma unroll
      for (int n = 0; n < COLS / 8; n += 2) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          uint32_t two[4];
          simt::ldmatrix_x4(two, words.at(m * 16, col + n * 8));
#pragma unroll
          for (int i = 0; i < 4; ++i) visit(2 * m + i % 2, 2 * (n + i / 2), two[i]);
        }
      }
    }
  }
};

}  // namespace atx::ATX_TARGET
