// Sectors and bank conflicts.
#include "counters.h"

#include <algorithm>
#include <set>

namespace atx::ATX_TARGET::simt {
namespace {

constexpr uint64_t SECTOR_BYTES = 32, BANKS = 32, BANK_BYTES = 4, PASS_BYTES = BANKS * BANK_BYTES;

struct Units {
  uint64_t used, ideal;
};

Units sectors(const std::vector<uint64_t>& addresses, unsigned bytes) {
  std::set<uint64_t> touched;
  for (uint64_t a : addresses)
    for (uint64_t s = a / SECTOR_BYTES; s <= (a + bytes - 1) / SECTOR_BYTES; ++s) touched.insert(s);
  const uint64_t distinct = std::set<uint64_t>(addresses.begin(), addresses.end()).size();
  return {touched.size(), (distinct * bytes + SECTOR_BYTES - 1) / SECTOR_BYTES};
}

// Lanes are served in groups that could fill one pass (8 lanes of 16 bytes, 16 of 8, else 32). A
// group needs as many passes as the busiest bank has different words.
Units passes(const uint64_t* address, uint32_t lanes, unsigned bytes) {
  const unsigned group = unsigned(std::min<uint64_t>(LANES, PASS_BYTES / bytes));
  Units units{0, 0};
  for (unsigned begin = 0; begin < LANES; begin += group) {
    std::set<uint64_t> words[BANKS];
    bool any = false;
    for (unsigned l = begin; l < begin + group; ++l) {
      if (!(lanes >> l & 1)) continue;
      any = true;
      for (uint64_t w = address[l] / BANK_BYTES; w <= (address[l] + bytes - 1) / BANK_BYTES; ++w)
        words[w % BANKS].insert(w);
    }
    uint64_t most = 0;
    for (const auto& bank : words) most = std::max<uint64_t>(most, bank.size());
    units.used += most;
    units.ideal += any;
  }
  return units;
}

}  // namespace

void Counters::begin(const std::string& kernel) {
  const auto known = std::find(kernels_.begin(), kernels_.end(), kernel);
  kernel_ = uint16_t(known - kernels_.begin());
  if (known == kernels_.end()) kernels_.push_back(kernel);
}

void Counters::clear() {
  totals_.clear();
  kernels_.clear();
}

void Counters::multiply(uint16_t site) {
  Total& total = totals_[{kernel_, site, 0, false, Space::tensor}];
  ++total.requests;
  ++total.units;
  ++total.ideal;
}

void Counters::record(uint16_t site, unsigned thread, uint64_t address, unsigned bytes, bool write,
                      Space space) {
  const Key key{kernel_, site, uint8_t(bytes), write, space};
  Pending& p = pending_[{key, thread / LANES}];
  const unsigned lane = thread % LANES;
  const uint32_t at = p.executions[lane]++ - p.first;
  while (p.requests.size() <= at) p.requests.emplace_back();
  p.requests[at].lanes |= 1u << lane;
  p.requests[at].address[lane] = address;
  for (; !p.requests.empty() && p.requests.front().lanes == ALL_LANES; ++p.first) {
    close(key, p.requests.front());
    p.requests.pop_front();
  }
}

void Counters::flush() {
  for (auto& [key, p] : pending_)
    for (const Request& request : p.requests)
      if (request.lanes) close(key.first, request);
  pending_.clear();
}

void Counters::close(const Key& key, const Request& request) {
  Units units;
  if (key.space == Space::shared) {
    units = passes(request.address, request.lanes, key.bytes);
  } else {
    std::vector<uint64_t> addresses;
    for (unsigned l = 0; l < LANES; ++l)
      if (request.lanes >> l & 1) addresses.push_back(request.address[l]);
    units = sectors(addresses, key.bytes);
  }
  Total& total = totals_[key];
  ++total.requests;
  total.units += units.used;
  total.ideal += units.ideal;
}

// Space, verb and bytes per thread, behind tabs.
std::string Counters::words(const Key& key) {
  const std::string bytes = "\t" + std::to_string(key.bytes);
  if (key.space == Space::tensor) return "\ttensor\tmultiply" + bytes;
  return (key.space == Space::shared ? "\tshared" : "\tglobal") +
         std::string(key.write ? "\twrite" : "\tread") + bytes;
}

std::string Counters::table(Sites& sites) const {
  std::map<std::string, Total> lines;  // several instructions may come from one line
  for (const auto& [key, total] : totals_) {
    Total& line = lines[kernels_[key.kernel] + "\t" + sites.name(key.site) + words(key)];
    line.requests += total.requests;
    line.units += total.units;
    line.ideal += total.ideal;
  }
  std::string text;
  for (const auto& [line, total] : lines)
    text += line + "\t" + std::to_string(total.requests) + "\t" + std::to_string(total.units) +
            "\t" + std::to_string(total.ideal) + "\n";
  return text;
}

}  // namespace atx::ATX_TARGET::simt
