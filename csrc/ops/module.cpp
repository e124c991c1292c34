// The module attn_ext._C: loading it registers the ops; its functions say what was built and pick
// among it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "architecture.h"
#include "check.h"
#include "direct.h"
#include "targets.h"

namespace py = pybind11;

namespace {

py::list kernels() {
  py::list rows;
  for (const atx::Kernels* target : atx::ops::available_targets())
    for (int i = 0; i < target->catalogue_size; ++i) {
      const atx::KernelInfo& k = target->catalogue[i];
      py::dict row;
      row["target"] = target->target;
      row["family"] = k.family;
      row["dtype"] = k.dtype;
      row["score"] = k.score;
      row["head_dim"] = k.head_dim;
      row["head_dim_v"] = k.head_dim_v ? k.head_dim_v : k.head_dim;
      row["block_q"] = k.block_q;
      row["block_kv"] = k.block_kv;
      row["threads"] = k.threads;
      row["shared_bytes"] = k.shared_bytes;
      rows.append(row);
    }
  return rows;
}

py::dict targets() {
  py::dict rows;
  for (const atx::Kernels* target : atx::ops::available_targets()) {
    py::list dtypes;
    for (int d = 0; d < int(atx::DType::boolean); ++d)
      if (target->dtypes >> d & 1) dtypes.append(atx::ops::name(atx::DType(d)));
    py::dict row;
    row["dtypes"] = dtypes;
    row["max_head_dim"] = target->max_head_dim;
    row["max_wide_head_dim"] = target->max_wide_head_dim;
    rows[target->target] = row;
  }
  return rows;
}

bool tf32_allowed() {
  py::gil_scoped_acquire gil;
  const py::object matmul = py::module_::import("torch.backends.cuda").attr("matmul");
  return matmul.attr("fp32_precision").cast<std::string>() == "tf32";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "attn_ext's compiled half: torch ops, build information, choice of target.";
  atx::ops::cpu_target();  // a wrong ATTN_EXT_CPU is an error at import, not at the first call
  atx::ops::set_tf32_allowed(tf32_allowed);
  m.def("kernels", &kernels, "Every compiled kernel, as a list of dicts.");
  m.def("targets", &targets,
        "Targets this machine can run: name -> dtypes and largest head dimension.");
  m.def("unsupported_targets", &atx::ops::unsupported_targets,
        "Targets that were compiled but that this CPU cannot run.");
  m.def(
      "cpu_target", [] { return atx::ops::cpu_target()->target; },
      "The target that serves CPU tensors.");
  m.def("use_cpu", &atx::ops::use_cpu, py::arg("target"),
        "Serve CPU tensors with this target from now on.");
  m.def("built_with_cuda", &atx::ops::built_with_cuda);
  m.def("why_not_gpu", &atx::ops::why_not_gpu, py::arg("major"), py::arg("minor"),
        py::arg("architectures"),
        "Why kernels built for these architectures do not run on a GPU of this compute capability; "
        "empty where they do.");
  m.def("load_simt", &atx::ops::load_simt, py::arg("path"),
        "Load the emulator library; attn_ext.testing.simt() does it.");
  m.def("use_simt", &atx::ops::use_simt, py::arg("on"),
        "Serve CPU tensors with the emulator; attn_ext.testing.simt() does it.");
  atx::ops::define_direct_attention(m);
  m.attr("compiler") = __VERSION__;
#if defined(ATX_WITH_CUDA)
  m.attr("cuda_architectures") = ATX_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
}
