// The score policy of a block mask (params.h, BlockMask): besides score.h's hooks, where the next
// visited key or query is, so that kernels skip what nobody sees.
// CPU, one thread, B1 H8 S4096 D64, blocks of 128 at random, forward: time per visited block over
// dense attention's with 2, 5, 10, 25 and 50 % of the blocks
//   f32   AVX2 1.41 1.21 1.11 1.04 1.02   AVX-512 1.72 1.34 1.21 1.06 1.03
//   bf16  AVX2 1.35 1.18 1.10 1.06 1.04   AMX     2.93 1.85 1.43 1.12 1.01
// and at S 8192 (H4) on AVX2 with 2, 5 and 10 %: f32 1.26 1.11 1.06, bf16 1.25 1.11 1.04.
// At 2 % on AMX, laying out q, k and v and ending the rows take as long as the products and the
// softmax: the less there is to multiply, the less often is used what was brought in.
// With the backward, H2, D 64 and 128, share of dense attention's time with 51, 25, 9 and 1.5 %:
// f32 (AVX-512) 0.53 to 0.56, 0.28 to 0.29, 0.11 to 0.12, 0.03 to 0.04; bf16 (AMX) 0.55 to 0.59,
// 0.32 to 0.35, 0.16 to 0.17, 0.08 to 0.09.
#pragma once
#include "bits.h"
#include "score.h"

namespace atx::ATX_TARGET {

// Rows of a bitmap whose bit b stands for positions [b << log2, (b + 1) << log2).
struct Bitmap {
  const uint32_t* rows;  // the first of those asked for
  int count, words;      // how many; words of a row
  int log2;

  ATX_HD uint32_t any(int word) const {
    uint32_t found = 0;
    for (int r = 0; r < count; ++r) found |= rows[int64_t(r) * words + word];
    return found;
  }
  // The first position of a set bit in [x, end), or end.
  ATX_HD int first(int x, int end) const {
    if (x >= end) return end;
    const int bit = x >> log2;
    uint32_t among = ~0u << bit % 32;
    for (int w = bit / 32; w < words; ++w, among = ~0u)
      if (const uint32_t found = any(w) & among) {
        const int at = (w * 32 + lowest_bit(found)) << log2;
        return at > x ? at : x;
      }
    return end;
  }
  // One past the last position of a set bit in [0, x), or 0.
  ATX_HD int last(int x) const {
    if (x <= 0) return 0;
    const int bit = (x - 1) >> log2;
    uint32_t among = ~0u >> (31 - bit % 32);
    for (int w = bit / 32; w >= 0; --w, among = ~0u)
      if (const uint32_t found = any(w) & among) {
        const int end = (w * 32 + highest_bit(found) + 1) << log2;
        return end < x ? end : x;
      }
    return 0;
  }
};

template <class A>
struct Blocks : Linear<A> {
  static constexpr bool SPARSE = true;
  const AttentionParams* p;  // not copied: on a GPU it costs no registers
  int plane;

  ATX_HD Blocks(const AttentionParams& p, const Sequence& s, int b, int h)
      : Linear<A>(p, s), p(&p), plane(int(b * p.blocks.batch + h * p.blocks.head)) {}

  ATX_HD int next_key(int i0, int i1, int j) const { return key_blocks(i0, i1).first(j, p->Sk); }
  ATX_HD int end_before(int i0, int i1, int j) const {
    return key_blocks(i0, i1).last(j < p->Sk ? j : p->Sk);
  }
  ATX_HD int next_query(int j0, int j1, int i) const {
    const int first = j0 >> p->blocks.log2_kv,
              last = (j1 < p->Sk ? j1 - 1 : p->Sk - 1) >> p->blocks.log2_kv;
    const int words = words_of(p->Sq, p->blocks.log2_q);
    const int64_t row = int64_t(plane) * blocks_of(p->Sk, p->blocks.log2_kv) + first;
    return Bitmap{p->blocks.visited_t + row * words, last - first + 1, words, p->blocks.log2_q}
        .first(i, p->Sq);
  }
  // One past the last key of the block that holds key j.
  ATX_HD int block_end(int j) const {
    const int end = ((j >> p->blocks.log2_kv) + 1) << p->blocks.log2_kv;
    return end < p->Sk ? end : p->Sk;
  }
  ATX_HD int kv_begin(int i0, int i1) const { return next_key(i0, i1, 0); }
  ATX_HD int kv_end(int i0, int i1) const { return end_before(i0, i1, p->Sk); }

