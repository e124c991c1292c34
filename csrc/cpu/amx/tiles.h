// The tile registers of AMX: eight, each 16 rows of 64 bytes, one kilobyte of memory here. Both
// products of attention are sums over pairs of 16-bit numbers,
//   C [16, 16] f32  +=  A [16, 16 pairs] · B [16 pairs, 16]
// computed in blocks of 2 x 2 tiles: four accumulators, so that each waits for its own last product
// and not for its neighbors', and four loads for four products.
#pragma once
#include <immintrin.h>

#include "csrc/core/numeric.h"
#include "csrc/core/target.h"

namespace atx::ATX_TARGET {

constexpr int TILE_ROWS = 16, TILE_PAIRS = 16, TILE_BYTES = 1024;
constexpr int TILE_HALVES = TILE_BYTES / 2, TILE_FLOATS = TILE_BYTES / 4;  // 16- and 32-bit numbers
constexpr int TILE_DEPTH = 2 * TILE_PAIRS;  // what one product sums over

// A thread's tile registers and what it does on underflow, for as long as this lives. Weights that
// underflow are flushed to 0: each would cost some 200 cycles otherwise.
class TileRegisters {
 public:
  TileRegisters() : control_(_mm_getcsr()) {
    // Static: g++ 12 knows of the first eight bytes only that the instruction reads them.
    static constexpr struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    _mm_setcsr(control_ | _MM_FLUSH_ZERO_ON);
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() {
    _tile_release();
    _mm_setcsr(control_);
  }

 private:
  unsigned control_;
};

// Tiles 0 ... 3 += {tile 4, tile 5} · {tile 6, tile 7}.
template <class T>
void multiply_tiles();
template <>
ATX_HD void multiply_tiles<bf16>() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
// tdpfp16ps in bytes: g++ knows the instruction from 13 on, assemblers from binutils 2.40 on.
template <>
ATX_HD void multiply_tiles<f16>() {
  __asm__ volatile(
      ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4\n\t"  // tdpfp16ps %tmm6, %tmm4, %tmm0
      ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc\n\t"  // tdpfp16ps %tmm7, %tmm4, %tmm1
      ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5\n\t"  // tdpfp16ps %tmm6, %tmm5, %tmm2
      ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd"      // tdpfp16ps %tmm7, %tmm5, %tmm3
  );
}

// Two blocks of 16-bit tiles to be multiplied: what lies in tile [m], m in {0, 1}, at `data + m *
// next`, with rows `row_bytes` apart; the tiles of the next 32 of the depth follow `step` numbers
// behind.
template <class T>
struct Tiles {
  const T* data;
  int64_t next, step = TILE_HALVES, row_bytes = 64;
};

// c [2, 2] tiles, at c + m * c_row + n * c_col with rows C_BYTES apart: a[m] b[n], summed over
// `depth` tiles. SPLIT: each row of b is followed by one of what is to be added to it.
enum class Block { SET, ADD, ADD_SPLIT };
template <class T, Block BLOCK, int C_BYTES = 64>
ATX_HD void multiply_block(int depth, Tiles<T> a, Tiles<T> b, float* c, int64_t c_row,
                           int64_t c_col) {
  // The tile loads do not tell the compiler that they read memory.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  if constexpr (BLOCK == Block::SET) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, C_BYTES);
    _tile_loadd(1, c + c_col, C_BYTES);
    _tile_loadd(2, c + c_row, C_BYTES);
    _tile_loadd(3, c + c_row + c_col, C_BYTES);
  }
  for (int k = 0; k < depth; ++k, a.data += a.step, b.data += b.step) {
    _tile_loadd(4, a.data, a.row_bytes);
    _tile_loadd(6, b.data, b.row_bytes);
    _tile_loadd(7, b.data + b.next, b.row_bytes);
    _tile_loadd(5, a.data + a.next, a.row_bytes);
    multiply_tiles<T>();
    if constexpr (BLOCK == Block::ADD_SPLIT) {
      _tile_loadd(6, b.data + TILE_DEPTH, b.row_bytes);
      _tile_loadd(7, b.data + b.next + TILE_DEPTH, b.row_bytes);
      multiply_tiles<T>();
    }
  }
  _tile_stored(0, c, C_BYTES);
  _tile_stored(1, c + c_col, C_BYTES);
  _tile_stored(2, c + c_row, C_BYTES);
  _tile_stored(3, c + c_row + c_col, C_BYTES);
}

}  // namespace atx::ATX_TARGET
