// Lists of keys (params.h) as kernels read them: the list of a query, the readers of a key.
#pragma once
#include "params.h"
#include "target.h"

namespace atx::ATX_TARGET {

ATX_HD const int32_t* list_of(const KeyLists& lists, int b, int h, int i) {
  return lists.keys + b * lists.batch + h / lists.sharing * lists.head + i * lists.row;
}

// Whether an entry of a list names one of sk keys. On a GPU nobody has looked before.
ATX_HD bool is_key(int entry, int sk) { return unsigned(entry) < unsigned(sk); }

// The queries of one head that list a key.
struct Readers {
  const int32_t* query;
  int64_t count;
};

ATX_HD Readers readers_of(const TopkAttentionBwdParams& p, int b, int h, int j) {
  const AttentionParams& f = p.bwd.fwd;
  const int64_t plane = b * p.readers.planes + h / p.lists.sharing;
  const int64_t* const first = p.readers.first + plane * (int64_t(f.Sk) + 1) + j;
  const int64_t entries = int64_t(f.Sq) * p.lists.length;
  return {p.readers.query + plane * entries + first[0], first[1] - first[0]};
}

}  // namespace atx::ATX_TARGET
