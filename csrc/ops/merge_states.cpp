// merge_states and merge_states_bwd: two partial results of attention become one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "batch.h"
#include "check.h"
#include "csrc/core/kernels.h"
#include "targets.h"

namespace atx::ops {
namespace {

bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Strides of a [B, H, S, Dv] or [B, H, S] tensor.
Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// A tensor of a call: what the emulator is told of it.
struct Named {
  const char* name;
  const Tensor& tensor;
  bool writable;
};

class Merge {
 public:
  Merge(const char* op, const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
        const Tensor& lse_b)
      : reasons_(op), op_(op), o_a_(o_a) {
    reasons_.check(to_dtype(o_a.scalar_type(), &p.dtype) && p.dtype != DType::boolean,
                   ErrorKind::type, [&] {
                     return std::string("expected float64, float32, float16 or bfloat16; got ") +
                            torch::headeronly::toString(o_a.scalar_type());
                   });
    if (!reasons_.check(o_a.dim() == 4, ErrorKind::value, [&] {
          return "expected o [batch, heads, length, head_dim]; got " + shape(o_a);
        }))
      return;
    check_output("o_b", o_b);
    check_lse("lse_a", lse_a);
    check_lse("lse_b", lse_b);
    std::string reason;
    kernels_ = kernels_for(o_a.is_cuda(), o_a.get_device_index(), &reason);
    reasons_.check(kernels_ != nullptr, ErrorKind::runtime, [&] { return reason; });
    if (kernels_)
      reasons_.check(kernels_->dtypes & bit(p.dtype), ErrorKind::type, [&] {
        return std::string("target ") + kernels_->target + " has no " + name(p.dtype) + " kernel";
      });
    p.B = o_a.size(0), p.H = o_a.size(1), p.S = o_a.size(2), p.Dv = int(o_a.size(3));
  }

  void check_output(const char* what, const Tensor& t) {
    check(what, t, o_a_.scalar_type(), 4);
    if (t.dim() == 4)
      reasons_.check(t.size(3) <= 1 || t.stride(3) == 1, ErrorKind::value, [&] {
        return std::string("expected a contiguous last dimension of ") + what + ". Call " + what +
               ".contiguous().";
      });
  }
  void check_lse(const char* what, const Tensor& t) { check(what, t, accumulation(), 3); }
  ScalarType accumulation() const {
    return p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  }
  Tensor empty_lse() const {
    const int64_t size[] = {p.B, p.H, p.S};
    return torch::stable::new_empty(o_a_, {size, 3}, accumulation());
  }
  // A new tensor, laid out as o_a when that is a transposed [B, S, H, D] one.
  Tensor empty_output() const {
    if (o_a_.stride(1) >= o_a_.stride(2)) return torch::stable::new_empty(o_a_, o_a_.sizes());
    const int64_t size[] = {p.B, p.S, p.H, p.Dv};
    return torch::stable::transpose(torch::stable::new_empty(o_a_, {size, 4}), 1, 2);
  }

  void raise_first() const { reasons_.raise_first(); }
  std::string joined() const { return reasons_.joined(); }

  template <class Params>
  void launch(Status (*Kernels::*family)(const Params&, const Exec&), const Params& params,
              const std::vector<Named>& tensors) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (o_a_.is_cuda()) guard.emplace(o_a_.get_device_index());
    std::vector<Buffer> buffers;
    if (wants_buffers())
      for (const Named& n : tensors) {
        const Tensor& t = n.tensor;
        Buffer b = {n.name, t.const_data_ptr(), int(t.element_size()), int(t.dim()), {},
                    {},     n.writable};
        for (int d = 0; d < t.dim(); ++d) b.size[d] = t.size(d), b.stride[d] = t.stride(d);
        buffers.push_back(b);
      }
    const Status failed =
        (kernels_->*family)(params, exec_for(o_a_.is_cuda(), o_a_.get_device_index(), buffers));
    if (failed)
      throw std::runtime_error(std::string(op_) + ": the kernel launch failed: " + failed);
  }

  MergeStatesParams p{};

