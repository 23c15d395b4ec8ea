// Questions to a Report.
#include "report.h"

#include <cstdio>
#include <dlfcn.h>

namespace simt {

const char* name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kSharedRace:
      return "race in shared memory";
    case ErrorKind::kGlobalRace:
      return "race in global memory";
    case ErrorKind::kBlockConflict:
      return "conflict of blocks";
    case ErrorKind::kOutOfBounds:
      return "out of bounds";
    case ErrorKind::kMisaligned:
      return "misaligned";
    case ErrorKind::kUninitialised:
      return "uninitialised";
    case ErrorKind::kDivergentBarrier:
      return "divergent barrier";
    case ErrorKind::kDivergentWarp:
      return "divergent warp";
    case ErrorKind::kBadMask:
      return "bad mask";
    case ErrorKind::kDeadlock:
      return "deadlock";
    case ErrorKind::kAsyncHazard:
      return "cp.async hazard";
    case ErrorKind::kTrap:
      return "trap";
    case ErrorKind::kBadLaunch:
      return "bad launch";
  }
  return "";
}

Traffic& Traffic::operator+=(const Traffic& other) {
  accesses += other.accesses;
  requests += other.requests;
  bytes += other.bytes;
  sectors += other.sectors;
  wavefronts += other.wavefronts;
  conflicts += other.conflicts;
  return *this;
}

bool Report::has(ErrorKind kind) const {
  for (const Error& error : errors) {
    if (error.kind == kind) return true;
  }
  return false;
}

Traffic Report::global(Op op, const std::string& buffer) const {
  Traffic sum;
  for (const Site& site : sites) {
    if (site.space == Space::kGlobal && site.op == op && (buffer.empty() || site.buffer == buffer)) sum += site.traffic;
  }
  return sum;
}

Traffic Report::shared(Op op) const {
  Traffic sum;
  for (const Site& site : sites) {
    if (site.space == Space::kShared && site.op == op) sum += site.traffic;
  }
  return sum;
}

std::string source_line(const void* pc) {
  Dl_info module;
  if (pc == nullptr || dladdr(pc, &module) == 0) return "";
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(module.dli_fbase);
  char text[1024];
  // pc is the return address: the access itself lies before it.
  std::snprintf(text, sizeof text, "addr2line -e '%s' %#zx 2>/dev/null", module.dli_fname, offset - 1);
  std::FILE* pipe = popen(text, "r");
  if (pipe == nullptr) return "";
  std::string line = std::fgets(text, sizeof text, pipe) ? text : "";
  pclose(pipe);
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return line;
}

std::string describe(const Report& report) {
  std::string text;
  for (const Error& error : report.errors) {
    const uint3 b = error.block;
    text += std::string(name(error.kind)) + ": " + error.message + " [block " + std::to_string(b.x) + "," +
            std::to_string(b.y) + "," + std::to_string(b.z) + " thread " + std::to_string(error.thread) + ", " +
            std::to_string(error.count) + " times, " + (error.source.empty() ? source_line(error.pc) : error.source) +
            "]\n";
  }
  return text;
}

}  // namespace simt
