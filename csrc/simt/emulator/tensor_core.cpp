// ldmatrix, mma.m16n8k16, and mma.m16n8k8 of tf32. A product is summed in double and rounded to
// float once: exact for these inputs up to that rounding, in one order whatever the schedule. (A
// GPU truncates a little when it aligns the addends.)
#include <cstring>

#include "collective.h"
#include "csrc/simt/fragment.h"
#include "shared_memory.h"

// A row of D is 8 doubles, one or two registers. Products of these formats are exact in double, so
// fma changes no bit.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define ATX_SIMT_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define ATX_SIMT_CLONES
#endif

namespace atx::ATX_TARGET::simt {
namespace {

struct LoadMatrices {
  uint32_t* r;
  const char* row;  // 8 elements of 16 bits: lane l gives row l % 8 of matrix l / 8
};

template <bool TRANSPOSED>
void run_load_matrices(void* const* arguments) {
  auto lane = [&](int l) { return static_cast<LoadMatrices*>(arguments[l]); };
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int l = 0; l < LANES; ++l) {
      const Place at = ldmatrix_place(l);
      char* const to = reinterpret_cast<char*>(&lane(l)->r[matrix]);
      for (int i = 0; i < 2; ++i) {
        const int row = TRANSPOSED ? at.col + i : at.row, col = TRANSPOSED ? at.row : at.col + i;
        memcpy(to + 2 * i, lane(matrix * 8 + row)->row + 2 * col, 2);
      }
    }
}
constexpr Collective LOAD{"ldmatrix_x4", run_load_matrices<false>};
constexpr Collective LOAD_TRANSPOSED{"ldmatrix_x4_trans", run_load_matrices<true>};

struct Multiply {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// An operand's elements: in registers of two, or of one.
template <class T>
struct Elements {
  static constexpr int K = 16;
  static constexpr auto A = a_place, B = b_place;
  static float get(const uint32_t* registers, int i) {
    return to_float(T{uint16_t(registers[i / 2] >> 16 * (i % 2))});
  }
};
template <>
struct Elements<tf32> {
  static constexpr int K = 8;
  static constexpr auto A = a_word_place, B = b_word_place;
  static float get(const uint32_t* registers, int i) {
    return bit_cast<float>(registers[i] & 0xffffe000u);
  }
};

typedef double Row __attribute__((vector_size(8 * sizeof(double))));

template <int K>
ATX_SIMT_CLONES void multiply_add(float (&d)[16][8], const float (&a)[16][K],
                                  const float (&b)[K][8]) {
  Row b_rows[K];
  for (int k = 0; k < K; ++k)
    for (int j = 0; j < 8; ++j) b_rows[k][j] = b[k][j];
  for (int i = 0; i < 16; ++i) {
    Row sum;
    for (int j = 0; j < 8; ++j) sum[j] = d[i][j];
    for (int k = 0; k < K; ++k) sum += double(a[i][k]) * b_rows[k];
    for (int j = 0; j < 8; ++j) d[i][j] = float(sum[j]);
  }
}

template <class T>
void run_multiply(void* const* arguments) {
  using Of = Elements<T>;
  constexpr int K = Of::K;
  float a[16][K], b[K][8], d[16][8];
  for (int l = 0; l < LANES; ++l) {
    const Multiply& lane = *static_cast<Multiply*>(arguments[l]);
#pragma GCC unroll 8
    for (int i = 0; i < K / 2; ++i) {
      const Place at = Of::A(l, i);
      a[at.row][at.col] = Of::get(lane.a, i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < K / 4; ++i) {
      const Place at = Of::B(l, i);
      b[at.row][at.col] = Of::get(lane.b, i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Place at = c_place(l, i);
      d[at.row][at.col] = lane.d[i];
    }
  }
  multiply_add(d, a, b);
  for (int l = 0; l < LANES; ++l) {
    float* const to = static_cast<Multiply*>(arguments[l])->d;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Place at = c_place(l, i);
      to[i] = d[at.row][at.col];
    }
  }
}
constexpr Collective MULTIPLY_BF16{"mma bf16", run_multiply<bf16>};
constexpr Collective MULTIPLY_F16{"mma f16", run_multiply<f16>};
constexpr Collective MULTIPLY_TF32{"mma tf32", run_multiply<tf32>};

}  // namespace

void load_matrices(uint32_t* r, uint32_t smem, bool transposed, Site site) {
  const Inside inside;
  const char* const row = shared_pointer(smem, 16, "ldmatrix_x4", site);
  if (analysis) analysis->access(row, 16, Analysis::READ, nullptr, &site);
  LoadMatrices argument{r, row};
  take_part(transposed ? LOAD_TRANSPOSED : LOAD, &argument, site);
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bf16, Site site) {
  const Inside inside;
  if (analysis) analysis->multiplies(site);
  Multiply argument{d, a, {b0, b1}};
  take_part(MULTIPLY_BF16, &argument, site);
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, f16, Site site) {
  const Inside inside;
  if (analysis) analysis->multiplies(site);
  Multiply argument{d, a, {b0, b1}};
  take_part(MULTIPLY_F16, &argument, site);
}

void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, tf32, Site site) {
  const Inside inside;
  if (analysis) analysis->multiplies(site);
  Multiply argument{d, a, {b0, b1}};
  take_part(MULTIPLY_TF32, &argument, site);
}

}  // namespace atx::ATX_TARGET::simt
