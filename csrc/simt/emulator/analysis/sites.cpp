// Places in the source. Lines of code addresses come from the debug information, by addr2line, when
// a report needs them.
#include "sites.h"

#include <dlfcn.h>
#include <stdio.h>

#include <bit>
#include <cstring>

namespace atx::ATX_TARGET::simt {
namespace {

// "/a/b/flash.cu:81 (discriminator 2)" -> "flash.cu:81"
std::string short_line(const char* line) {
  const char* const slash = strrchr(line, '/');
  const std::string text = slash ? slash + 1 : line;
  return text.substr(0, text.find_first_of(" \n"));
}

// The innermost inlined line, then the line of the kernel that it was inlined into.
std::string source_line(const void* code) {
  Dl_info info{};
  if (!dladdr(code, &info) || !info.dli_fname) return "?";
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  char command[1024], line[1024];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           size_t(offset));
  FILE* const pipe = popen(command, "r");
  if (!pipe) return "?";
  std::string inner, outer;
  while (fgets(line, sizeof line, pipe)) (inner.empty() ? inner : outer) = short_line(line);
  pclose(pipe);
  if (inner.empty()) return "?";
  return outer.empty() || outer == inner ? inner : inner + " (in " + outer + ")";
}

}  // namespace

uint16_t Sites::id(const void* key, bool is_code) {
  Recent& recent = recent_[reinterpret_cast<uintptr_t>(key) / (is_code ? 1 : 8) % RECENT];
  if (recent.key == key) return recent.id;
  const auto [at, fresh] = ids_.try_emplace(key, uint16_t(entries_.size()));
  if (fresh) entries_.push_back({key, is_code, {}});
  recent = {key, at->second};
  return at->second;
}

const std::string& Sites::name(uint16_t id) {
  Entry& entry = entries_[id];
  if (entry.name.empty())
    entry.name = entry.is_code ? source_line(entry.key) : where(std::bit_cast<Site>(entry.key));
  return entry.name;
}

}  // namespace atx::ATX_TARGET::simt
