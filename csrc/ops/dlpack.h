// DLPack's C interface, version 1, as far as it is used: how torch (2.10 and later) lends a
// tensor's memory to code that includes none of its headers, in some 30 ns.
// Specification: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace atx::ops::dlpack {

constexpr uint32_t MAJOR_VERSION = 1;

enum DeviceType : int32_t { CPU = 1 };
enum TypeCode : uint8_t { FLOAT = 2, BFLOAT = 4 };

struct Tensor {
  void* data;
  DeviceType device_type;
  int32_t device_index;
  int32_t ndim;
  TypeCode code;
  uint8_t bits;
  uint16_t lanes;
  const int64_t *shape, *stride;  // in elements
  uint64_t byte_offset;
};

// What a tensor type offers as this attribute, in a capsule of this name.
constexpr const char *EXCHANGE_ATTRIBUTE = "__dlpack_c_exchange_api__",
                     *EXCHANGE_CAPSULE = "dlpack_exchange_api";
struct Exchange {
  uint32_t major_version, minor_version;
  const Exchange* older;
  void *allocate, *export_owned, *import_owned;
  // Describes a tensor object for as long as it lives and keeps its shape. -1, with a Python
  // exception set: it has no such description. Null: not offered.
  int (*borrow)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace atx::ops::dlpack