  ATX_HD bool full(int i0, int i1, int j0, int j1) const {
    if (j1 > p->Sk) return false;
    const int last_q = ((i1 < p->Sq ? i1 : p->Sq) - 1) >> p->blocks.log2_q;
    for (int ib = i0 >> p->blocks.log2_q; ib <= last_q; ++ib)
      for (int jb = j0 >> p->blocks.log2_kv; jb <= (j1 - 1) >> p->blocks.log2_kv; ++jb)
        if (!(p->blocks.full[word_at(ib, jb)] >> jb % 32 & 1)) return false;
    return true;
  }
  // Kernels may ask for queries and keys that do not exist: what they hear does not matter, but
  // nothing is read there.
  template <class L>
  ATX_HD typename L::Bool keep(int i, int j, int) const {
    if (i >= p->Sq) i = p->Sq - 1;
    const int j0 = j & ~31;
    uint32_t bits = j < p->Sk ? kept(i, j0) >> j % 32 : 0;
    if (j % 32 + L::COUNT > 32 && j0 + 32 < p->Sk) bits |= kept(i, j0 + 32) << (32 - j % 32);
    return L::bits(bits) & L::less(L::positions(j), p->Sk);
  }
  // Bit n: whether query i attends to key j + n, which is no further than the last; j is a multiple
  // of 32. The same of what does not exist.
  ATX_HD uint32_t kept_of_32(int i, int j) const {
    if (j >= p->Sk) return 0;
    const uint32_t existing = p->Sk - j < 32 ? (1u << (p->Sk - j)) - 1 : ~0u;
    return kept(i < p->Sq ? i : p->Sq - 1, j) & existing;
  }

 private:
  ATX_HD static int blocks_of(int length, int log2) { return (length + (1 << log2) - 1) >> log2; }
  ATX_HD static int words_of(int length, int log2) { return (blocks_of(length, log2) + 31) / 32; }

  ATX_HD Bitmap key_blocks(int i0, int i1) const {
    const int first = i0 >> p->blocks.log2_q,
              last = ((i1 < p->Sq ? i1 : p->Sq) - 1) >> p->blocks.log2_q;
    const int words = words_of(p->Sk, p->blocks.log2_kv);
    const int64_t row = int64_t(plane) * blocks_of(p->Sq, p->blocks.log2_q) + first;
    return {p->blocks.visited + row * words, last - first + 1, words, p->blocks.log2_kv};
  }
  ATX_HD int64_t word_at(int ib, int jb) const {
    return (int64_t(plane) * blocks_of(p->Sq, p->blocks.log2_q) + ib) *
               words_of(p->Sk, p->blocks.log2_kv) +
           jb / 32;
  }
  // Of keys j ... j + 31, which query i attends to; j is a multiple of 32.
  ATX_HD uint32_t kept(int i, int j) const {
    const int ib = i >> p->blocks.log2_q, jb = j >> p->blocks.log2_kv;
    const int64_t at = word_at(ib, jb);
    const uint32_t bit = 1u << jb % 32, visited = p->blocks.visited[at], full = p->blocks.full[at];
    if (!(visited & bit)) return 0;
    if (full & bit) return ~0u;
    const int64_t part = p->blocks.first_part[at] + count_bits(visited & ~full & (bit - 1));
    const int row = i & ((1 << p->blocks.log2_q) - 1), col = j & ((1 << p->blocks.log2_kv) - 1);
    return p->blocks
        .bits[(((part << p->blocks.log2_q) + row) << (p->blocks.log2_kv - 5)) + (col >> 5)];
  }
};

// A GPU's under a soft-cap or dropout, for which the kernels of linear policies have no registers.
// A CPU's kernels drop under any policy, and cap the products (cpu/capped_products.h).
template <class A>
struct GeneralBlocks : Blocks<A> {
  static constexpr bool LINEAR = false;

  using Blocks<A>::Blocks;
  ATX_HD A cap() const { return A(this->p->softcap); }
};

}  // namespace atx::ATX_TARGET
