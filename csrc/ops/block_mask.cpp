// Reading and checking the tensors of a block mask.
#include <initializer_list>
#include <string>

#include "attention_request.h"

namespace atx::ops {
namespace {

// -1: not a size that kernels know.
int log2_of_block(int64_t size) {
  for (int n = 5; n <= 8; ++n)
    if (size == 1 << n) return n;
  return -1;
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> size) {
  if (t.scalar_type() != ScalarType::Int || !t.is_contiguous()) return false;
  if (t.dim() != int64_t(size.size())) return false;
  int64_t d = 0;
  for (const int64_t n : size)
    if (t.size(d++) != n) return false;
  return true;
}

// Whether every partial block has its own bits: then nothing is read beyond them.
bool counts_parts(const BlockMask& m, int64_t words, int64_t parts) {
  int64_t found = 0;
  for (int64_t n = 0; n < words; ++n) {
    if (m.first_part[n] != found) return false;
    found += __builtin_popcount(m.visited[n] & ~m.full[n]);
  }
  return found == parts;
}

}  // namespace

void read_block_mask(const Arguments& a, int64_t batch, AttentionParams* p, Reasons& reasons) {
  const BlockTensors& t = *a.blocks;
  BlockMask& m = p->blocks;
  m.log2_q = log2_of_block(t.block_q), m.log2_kv = log2_of_block(t.block_kv);
  if (!reasons.check(m.log2_q > 0 && m.log2_kv > 0, ErrorKind::value, [&] {
        return "expected a block_mask with blocks of 32, 64, 128 or 256 queries and keys; got " +
               std::to_string(t.block_q) + " and " + std::to_string(t.block_kv);
      }))
    return;
  const auto blocks = [](int64_t length, int64_t size) { return (length + size - 1) / size; };
  const int64_t nq = blocks(p->Sq, t.block_q), nk = blocks(p->Sk, t.block_kv);
  const bool planes = t.visited.dim() == 4;
  const int64_t b = planes ? t.visited.size(0) : 0, h = planes ? t.visited.size(1) : 0;
  const int64_t parts = t.bits.dim() > 0 ? t.bits.size(0) : 0;
  bool fits = (b == 1 || b == batch) && (h == 1 || h == p->Hq) &&
              has_shape(t.visited_t, {b, h, nk, blocks(nq, 32)}) &&
              has_shape(t.bits, {parts, t.block_q, t.block_kv / 32});
  for (const Tensor* words : {&t.visited, &t.full, &t.first_part})
    fits = fits && has_shape(*words, {b, h, nq, blocks(nk, 32)});
  if (!reasons.check(fits, ErrorKind::value, [&] {
        return "expected an int32 block_mask for [" + std::to_string(batch) + " or 1, " +
               std::to_string(p->Hq) + " or 1, " + std::to_string(p->Sq) + ", " +
               std::to_string(p->Sk) + "] (batch, query heads, lengths); its words are " +
               shape(t.visited);
      }))
    return;
  m.batch = b == 1 ? 0 : h, m.head = h == 1 ? 0 : 1;
  m.visited = static_cast<const uint32_t*>(t.visited.const_data_ptr());
  m.full = static_cast<const uint32_t*>(t.full.const_data_ptr());
  m.visited_t = static_cast<const uint32_t*>(t.visited_t.const_data_ptr());
  m.first_part = static_cast<const int32_t*>(t.first_part.const_data_ptr());
  m.bits = static_cast<const uint32_t*>(t.bits.const_data_ptr());
  reasons.check(a.scale > 0, ErrorKind::value, [&] {
    return "expected a positive scale with a block_mask; got " + std::to_string(a.scale);
  });
  // A GPU's words are not read back.
  if (t.visited.is_cpu() && t.full.is_cpu() && t.first_part.is_cpu())
    reasons.check(counts_parts(m, t.visited.numel(), parts), ErrorKind::value, [] {
      return std::string(
          "expected a block_mask whose partial blocks are numbered in order, each with its bits. "
          "Make it with attn_ext.BlockMask.");
    });
}

}  // namespace atx::ops
