// Where an address lies, and what is wrong with an access to it.
#include <bit>
#include <cstdlib>
#include <link.h>
#include <map>
#include <memory>
#include <mutex>
#include <span>

#include "engine.h"
#include "shadow.h"

namespace simt {
namespace {

constexpr size_t kRedZone = 256;
constexpr size_t kSharedAlignment = 128;
constexpr int kLargestGrain = 4;          // the widest access has 16 bytes
constexpr unsigned char kGarbage = 0xff;  // NaN in every floating-point type

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that threads share, with a cell for each 2^grain bytes: no access has begun or ended inside of these.
struct Region {
  uintptr_t begin = 0;
  size_t bytes = 0;
  Space space = Space::kGlobal;
  int buffer = 0;            // number of its name
  bool initialised = false;  // before the first launch
  int grain = kLargestGrain;
  std::unique_ptr<Cell[], Free> cells;

  bool holds(uintptr_t address) const { return address - begin < bytes; }
  void forget() {
    cells.reset();
    grain = kLargestGrain;
  }
  // The cells of an access.
  std::span<Cell> cells_of(uintptr_t address, size_t access_bytes, Phases& phases) {
    const size_t offset = address - begin;
    const int fits = std::countr_zero(offset | access_bytes | size_t(1) << grain);
    if (cells == nullptr) cells = new_cells(grain = fits);
    if (fits < grain) divide(fits, phases);
    return {&cells[offset >> grain], access_bytes >> grain};
  }

