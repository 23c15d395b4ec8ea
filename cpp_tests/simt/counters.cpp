// Traffic. The n-th time that each lane of a warp passes an access of the source, counted from where all lanes last
// met (a block barrier, or a collective of the whole warp), is one request of the warp.
#include <algorithm>
#include <unordered_map>

#include "engine.h"

namespace simt {
namespace {

constexpr int kSectorBytes = 32, kBanks = 32, kBankBytes = 4;

struct Request {
  unsigned lanes = 0;
  std::array<uintptr_t, kWarp> address;
  std::array<uint16_t, kWarp> bytes;
};

// An access of the source, as far as counting goes.
struct SiteKey {
  const void* pc;
  Space space;
  Op op;
  int buffer;

  bool operator==(const SiteKey& o) const { return pc == o.pc && space == o.space && op == o.op && buffer == o.buffer; }
};

struct SiteHash {
  size_t operator()(const SiteKey& key) const {
    return (reinterpret_cast<size_t>(key.pc) * 8 + size_t(key.buffer) * 977 + size_t(key.op)) * 0x9E3779B97F4A7C15u >>
           8;
  }
};

struct Counters {
  struct Recent {
    SiteKey key;
    int number;
  };

  std::array<Recent, 256> recent = {};
  std::unordered_map<SiteKey, int, SiteHash> numbers;
  std::vector<SiteKey> keys;                                // of each number
  std::vector<Traffic> traffic;                             // of each number
  std::vector<std::vector<std::vector<Request>>> requests;  // [warp][site], open ones
  std::vector<uintptr_t> units;                             // scratch of visit_units
};

Counters counters;

int find_site(const SiteKey& key) {
  const auto [found, is_new] = counters.numbers.try_emplace(key, int(counters.keys.size()));
  if (is_new) {
    counters.keys.push_back(key);
    counters.traffic.emplace_back();
  }
  return found->second;
}

int site_number(const SiteKey& key) {
  Counters::Recent& recent = counters.recent[SiteHash()(key) % counters.recent.size()];
  if (!(recent.key == key)) recent = {key, find_site(key)};
  return recent.number;
}

// Distinct multiples of size that the lanes touch, in order.
template <typename Visit>
void visit_units(const Request& request, int first_lane, int last_lane, uintptr_t size, const Visit& visit) {
  std::vector<uintptr_t>& units = counters.units;
  units.clear();
  for (int lane = first_lane; lane < last_lane; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uintptr_t last = (request.address[lane] + request.bytes[lane] - 1) / size;
    for (uintptr_t unit = request.address[lane] / size; unit <= last; ++unit) {
      if (units.empty() || units.back() != unit) units.push_back(unit);
    }
  }
  if (!std::is_sorted(units.begin(), units.end())) std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  for (uintptr_t unit : units) visit(unit);
}

int64_t sectors(const Request& request) {
  int64_t count = 0;
  visit_units(request, 0, kWarp, kSectorBytes, [&](uintptr_t) { ++count; });
  return count;
}

// All lanes of 4 bytes go at once, half a warp of 8, a quarter of 16. Each goes in as many passes as the busiest bank
// has distinct words; lanes that read the same word share it.
void add_wavefronts(const Request& request, int bytes, Traffic& traffic) {
  const int together = bytes <= 4 ? kWarp : bytes <= 8 ? kWarp / 2 : kWarp / 4;
  for (int lane = 0; lane < kWarp; lane += together) {
    std::array<int, kBanks> words = {};
    visit_units(request, lane, lane + together, kBankBytes, [&](uintptr_t word) { ++words[word % kBanks]; });
    const int passes = *std::max_element(words.begin(), words.end());
    traffic.wavefronts += passes;
    traffic.conflicts += std::max(passes - 1, 0);
  }
}

void add_request(const SiteKey& key, const Request& request, Traffic& traffic) {
  int64_t bytes = 0;
  int widest = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    ++traffic.accesses;
    bytes += request.bytes[lane];
    widest = std::max(widest, int(request.bytes[lane]));
  }
  ++traffic.requests;
  traffic.bytes += bytes;
  if (key.space == Space::kGlobal) {
    traffic.sectors += sectors(request);
  } else {
    add_wavefronts(request, widest, traffic);
  }
}

}  // namespace

void count(Thread& thread, uintptr_t address, size_t bytes, Space space, Op op, const void* pc, int buffer) {
  const int site = site_number({pc, space, op, space == Space::kShared ? -1 : buffer});
  if (counters.requests.size() < engine.warps.size()) counters.requests.resize(engine.warps.size());
  auto& sites = counters.requests[thread.warp()];
  if (int(sites.size()) <= site) sites.resize(site + 1);
  if (int(thread.occurrences.size()) <= site) thread.occurrences.resize(site + 1);
  const uint32_t occurrence = thread.occurrences[site]++;
  if (sites[site].size() <= occurrence) sites[site].resize(occurrence + 1);
  Request& request = sites[site][occurrence];
  request.lanes |= 1u << thread.lane();
  request.address[thread.lane()] = address;
  request.bytes[thread.lane()] = uint16_t(bytes);
}

void flush_counters(int warp) {
  if (warp >= int(counters.requests.size())) return;
  auto& sites = counters.requests[warp];
  for (size_t site = 0; site < sites.size(); ++site) {
    for (const Request& request : sites[site]) add_request(counters.keys[site], request, counters.traffic[site]);
    sites[site].clear();
  }
  const int begin = warp * kWarp, end = std::min(begin + kWarp, int(engine.threads.size()));
  for (int i = begin; i < end; ++i)
    std::fill(engine.threads[i].occurrences.begin(), engine.threads[i].occurrences.end(), 0);
}

void finish_counters() {
  std::vector<Site>& sites = engine.report().sites;
  for (size_t i = 0; i < counters.keys.size(); ++i) {
    const SiteKey& key = counters.keys[i];
    sites.push_back({key.pc, key.space, key.op, key.buffer < 0 ? "" : buffer_name(key.buffer), counters.traffic[i]});
  }
  counters = Counters();
}

}  // namespace simt
