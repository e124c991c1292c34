// The hooks build's judge.
#include "analysis.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>

namespace atx::ATX_TARGET::simt {
namespace {

constexpr size_t MOST_REPORTS = 16;

const char* verb(Analysis::Kind kind) { return kind == Analysis::READ ? "read" : "write"; }

int add_segments(dl_phdr_info* info, size_t, void* out) {
  Dl_info self{};
  dladdr(reinterpret_cast<void*>(add_segments), &self);
  if (info->dlpi_addr != reinterpret_cast<ElfW(Addr)>(self.dli_fbase)) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD)
      static_cast<std::vector<std::pair<uintptr_t, uintptr_t>>*>(out)->emplace_back(
          begin, begin + segment.p_memsz);
  }
  return 1;
}

std::string actor(const Access& a, bool other_block) {
  return other_block ? "a thread of another block" : name(block->threads[a.thread]);
}

}  // namespace

Analyzer& analyzer() {
  static Analyzer& one = *new Analyzer;
  return one;
}

// The machine finds the analysis by this, when the library that holds both is loaded.
[[gnu::constructor]] void install() { analysis = &analyzer(); }

void Analyzer::begin(const Launch& launch) {
  clock_.begin_launch();
  if (counting_) counters_.begin(mangled_name(launch));
  seen_.clear();
  reports_.clear();
  tensors_.clear();
  recent_ = 0;
  shared_.assign(size_t(launch.shared_bytes), {});
  params_ = reinterpret_cast<uintptr_t>(launch.params);
  params_end_ = params_ + launch.params_bytes;
  if (constants_.empty()) dl_iterate_phdr(add_segments, &constants_);
  if (launch.exec)
    for (int i = 0; i < launch.exec->num_buffers; ++i)
      if (launch.exec->buffers[i].data) tensors_.emplace_back(launch.exec->buffers[i]);
}

std::string Analyzer::end() {
  if (counting_) counters_.flush();
  std::string text;
  for (const std::string& report : reports_) text += (text.empty() ? "" : "\n") + report;
  return text;
}

void Analyzer::block_begins() {
  clock_.begin_block();
  const uintptr_t all[] = {
      reinterpret_cast<uintptr_t>(&threadIdx), reinterpret_cast<uintptr_t>(&blockIdx),
      reinterpret_cast<uintptr_t>(&blockDim), reinterpret_cast<uintptr_t>(&gridDim)};
  indices_ = *std::min_element(std::begin(all), std::end(all));
  indices_end_ = *std::max_element(std::begin(all), std::end(all)) + sizeof(Index);
  if (counting_) counters_.flush();
}

void Analyzer::block_synchronizes() {
  clock_.synchronize();
  if (counting_) counters_.flush();
}

bool Analyzer::is_private(uintptr_t a) const {
  if (a - reinterpret_cast<uintptr_t>(block->stacks) < block->stacks_bytes) return true;
  if (a - params_ < params_end_ - params_ || a - indices_ < indices_end_ - indices_) return true;
  return false;
}

void Analyzer::multiplies(const Site& site) {
  if (counting_ && thread->index % LANES == 0) counters_.multiply(sites_.id(site));
}

void Analyzer::access(const void* pointer, unsigned bytes, Kind kind, const void* code,
                      const Site* site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_private(address) || bytes == 0) return;
  const uint16_t place = code ? sites_.id(code) : sites_.id(*site);
  const auto* const p = static_cast<const char*>(pointer);
  if (p >= block->shared && p < block->shared + block->shared_capacity)
    return shared_access(p, bytes, kind, place);
  global_access(address, bytes, kind, place);
}

void Analyzer::check_alignment(uintptr_t address, unsigned bytes, Kind kind, uint16_t site,
                               const char* space) {
  const bool power = (bytes & (bytes - 1)) == 0 && bytes <= 16;
  if (power && address % bytes)
    fail(std::string("misaligned ") + space + " " + verb(kind) + " of " + std::to_string(bytes) +
         " bytes at " + sites_.name(site));
}