 private:
  // calloc: pages of cells that nothing touches cost nothing.
  std::unique_ptr<Cell[], Free> new_cells(int of_grain) const {
    return std::unique_ptr<Cell[], Free>(static_cast<Cell*>(std::calloc((bytes >> of_grain) + 1, sizeof(Cell))));
  }
  void divide(int into, Phases& phases) {
    auto parts = new_cells(into);
    for (size_t i = 0; i << into < bytes; ++i) {
      const Cell& whole = cells[i >> (grain - into)];
      if (whole.reads.phase > 0 || whole.writes.phase > 0) {
        parts[i] = {phases.copy(whole.reads), phases.copy(whole.writes)};
      }
    }
    cells = std::move(parts);
    grain = into;
  }
};

struct Memory {
  Phases phases;
  std::map<uintptr_t, Region> global;  // by begin
  std::map<std::string, int> numbers;  // of buffers' names
  std::vector<std::string> names;      // by number
  Region static_shared, dynamic_shared;
  std::vector<char> dynamic_bytes;
  Region* last = nullptr;  // where the last access went
};

Memory memory;

Region* find_global(uintptr_t address) {
  auto next = memory.global.upper_bound(address);
  if (next == memory.global.begin()) return nullptr;
  Region& region = (--next)->second;
  return region.holds(address) ? &region : nullptr;
}

Region* find(uintptr_t address) {
  if (memory.last != nullptr && memory.last->holds(address)) return memory.last;
  Region* found = memory.static_shared.holds(address)    ? &memory.static_shared
                  : memory.dynamic_shared.holds(address) ? &memory.dynamic_shared
                                                         : find_global(address);
  if (found != nullptr) memory.last = found;
  return found;
}

// `static thread_local` variables of the module that the engine is linked into, for this OS thread.
void find_static_shared() {
  asm volatile("" : : "r"(&in_kernel));  // a thread's segment of a shared library comes into being at the first use
  const auto visit = [](dl_phdr_info* module, size_t, void*) {
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      if (header.p_type != PT_TLS || module->dlpi_tls_data == nullptr) continue;
      const auto begin = reinterpret_cast<uintptr_t>(module->dlpi_tls_data);
      if (reinterpret_cast<uintptr_t>(&in_kernel) - begin >= header.p_memsz) continue;
      memory.static_shared.begin = begin;
      memory.static_shared.bytes = header.p_memsz;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, nullptr);
  memory.static_shared.space = Space::kShared;
  memory.static_shared.forget();
}

std::string place(const Region& region, uintptr_t address) {
  const std::string offset = "byte " + std::to_string(address - region.begin);
  return offset + (region.space == Space::kShared ? " of shared memory" : " of " + buffer_name(region.buffer));
}

const char* name(Op op) { return op == Op::kLoad ? "read" : op == Op::kStore ? "write" : "atomic"; }

void add_conflict(Conflict conflict, const Marks& other, const char* other_op, const Region& region, uintptr_t address,
                  Op op, const void* pc) {
  const bool across = conflict == Conflict::kAcrossBlocks;
  const ErrorKind kind = across                           ? ErrorKind::kBlockConflict
                         : region.space == Space::kShared ? ErrorKind::kSharedRace
                                                          : ErrorKind::kGlobalRace;
  add_error(kind,
            std::string(name(op)) + " of " + place(region, address) + ", unordered with a " + other_op + " by thread " +
                std::to_string(other.thread) + (across ? " of another block" : ""),
            pc);
}

// Checks a cell of an access; returns true if there is an error.
bool check_cell(const Cell& cell, const Thread& me, Region& region, uintptr_t address, Op op, const void* pc) {
  const uint32_t first = memory.phases.first(region.space);
  const bool written = cell.writes.phase >= (region.space == Space::kShared ? first : 1);
  if (cell.writes.phase >= first && (cell.writes.flags & Marks::kInFlight)) {
    add_error(ErrorKind::kAsyncHazard,
              std::string(name(op)) + " of " + place(region, address) + " under a cp.async of thread " +
                  std::to_string(cell.writes.thread) + " that was not waited for",
              pc);
    return true;
  }
  if (op != Op::kStore && !written && !region.initialised) {
    add_error(ErrorKind::kUninitialised, std::string(name(op)) + " of " + place(region, address), pc);
    return true;
  }
  if (op != Op::kAtomic || !(cell.writes.flags & Marks::kAtomic)) {
    if (const Conflict conflict = memory.phases.conflict(cell.writes, me, first); conflict != Conflict::kNone) {
      add_conflict(conflict, cell.writes, "write", region, address, op, pc);
      return true;
    }
  }
  if (op != Op::kLoad) {
    if (const Conflict conflict = memory.phases.conflict(cell.reads, me, first); conflict != Conflict::kNone) {
      add_conflict(conflict, cell.reads, "read", region, address, op, pc);
      return true;
    }
  }
  return false;
}

bool same(const Cell& a, const Cell& b) { return std::memcmp(&a, &b, sizeof(Cell)) == 0; }

// Reports the first wrong cell, and remembers all. An atomic is remembered as a write: both sorts conflict with all
// but another atomic, which check_cell tells by the flag. Cells with the same past have the same verdict and the same
// future, unless they need lane_clocks of their own: most accesses cost one cell.
void check_bytes(const Thread& me, Region& region, uintptr_t address, size_t bytes, Op op, uint16_t flags,
                 const void* pc) {
  const std::span<Cell> cells = region.cells_of(address, bytes, memory.phases);
  const uint32_t first = memory.phases.first(region.space);
  Cell past{}, future{};
  bool wrong = false;
  for (size_t i = 0; i < cells.size(); ++i) {
    Cell& cell = cells[i];
    if (i > 0 && future.reads.lanes == 0 && future.writes.lanes == 0 && same(cell, past)) {
      cell = future;
      continue;
    }
    const bool has_next = i + 1 < cells.size();  // a copy just after its parts were written takes long
    if (has_next) past = cell;
    wrong = wrong || check_cell(cell, me, region, address + (i << region.grain), op, pc);
    Marks& marks = op == Op::kLoad ? cell.reads : cell.writes;
    memory.phases.record(marks, me, first);
    marks.flags |= flags;
    if (has_next) future = cell;
  }
}

// The region that holds all of the access. There is no going on without one: the access itself comes next.
Region& find_or_abort(uintptr_t address, size_t bytes, Op op, const void* pc) {
  Region* region = find(address);
  if (region != nullptr && address + bytes <= region->begin + region->bytes) return *region;
  std::string where = region ? ", at the end of " + place(*region, address) : std::string(", in no device memory");
  if (engine.stacks.owner(address) >= 0) where = ", in local memory of another thread";
  if (Region* before = find_global(address - kRedZone); region == nullptr && before != nullptr) {
    where += ", " + std::to_string(address - before->begin - before->bytes) + " bytes past the end of " +
             buffer_name(before->buffer);
  }
  add_error(ErrorKind::kOutOfBounds, std::to_string(bytes) + "-byte " + name(op) + where, pc);
  abort_launch();
}

void preempt() {
  engine.until_preemption = 1 + int64_t(engine.random() % (2 * uint64_t(engine.options.preempt_every)));
  make_ready(*engine.current);
  pause();
}

Region& prepare_access(uintptr_t address, size_t bytes, Op op, const void* pc, bool aligned) {
  if (engine.options.preempt_every > 0 && --engine.until_preemption <= 0) preempt();
  if (++engine.report().accesses > engine.options.access_limit) {
    add_error(ErrorKind::kDeadlock, "more accesses than the limit: threads may wait for each other in a loop", pc);
    abort_launch();
  }
  Region& region = find_or_abort(address, bytes, op, pc);
  if (aligned && address % bytes != 0) {
    add_error(ErrorKind::kMisaligned, std::to_string(bytes) + "-byte " + name(op) + " of " + place(region, address),
              pc);
    abort_launch();  // the processor would refuse it too
  }
  return region;
}

void add_region(uintptr_t begin, size_t bytes, const std::string& name, bool initialised) {
  const std::lock_guard<std::mutex> lock(engine_mutex);
  const auto [number, is_new] = memory.numbers.try_emplace(name, int(memory.names.size()));
  if (is_new) memory.names.push_back(name);
  memory.global[begin] = Region{begin, bytes, Space::kGlobal, number->second, initialised, kLargestGrain, nullptr};
  memory.last = nullptr;
}

void remove_region(uintptr_t begin) {
  const std::lock_guard<std::mutex> lock(engine_mutex);
  memory.global.erase(begin);
  memory.last = nullptr;
}

}  // namespace

const std::string& buffer_name(int buffer) { return memory.names[buffer]; }

bool is_shared(uintptr_t address) {
  return memory.static_shared.holds(address) || memory.dynamic_shared.holds(address);
}

void start_launch_memory(size_t dynamic_shared_bytes) {
  memory.last = nullptr;
  memory.phases.start_launch();
  find_static_shared();
  memory.dynamic_bytes.assign(dynamic_shared_bytes + kSharedAlignment, 0);
  const auto begin = reinterpret_cast<uintptr_t>(memory.dynamic_bytes.data());
  memory.dynamic_shared.begin = (begin + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  memory.dynamic_shared.bytes = dynamic_shared_bytes;
  memory.dynamic_shared.space = Space::kShared;
  memory.dynamic_shared.forget();
}

void start_block_memory() {
  memory.phases.start_block();
  std::memset(reinterpret_cast<void*>(memory.dynamic_shared.begin), kGarbage, memory.dynamic_shared.bytes);
}

void advance_phase() { memory.phases.advance(); }

void* dynamic_shared() { return reinterpret_cast<void*>(memory.dynamic_shared.begin); }

void check(const Thread& thread, uintptr_t address, size_t bytes, Op op, const void* pc) {
  Region& region = find_or_abort(address, bytes, op, pc);
  check_bytes(thread, region, address, bytes, op, op == Op::kAtomic ? Marks::kAtomic : 0, pc);
}

void start_copy_write(const Thread& thread, uintptr_t address, size_t bytes, const void* pc) {
  Region& region = find_or_abort(address, bytes, Op::kStore, pc);
  check_bytes(thread, region, address, bytes, Op::kStore, Marks::kInFlight, pc);
}

void finish_copy_write(const Thread& thread, uintptr_t address, size_t bytes) {
  Region& region = *find(address);
  for (Cell& cell : region.cells_of(address, bytes, memory.phases)) {
    memory.phases.record(cell.writes, thread, memory.phases.block);
  }
}

void access(uintptr_t address, size_t bytes, Op op, const void* pc, bool aligned) {
  Thread& me = *engine.current;
  if (engine.stacks.owner(address) == me.linear) return;  // registers and local memory
  Region& region = prepare_access(address, bytes, op, pc, aligned);
  check_bytes(me, region, address, bytes, op, op == Op::kAtomic ? Marks::kAtomic : 0, pc);
  if (engine.options.traffic) count(me, address, bytes, region.space, op, pc, region.buffer);
}

void count_access(uintptr_t address, size_t bytes, Op op, const void* pc) {
  Region& region = prepare_access(address, bytes, op, pc, true);
  if (engine.options.traffic) count(*engine.current, address, bytes, region.space, op, pc, region.buffer);
}

void atomic_access(const void* address, unsigned bytes, const void* pc) {
  EngineScope scope;
  access(reinterpret_cast<uintptr_t>(address), bytes, Op::kAtomic, pc, true);
}

void device_register(void* begin, size_t bytes, const std::string& name, bool initialised) {
  add_region(reinterpret_cast<uintptr_t>(begin), bytes, name, initialised);
}

void device_unregister(void* begin) { remove_region(reinterpret_cast<uintptr_t>(begin)); }

void* device_alloc(size_t bytes, const std::string& name, bool initialised) {
  const size_t padded = (bytes + kRedZone - 1) / kRedZone * kRedZone + 2 * kRedZone;
  char* block = static_cast<char*>(std::aligned_alloc(kRedZone, padded));
  std::memset(block, kGarbage, padded);
  add_region(reinterpret_cast<uintptr_t>(block + kRedZone), bytes, name, initialised);
  return block + kRedZone;
}

void device_free(void* begin) {
  remove_region(reinterpret_cast<uintptr_t>(begin));
  std::free(static_cast<char*>(begin) - kRedZone);
}

}  // namespace simt
