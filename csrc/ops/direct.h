// direct_attention of the module _C: attention_fwd past torch's dispatcher.
#pragma once

namespace pybind11 {
class module_;
}

namespace atx::ops {

void define_direct_attention(pybind11::module_& m);

}  // namespace atx::ops
