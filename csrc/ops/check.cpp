#include "check.h"

#include <pybind11/pybind11.h>  // only here: its headers double the compile time of an op

#include <stdexcept>

namespace atx::ops {

std::string Reasons::joined() const {
  std::string text;
  for (const Reason& r : all_) text += (text.empty() ? "" : "\n") + r.message;
  return text;
}

void Reasons::raise_first() const {
  if (all_.empty()) return;
  const Reason& r = all_.front();
  if (r.kind == ErrorKind::value) throw std::invalid_argument(r.message);
  if (r.kind == ErrorKind::type) throw pybind11::type_error(r.message);
  throw std::runtime_error(r.message);
}

}  // namespace atx::ops
