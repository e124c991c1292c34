// How the machine speaks of kernels, blocks, threads and places.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "machine.h"

namespace atx::ATX_TARGET::simt {
namespace {

// "0-7,12"
std::string ranges(const std::vector<unsigned>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text +=
        (i ? "," : "") + std::to_string(sorted[i]) + (j > i ? "-" + std::to_string(sorted[j]) : "");
    i = j + 1;
  }
  return text;
}

std::string what_it_does(const Block& b, const Thread& t) {
  switch (t.state) {
    case State::done:
      return "ended";
    case State::at_barrier:
      return std::string("in ") + t.waits_in + " at " + where(t.site) + " (" +
             std::to_string(b.barrier.arrived) + " of " + std::to_string(b.count) +
             " threads arrived)";
    default: {
      const Warp& w = b.warps[t.index / LANES];
      std::vector<unsigned> missing;
      for (unsigned l = 0; l < LANES; ++l)
        if (!(w.arrived >> l & 1)) missing.push_back(l);
      return "in " + std::string(t.waits_in) + " at " + where(t.site) + ", warp " +
             std::to_string(t.index / LANES) + ": missing lanes " + ranges(missing);
    }
  }
}

}  // namespace

std::string where(Site site) {
  const char* const slash = strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string mangled_name(const Launch& launch) {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(launch.kernel), &info) || !info.dli_sname) return "kernel";
  return info.dli_sname;
}

// Without the return type and the parameters.
std::string kernel_name(const Launch& launch) {
  const std::string mangled = mangled_name(launch);
  int status = 0;
  char* const demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string text = demangled ? demangled : mangled;
  free(demangled);
  if (text.starts_with("void ")) text.erase(0, 5);
  if (text.ends_with(')')) text.erase(text.rfind('('));
  return text;
}

std::string position(const Block& b) { return "block " + std::to_string(b.index); }

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.index) + " [warp " + std::to_string(t.index / LANES) +
         " lane " + std::to_string(t.index % LANES) + "]";
}

std::string deadlock(const Block& b) {
  std::map<std::string, std::vector<unsigned>> groups;
  for (const Thread& t : b.threads) groups[what_it_does(b, t)].push_back(t.index);
  std::string text = "deadlock in " + position(b) + ": " + std::to_string(b.live) + " of " +
                     std::to_string(b.count) + " threads wait forever";
  for (const auto& [what, who] : groups) text += "\n  threads " + ranges(who) + ": " + what;
  return text;
}

std::string how_to_repeat() {
  constexpr const char* SCHEDULES[] = {"forward", "reverse", "random"};
  constexpr const char* COPIES[] = {"eager", "lazy", "poison", "random"};
  return std::string("schedule=\"") + SCHEDULES[int(config.schedule)] +
         "\", seed=" + std::to_string(config.seed) + ", async_copy=\"" +
         COPIES[int(config.async_copy)] + "\"";
}

}  // namespace atx::ATX_TARGET::simt
