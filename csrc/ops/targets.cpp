// The kernel table's rows, the choice between them, and the services they get.
#include "targets.h"

#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "architecture.h"

namespace atx {
#define ATX_ROW(target)         \
  namespace target {            \
  extern const Kernels kernels; \
  }
ATX_ROW(scalar)
#if defined(__x86_64__)
ATX_ROW(avx2)
ATX_ROW(avx512)
ATX_ROW(amx)
namespace amx {
extern const Kernels kernels_f16;
}
#elif defined(__aarch64__)
ATX_ROW(neon)
#endif
#if defined(ATX_WITH_CUDA)
ATX_ROW(gpu)
#endif
#undef ATX_ROW
}  // namespace atx

#if defined(ATX_WITH_CUDA)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace atx::ops {
namespace {

struct Row {
  const Kernels* kernels;
  bool runs;  // on this machine
};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

// What g++ 12 has no name for, by its place in CPUID leaf 7.
struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Tile registers are 8 KB of a thread's state, which Linux saves only for a process that asked: for
// all its threads, those that exist and those to come.
bool runs_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  const unsigned edx = Leaf7(0).edx;
  const bool tile = edx >> 24 & 1, tile_bf16 = edx >> 22 & 1;
  return tile && tile_bf16 && runs_avx512() && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
bool runs_amx_fp16() { return runs_amx() && (Leaf7(1).eax >> 21 & 1); }

// The tile rows say what they do themselves. Put together here, as this file is compiled for any
// CPU: an initializer of theirs would run AVX-512 instructions when the library is loaded.
Kernels on_avx512(const Kernels& tiles) {
  Kernels k = avx512::kernels;
  k.target = tiles.target;
  k.attention_fwd = tiles.attention_fwd;
  k.attention_bwd = tiles.attention_bwd;
  k.catalogue = tiles.catalogue;
  k.catalogue_size = tiles.catalogue_size;
  return k;
}
#endif

const std::vector<Row>& cpu_rows() {
#if defined(__x86_64__)
  static const Kernels tiles_f16 = on_avx512(amx::kernels_f16), tiles = on_avx512(amx::kernels);
#endif
  static const std::vector<Row> rows = {
#if defined(__x86_64__)
      {&tiles_f16, runs_amx_fp16()},
      {&tiles, runs_amx()},
      {&avx512::kernels, runs_avx512()},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c")},
#elif defined(__aarch64__)
      {&neon::kernels, true},
#endif
      {&scalar::kernels, true}};
  return rows;
}

const Kernels* find_cpu(const std::string& name, const char* setting) {
  std::string usable;
  for (const Row& row : cpu_rows()) {
    if (row.runs && name == row.kernels->target) return row.kernels;
    if (row.runs) usable += std::string(usable.empty() ? "" : ", ") + row.kernels->target;
  }
  throw std::invalid_argument(std::string(setting) + ": expected one of " + usable +
                              " (what this build has and this CPU runs); got '" + name + "'");
}

std::atomic<const Kernels*>& chosen_cpu() {
  static std::atomic<const Kernels*> chosen = [] {
    const char* name = std::getenv("ATTN_EXT_CPU");
    if (name && *name) return find_cpu(name, "ATTN_EXT_CPU");
    for (const Row& row : cpu_rows())
      if (row.runs) return row.kernels;
    return cpu_rows().back().kernels;
  }();
  return chosen;
}

std::atomic<const Kernels*> simt_row{nullptr};
std::atomic<bool> simt_on{false};
std::atomic<bool (*)()> asks_for_tf32{nullptr};

// kernels.h's parallel_for on torch's thread pool.
void parallel_for(int64_t n, void (*body)(const void*, int64_t, int64_t), const void* ctx) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

}  // namespace

const Kernels* cpu_target() { return chosen_cpu(); }
void use_cpu(const std::string& name) { chosen_cpu() = find_cpu(name, "cpu target"); }

std::vector<const Kernels*> available_targets() {
  std::vector<const Kernels*> all;
  for (const Row& row : cpu_rows())
    if (row.runs) all.push_back(row.kernels);
#if defined(ATX_WITH_CUDA)
  all.push_back(&gpu::kernels);
#endif
  if (const Kernels* simt = simt_row) all.push_back(simt);
  return all;
}

std::vector<std::string> unsupported_targets() {
  std::vector<std::string> names;
  for (const Row& row : cpu_rows())
    if (!row.runs) names.push_back(row.kernels->target);
  return names;
}

bool built_with_cuda() {
#if defined(ATX_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

void load_simt(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library)
    throw std::runtime_error(std::string("attn_ext: cannot load the emulator: ") + dlerror());
  auto kernels = reinterpret_cast<const Kernels* (*)()>(dlsym(library, "atx_simt_kernels"));
  if (!kernels)
    throw std::runtime_error("attn_ext: " + path +
                             " is not an emulator library: it has no atx_simt_kernels");
  simt_row = kernels();
}

void use_simt(bool on) {
  if (on && !simt_row)
    throw std::runtime_error(
        "attn_ext: the emulator is not loaded; enter it with attn_ext.testing.simt()");
  simt_on = on;
}

bool wants_buffers() { return simt_on; }

bool tf32_allowed() {
  const auto asks = asks_for_tf32.load();
  return asks && asks();
}
void set_tf32_allowed(bool (*asks)()) { asks_for_tf32 = asks; }

const Kernels* kernels_for(bool is_cuda, [[maybe_unused]] int device_index, std::string* reason) {
  if (!is_cuda) return simt_on ? simt_row.load() : chosen_cpu().load();
#if defined(ATX_WITH_CUDA)
  *reason = why_not_device(device_index);
  return reason->empty() ? &gpu::kernels : nullptr;
#else
  *reason =
      "attn_ext was built without CUDA kernels. Install it where nvcc and a CUDA build of torch "
      "are found, or set ATTN_EXT_CUDA=1";
  return nullptr;
#endif
}

Exec exec_for([[maybe_unused]] bool is_cuda, [[maybe_unused]] int device_index,
              const std::vector<Buffer>& buffers) {
  Exec exec{};
  exec.parallel_for = parallel_for;
  exec.num_threads = int(torch::stable::get_num_threads());
  exec.buffers = buffers.data();
  exec.num_buffers = int(buffers.size());
#if defined(ATX_WITH_CUDA)
  if (is_cuda)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &exec.stream));
#endif
  return exec;
}

}  // namespace atx::ops
