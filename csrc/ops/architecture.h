// Which GPUs the compiled kernels run on: a reason, before any work, where they do not.
#pragma once
#include <string>

namespace atx::ops {

// Why kernels that were built for `architectures`, as in TORCH_CUDA_ARCH_LIST but without names, do
// not run on a GPU of this compute capability; empty where they do.
std::string why_not_gpu(int major, int minor, const std::string& architectures);

#if defined(ATX_WITH_CUDA)
// The same of a GPU of this machine and this build. Found out once, without waiting for any GPU.
const std::string& why_not_device(int index);
#endif

}  // namespace atx::ops
