// Compute capabilities: what an entry of TORCH_CUDA_ARCH_LIST runs on.
#include "architecture.h"

#if defined(ATX_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#include <cstdio>
#include <sstream>
#include <utility>
#include <vector>

namespace atx::ops {
namespace {

using Capability = std::pair<int, int>;

constexpr Capability LEAST{8, 0};  // cp.async, and mma of bfloat16

std::string name(Capability c) { return std::to_string(c.first) + "." + std::to_string(c.second); }

// Machine code runs on later minor versions of its GPU, PTX on every later GPU; both with an `a`
// only on their own.
bool runs_on(Capability gpu, const std::string& entry) {
  Capability built;
  int end = 0;
  if (std::sscanf(entry.c_str(), "%d.%d%n", &built.first, &built.second, &end) < 2) return false;
  const std::string rest = entry.substr(end);
  if (rest.starts_with("a")) return gpu == built;
  return gpu >= built && (gpu.first == built.first || rest == "+PTX");
}

}  // namespace

std::string why_not_gpu(int major, int minor, const std::string& architectures) {
  const Capability gpu{major, minor};
  if (gpu < LEAST)
    return "expected a GPU of compute capability " + name(LEAST) + " or later; got " + name(gpu) +
           ". Move the tensors to the CPU.";
  std::istringstream entries(architectures);
  for (std::string entry; entries >> entry;)
    if (runs_on(gpu, entry)) return "";
  return "expected a GPU that this build has kernels for, " + architectures +
         "; got compute capability " + name(gpu) +
         ". Build with TORCH_CUDA_ARCH_LIST=" + name(gpu) + ".";
}

#if defined(ATX_WITH_CUDA)
const std::string& why_not_device(int index) {
  static const std::vector<std::string> reasons = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<std::string> all(count);
    for (int i = 0; i < count; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      all[i] = why_not_gpu(major, minor, ATX_CUDA_ARCHITECTURES);
    }
    return all;
  }();
  return reasons.at(index);
}
#endif

}  // namespace atx::ops
