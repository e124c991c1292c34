// Which lane of a warp holds which element of a matrix operand: the register layouts of mma.sync
// m16n8k16, D = A B + C. A is 16 x 16 (four registers of two 16-bit elements), B is 16 x 8 (two
// such registers), C and D are 16 x 8 (four floats). Of tf32, whose elements fill a register, it is
// m16n8k8: A is 16 x 8, B is 8 x 8. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16",
// "... mma.m16n8k8". The kernels' masks, the emulator's mma and the tests all read this one
// statement of it.
#pragma once
#include "csrc/core/target.h"

namespace atx::ATX_TARGET::simt {

struct Place {
  int row, col;
};

// Lanes form eight rows of four; a lane holds two neighboring columns, then the same eight rows
// further down.
ATX_HD constexpr Place c_place(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// Element i of 8, two to a register: the layout of C twice, side by side. So the probabilities that
// one product leaves in C registers are, packed in pairs, the A operand of the next.
ATX_HD constexpr Place a_place(int lane, int i) {
  const Place c = c_place(lane, i % 4);
  return {c.row, c.col + i / 4 * 8};
}

// Element i of 4, two to a register. Rows run along k, so a lane's pair is two neighboring elements
// of one column.
ATX_HD constexpr Place b_place(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}

// Register i of 4, of 2, where each is an element.
ATX_HD constexpr Place a_word_place(int lane, int i) {
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
ATX_HD constexpr Place b_word_place(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }

// ldmatrix of an 8 x 8 matrix of 16-bit elements: a lane receives the pair (row, col), (row, col +
// 1) of this place, or with .trans the pair (col, row), (col + 1, row). Lane l gives the address of
// row l % 8 of matrix l / 8. Of 8 x 4 words it is place (lane / 4, lane % 4): a register of A or B.
ATX_HD constexpr Place ldmatrix_place(int lane) { return {lane / 4, lane % 4 * 2}; }

}  // namespace atx::ATX_TARGET::simt