void Analyzer::shared_access(const char* pointer, unsigned bytes, Kind kind, uint16_t site) {
  const auto offset = size_t(pointer - block->shared);
  if (offset + bytes > block->shared_bytes)
    fail(std::string("out of bounds: shared ") + verb(kind) + " of " + std::to_string(bytes) +
         " bytes at offset " + std::to_string(offset) + " of " +
         std::to_string(block->shared_bytes) + " at " + sites_.name(site));
  check_alignment(reinterpret_cast<uintptr_t>(pointer), bytes, kind, site, "shared");
  const unsigned self = thread->index;
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Verdict verdict = clock_.touch(shared_[i], self, site, kind, true);
    if (__builtin_expect(verdict.finding != Finding::none, 0))
      report(verdict, kind, site, "shared memory +" + std::to_string(i));
  }
  if (counting_ && kind != LAND) counters_.shared(site, self, offset, bytes, kind != READ);
}

Tensor* Analyzer::find(uintptr_t address, unsigned bytes, bool write) {
  if (recent_ < tensors_.size() && tensors_[recent_].contains(address, bytes) &&
      (!write || tensors_[recent_].writable()))
    return &tensors_[recent_];
  Tensor* found = nullptr;  // tensors may overlap: a write prefers one that allows it
  for (Tensor& t : tensors_)
    if (t.contains(address, bytes) && (!found || t.writable())) found = &t;
  if (found) recent_ = size_t(found - tensors_.data());
  return found;
}

void Analyzer::out_of_bounds(uintptr_t address, unsigned bytes, Kind kind, uint16_t site) {
  const auto nearest = std::min_element(tensors_.begin(), tensors_.end(), [&](auto& a, auto& b) {
    return a.distance(address) < b.distance(address);
  });
  constexpr size_t NEAR = 1 << 20;
  const std::string place =
      nearest->distance(address) < NEAR ? nearest->describe(address) : "in no tensor of the call";
  fail(std::string("out of bounds: global ") + verb(kind) + " of " + std::to_string(bytes) +
       " bytes, " + place + ", at " + sites_.name(site));
}

void Analyzer::global_access(uintptr_t address, unsigned bytes, Kind kind, uint16_t site) {
  if (tensors_.empty()) return;
  Tensor* const tensor = find(address, bytes, kind != READ);
  if (!tensor) {
    for (const auto& [begin, end] : constants_)
      if (address >= begin && address < end) return;
    out_of_bounds(address, bytes, kind, site);
  }
  check_alignment(address, bytes, kind, site, "global");
  if (kind != READ && !tensor->writable())
    fail("write to read-only " + tensor->describe(address) + " at " + sites_.name(site));
  int count = 0;
  if (Cell* const cells = tensor->cells(address, bytes, &count))
    for (int i = 0; i < count; ++i) {
      const Verdict verdict = clock_.touch(cells[i], thread->index, site, kind, false);
      if (__builtin_expect(verdict.finding != Finding::none, 0))
        report(verdict, kind, site, tensor->describe(address));
    }
  if (counting_) counters_.global(site, thread->index, address, bytes, kind != READ);
}

void Analyzer::report(const Verdict& v, Kind kind, uint16_t site, const std::string& memory) {
  const std::string& here = sites_.name(site);
  const std::string who = name(*thread) + " at " + here;
  std::string text, key = std::to_string(int(v.finding)) + here;
  if (v.finding == Finding::uninitialized) {
    text = "uninitialized: " + memory + " is read by " + who;
  } else {
    const std::string& there = sites_.name(v.other.site);
    key += there;
    const std::string other = actor(v.other, v.other_block) + " at " + there;
    if (v.finding == Finding::in_flight)
      text = "in flight: " + memory + " is " + (kind == READ ? "read" : "overwritten") + " by " +
             who + " before the asynchronous copy issued by " + other + " was waited for";
    else
      text = "race: the " + std::string(verb(kind)) + " of " + memory + " by " + who +
             " is not ordered after the " +
             (v.finding == Finding::write_after_read ? "read" : "write") + " by " + other;
  }
  if (seen_.insert(key).second && reports_.size() < MOST_REPORTS)
    reports_.push_back(position(*block) + ": " + text);
}

}  // namespace atx::ATX_TARGET::simt

using atx::ATX_TARGET::simt::analyzer;

// Starts counting from zero, or stops.
extern "C" void atx_simt_count(int on) { analyzer().count(on != 0); }

// What was counted, a line per kernel and place: kernel, place, space, verb, bytes, requests,
// units, least units; separated by tabs.
extern "C" const char* atx_simt_counters() {
  static std::string text;
  text = analyzer().counters().table(analyzer().sites());
  return text.c_str();
}
