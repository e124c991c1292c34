// Argument checks of the op boundary: collect every reason a call cannot run, then raise the first
// or list them all. One shape for every message: "op: expected X; got Y (shapes). Hint."
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "csrc/core/params.h"

namespace atx::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class ErrorKind { value, type, runtime };  // ValueError, TypeError, RuntimeError

class Reasons {
 public:
  explicit Reasons(const char* op) : op_(op) {}

  // Notes the reason unless `ok`; returns ok, for checks that depend on it.
  template <class Message>
  bool check(bool ok, ErrorKind kind, const Message& message) {
    if (!ok) all_.push_back({kind, std::string(op_) + ": " + message()});
    return ok;
  }
  std::string joined() const;
  void raise_first() const;

 private:
  struct Reason {
    ErrorKind kind;
    std::string message;
  };
  const char* op_;
  std::vector<Reason> all_;
};

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// False for types that no kernel reads.
inline bool to_dtype(ScalarType type, DType* out) {
  switch (type) {
    case ScalarType::Double:
      return *out = DType::f64, true;
    case ScalarType::Float:
      return *out = DType::f32, true;
    case ScalarType::Half:
      return *out = DType::f16, true;
    case ScalarType::BFloat16:
      return *out = DType::bf16, true;
    case ScalarType::Bool:
      return *out = DType::boolean, true;
    default:
      return false;
  }
}
inline const char* name(DType t) {
  const char* names[] = {"float64", "float32", "float16", "bfloat16", "bool"};
  return names[int(t)];
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

}  // namespace atx::ops
