// What a warp holds at each step of the forward, printed by the emulator: look_into_a_warp.py.
//
// One tile of 16 rows, copied, swizzled and loaded with the verbs of attention_fwd. Its elements
// carry their own place: 16 · row + column, which bf16 holds exactly for the first 16 columns.
#include <cstdio>
#include <exception>
#include <string>

#include "csrc/cuda/tile.cuh"

namespace atx::ATX_TARGET {

struct Shown {
  const bf16* rows;  // [SIDE, D]
};

namespace {

constexpr int SIDE = 16, D = 64, THREADS = 128, WORD_BYTES = 4, BANKS = 32;
using Tile = SmemTile<bf16, SIDE, D>;

__device__ void show_swizzle() {
  printf("the first bank of chunk c of row r, D %d\n         c = 0  1  2  3  4  5  6  7\n", D);
  for (int row = 0; row < SIDE / 2; ++row) {
    printf("  row %d:   ", row);
    for (int c = 0; c < Tile::CHUNKS; ++c)
      printf(" %2d", Tile::offset(row, c) / WORD_BYTES % BANKS);
    printf("\n");
  }
}

// The registers of a 16 x 16 fragment as (row, column) of the tile, two elements to a register.
__device__ void show_fragment(const char* operand, const uint32_t (&registers)[4], int lane) {
  printf("lane %2d, %s:", lane, operand);
  for (const uint32_t pair : registers) {
    for (int i = 0; i < 2; ++i) {
      const int place = int(to_float(bf16{uint16_t(pair >> 16 * i)}));
      printf(" (%2d,%2d)", place / SIDE, place % SIDE);
    }
    printf(" |");
  }
  printf("\n");
}

__device__ void show_logits(int lane) {
  printf("lane %2d, S = Q Kᵀ:", lane);
  for (int n = 0; n < 2; ++n)
    for (int e = 0; e < 4; ++e) {
      const simt::Place at = simt::c_place(lane, e);
      printf(" (%2d,%2d)%s", at.row, n * 8 + at.col, e % 2 ? " |" : "");
    }
  printf("\n\n");
}

__global__ void look_into_a_warp(const __grid_constant__ Shown p) {
  Tile& tile = simt::shared<Tile>();
  const int lane = int(threadIdx.x % 32);
  const GlobalMatrix<const bf16> from(p.rows, Strides{0, 0, D}, 0, 0, 0, SIDE, D);
  TileStream<Tile, THREADS>(from, 0).load(tile, 0);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  simt::sync();  // the tile has landed for every thread
  if (threadIdx.x >= 32) return;
  if (lane == 0) show_swizzle();

  uint32_t a[4], b[4], v[4];
  simt::ldmatrix_x4(a, FragmentAddress<Tile>(tile, 0, lane).at(0, 0));
  simt::ldmatrix_x4(b, FragmentAddress<Tile, Order::ACROSS>(tile, 0, lane).at(0, 0));
  simt::ldmatrix_x4_trans(v, FragmentAddress<Tile>(tile, 0, lane).at(0, 0));
  for (int shown = 0; shown < 4; ++shown) {
    simt::sync_warp();  // one lane after the other
    if (lane != shown * 5) continue;
    show_fragment("A, rows of Q ", a, lane);
    show_fragment("B, rows of K ", b, lane);
    show_fragment("B, rows of V ", v, lane);
    show_logits(lane);
  }
}

}  // namespace
}  // namespace atx::ATX_TARGET

// Returns null, or what the emulator found wrong.
extern "C" const char* look(const atx::ATX_TARGET::Shown* shown) {
  using namespace atx::ATX_TARGET;
  static std::string found;
  try {
    return simt::launch(look_into_a_warp, 1, THREADS, sizeof(Tile), nullptr, *shown);
  } catch (const std::exception& error) {
    found = error.what();
    return found.c_str();
  }
}
