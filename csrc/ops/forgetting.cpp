// Reading and checking the running sums of attention that forgets.
#include <string>

#include "attention_request.h"

namespace atx::ops {

void read_forgetting(const Arguments& a, int64_t batch, AttentionParams* p, Reasons& reasons) {
  const Tensor& t = *a.sums;
  const ScalarType accumulate = accumulation_type(p->dtype);
  const bool fits =
      t.scalar_type() == accumulate && t.dim() == 4 && (t.size(0) == 1 || t.size(0) == batch) &&
      (t.size(1) == 1 || t.size(1) == p->Hq) && t.size(2) == 2 && t.size(3) == p->Sk &&
      (p->Sk <= 1 || t.stride(3) == 1) && (p->Sk == 0 || t.stride(2) == p->Sk);
  if (!reasons.check(fits, ErrorKind::value, [&] {
        return std::string("expected sums of ") + torch::headeronly::toString(accumulate) +
               ", [batch or 1, query heads or 1, 2, key length] = [" + std::to_string(batch) +
               " or 1, " + std::to_string(p->Hq) + " or 1, 2, " + std::to_string(p->Sk) +
               "], contiguous in the last two dimensions; got " + shape(t) + " of " +
               torch::headeronly::toString(t.scalar_type());
      }))
    return;
  p->forgetting = {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0),
                   t.size(1) == 1 ? 0 : t.stride(1)};
}

}  // namespace atx::ops
