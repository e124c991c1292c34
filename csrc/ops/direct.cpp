// attention_fwd past torch's dispatcher, which takes several times as long as attention of a few
// tokens: q, k and v are read through DLPack, and o is all that is allocated. Serves the plainest
// calls on the CPU, where the dispatcher would do nothing but call the kernel. For all others,
// among them every call with an error in it, the answer is None: they are the dispatcher's.
#include "direct.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.h"
#include "targets.h"

namespace py = pybind11;

namespace atx::ops {
namespace {

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
bool is_true(PyObject* result) { return PyObject_IsTrue(owned(result).ptr()) == 1; }

template <class F>
auto without_gil(F f) {
  const py::gil_scoped_release other_threads_run;
  return f();
}

// boolean, which no kernel takes, for all other types.
DType dtype_of(const dlpack::Tensor& t) {
  if (t.code == dlpack::BFLOAT) return DType::bf16;
  if (t.code != dlpack::FLOAT) return DType::boolean;
  return t.bits == 64 ? DType::f64 : t.bits == 32 ? DType::f32 : DType::f16;
}

Strides strides_of(const dlpack::Tensor& t) {
  const auto stride = [&](int d) { return t.shape[d] == 1 ? 0 : t.stride[d]; };
  return {stride(0), stride(1), stride(2)};
}

// Whether kernels can read q, k and v as they are, with nothing broadcast but key heads.
bool fit(const dlpack::Tensor& q, const dlpack::Tensor& k, const dlpack::Tensor& v, bool enable_gqa,
         const Kernels& kernels) {
  const DType type = dtype_of(q);
  const int64_t heads = q.shape[1], key_heads = k.shape[1], D = q.shape[3];
  return dtype_of(k) == type && dtype_of(v) == type && kernels.dtypes & bit(type) &&
         k.shape[0] == q.shape[0] && v.shape[0] == q.shape[0] && v.shape[1] == key_heads &&
         (heads == key_heads || (enable_gqa && heads % key_heads == 0)) &&
         v.shape[2] == k.shape[2] && k.shape[3] == D && v.shape[3] == D &&
         D <= kernels.max_head_dim;
}

// Whether q lies as o is to lie (attention.cpp), so that empty_like makes it.
bool lies_as_output(const dlpack::Tensor& q) {
  const int64_t H = q.shape[1], S = q.shape[2], D = q.shape[3];
  const bool transposed = q.stride[1] < q.stride[2];
  return q.stride[0] == H * S * D && q.stride[1] == (transposed ? D : S * D) &&
         q.stride[2] == (transposed ? H * D : D);
}

class DirectAttention {
 public:
  DirectAttention() {
    const py::module_ torch = py::module_::import("torch");
    const py::object internals = torch.attr("_C");
    tensor_ = torch.attr("Tensor"), empty_like_ = torch.attr("empty_like");
    for (const char* name :
         {"_len_torch_dispatch_stack", "_len_torch_function_stack",
          "_are_functorch_transforms_active", "_is_tracing", "_is_any_autocast_enabled"})
      observers_.push_back(internals.attr(name));
    observers_.push_back(internals.attr("_autograd").attr("_profiler_enabled"));
    const py::object offered = py::getattr(tensor_, dlpack::EXCHANGE_ATTRIBUTE, py::none());
    if (!PyCapsule_IsValid(offered.ptr(), dlpack::EXCHANGE_CAPSULE)) return;
    const auto* const exchange = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(offered.ptr(), dlpack::EXCHANGE_CAPSULE));
    if (exchange->major_version == dlpack::MAJOR_VERSION && exchange->borrow) exchange_ = exchange;
  }

  py::object operator()(py::handle query, py::handle key, py::handle value,
                        std::optional<double> given_scale, double softcap, int64_t window_left,
                        int64_t window_right, bool bottom_right, bool enable_gqa) const {
    const Kernels& kernels = *cpu_target();
    dlpack::Tensor q, k, v, o;
    if (!exchange_ || wants_buffers() || observed() || !read(query, &q) || !read(key, &k) ||
        !read(value, &v) || !fit(q, k, v, enable_gqa, kernels) || !lies_as_output(q))
      return py::none();
    // as default_scale in attn_ext/ops/attention.py
    const double scale = given_scale ? *given_scale : std::pow(double(q.shape[3]), -0.5);
    if (!std::isfinite(scale) || !std::isfinite(softcap) || softcap < 0 || window_left < -1 ||
        window_right < -1)
      return py::none();
    const py::object output = owned(PyObject_CallOneArg(empty_like_.ptr(), query.ptr()));
    if (exchange_->borrow(output.ptr(), &o) != 0) throw py::error_already_set();

    const auto bound = [](int64_t w) { return int(w < 0 || w >= NO_WINDOW ? NO_WINDOW : w); };
    AttentionParams p{};
    p.q = q.data, p.k = k.data, p.v = v.data, p.o = o.data;
    p.q_stride = strides_of(q), p.k_stride = strides_of(k), p.v_stride = strides_of(v);
    p.o_stride = strides_of(o);
    p.B = int(q.shape[0]), p.Hq = int(q.shape[1]), p.Hkv = int(k.shape[1]);
    p.Sq = int(q.shape[2]), p.Sk = int(k.shape[2]), p.D = p.Dv = int(q.shape[3]);
    p.dtype = dtype_of(q);
    p.scale = scale, p.softcap = softcap;
    p.window_left = bound(window_left), p.window_right = bound(window_right);
    p.bottom_right = bottom_right;
    const Status failed =
        without_gil([&] { return kernels.attention_fwd(p, exec_for(false, 0, {})); });
    if (failed)
      throw std::runtime_error(std::string("attention: the kernel launch failed: ") + failed);
    return output;
  }

 private:
  // Whether something of torch wants to see or change what is called: a mode, a transform ...
  bool observed() const {
    return std::any_of(observers_.begin(), observers_.end(), [](const py::object& observes) {
      return is_true(PyObject_CallNoArgs(observes.ptr()));
    });
  }

  // Reads a [B, H, S, D] tensor whose numbers are what its memory holds (not their negatives) and
  // that no gradient is asked of; false for any other object.
  bool read(py::handle object, dlpack::Tensor* t) const {
    if (!py::type::handle_of(object).is(tensor_)) return false;
    if (aoti_torch_grad_mode_is_enabled() &&
        is_true(PyObject_GetAttr(object.ptr(), requires_grad_.ptr())))
      return false;
    if (exchange_->borrow(object.ptr(), t) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto fits = [](int64_t size) { return 1 <= size && size <= MAX_LENGTH; };
    return t->device_type == dlpack::CPU && t->ndim == 4 && t->data && t->stride[3] == 1 &&
           std::all_of(t->shape, t->shape + 4, fits) &&
           !is_true(PyObject_CallMethodNoArgs(object.ptr(), is_neg_.ptr()));
  }

  py::object tensor_, empty_like_;
  py::str requires_grad_{"requires_grad"}, is_neg_{"is_neg"};
  std::vector<py::object> observers_;
  const dlpack::Exchange* exchange_ = nullptr;  // null: this torch does not offer it
};

}  // namespace

void define_direct_attention(py::module_& m) {
  const char* const name = "direct_attention";
  m.def(name, DirectAttention(),
        "Attention past the dispatcher: o, or None if the call is not of the plainest.");
  m.def(name, [](const py::args&) { return py::none(); }, "Arguments of other types: None.");
}

}  // namespace atx::ops