 private:
  void check(const char* what, const Tensor& t, ScalarType dtype, int64_t dims) {
    reasons_.check(
        t.dim() == dims && same_shape(t, o_a_, 3) && (dims == 3 || t.size(3) == o_a_.size(3)),
        ErrorKind::value, [&] {
          return std::string("expected ") + what + " of the shape of o_a" +
                 (dims == 3 ? " without its last dimension" : "") + "; got " + shape(t) +
                 ", o_a is " + shape(o_a_);
        });
    reasons_.check(t.scalar_type() == dtype, ErrorKind::type, [&] {
      return std::string("expected ") + what + " of type " + torch::headeronly::toString(dtype) +
             "; got " + torch::headeronly::toString(t.scalar_type());
    });
    reasons_.check(same_device(t, o_a_), ErrorKind::runtime, [&] {
      return std::string("expected every tensor on o_a's device; ") + what +
             " is on another one. Move it with .to(o_a.device).";
    });
  }

  Reasons reasons_;
  const char* op_;
  const Tensor& o_a_;
  const Kernels* kernels_ = nullptr;
};

void set_forward(MergeStatesParams& p, const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                 const Tensor& lse_b) {
  p.o_a = o_a.const_data_ptr(), p.o_a_stride = strides_of(o_a);
  p.o_b = o_b.const_data_ptr(), p.o_b_stride = strides_of(o_b);
  p.lse_a = lse_a.const_data_ptr(), p.lse_a_stride = strides_of(lse_a);
  p.lse_b = lse_b.const_data_ptr(), p.lse_b_stride = strides_of(lse_b);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                                        const Tensor& lse_b) {
  Merge merge("merge_states", o_a, lse_a, o_b, lse_b);
  merge.raise_first();
  Tensor o = merge.empty_output(), lse = merge.empty_lse();
  MergeStatesParams& p = merge.p;
  set_forward(p, o_a, lse_a, o_b, lse_b);
  p.o = o.mutable_data_ptr(), p.o_stride = strides_of(o);
  p.lse = lse.mutable_data_ptr(), p.lse_stride = strides_of(lse);
  merge.launch(&Kernels::merge_states, p,
               {{"o_a", o_a, false},
                {"lse_a", lse_a, false},
                {"o_b", o_b, false},
                {"lse_b", lse_b, false},
                {"o", o, true},
                {"lse", lse, true}});
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_bwd(const Tensor& d_o, const Tensor& d_lse,
                                                            const Tensor& o_a, const Tensor& lse_a,
                                                            const Tensor& o_b,
                                                            const Tensor& lse_b) {
  Merge merge("merge_states_bwd", o_a, lse_a, o_b, lse_b);
  merge.check_output("d_o", d_o);
  merge.check_lse("d_lse", d_lse);
  merge.raise_first();
  Tensor d_o_a = merge.empty_output(), d_o_b = merge.empty_output();
  Tensor d_lse_a = merge.empty_lse(), d_lse_b = merge.empty_lse();
  MergeStatesBwdParams p{};
  p.fwd = merge.p;
  set_forward(p.fwd, o_a, lse_a, o_b, lse_b);
  p.d_o = d_o.const_data_ptr(), p.d_o_stride = strides_of(d_o);
  p.d_lse = d_lse.const_data_ptr(), p.d_lse_stride = strides_of(d_lse);
  p.d_o_a = d_o_a.mutable_data_ptr(), p.d_o_a_stride = strides_of(d_o_a);
  p.d_o_b = d_o_b.mutable_data_ptr(), p.d_o_b_stride = strides_of(d_o_b);
  p.d_lse_a = d_lse_a.mutable_data_ptr(), p.d_lse_a_stride = strides_of(d_lse_a);
  p.d_lse_b = d_lse_b.mutable_data_ptr(), p.d_lse_b_stride = strides_of(d_lse_b);
  merge.launch(&Kernels::merge_states_bwd, p,
               {{"d_o", d_o, false},
                {"d_lse", d_lse, false},
                {"o_a", o_a, false},
                {"lse_a", lse_a, false},
                {"o_b", o_b, false},
                {"lse_b", lse_b, false},
                {"d_o_a", d_o_a, true},
                {"d_o_b", d_o_b, true},
                {"d_lse_a", d_lse_a, true},
                {"d_lse_b", d_lse_b, true}});
  return {d_o_a, d_lse_a, d_o_b, d_lse_b};
}

std::string why_not(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                    const Tensor& lse_b) {
  return Merge("merge_states", o_a, lse_a, o_b, lse_b).joined();
}

void register_merge_states(torch::stable::detail::StableLibrary& m) {
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("merge_states_why_not", TORCH_BOX(&why_not));
  m.impl("merge_states_bwd", TORCH_BOX(&merge_states_bwd));
}

}  // namespace
}  // namespace atx::ops

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) { atx::ops::register_merge_states(m); }
STABLE_TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) { atx::ops::register_merge_states(m); }
