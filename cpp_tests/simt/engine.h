// Inside the engine: the threads of the running block and what the engine's parts ask of each other. Kernels and
// tests never include this.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

constexpr int kWarp = 32;

// A copy that cp.async promised: it happens when its thread waits for its group.
struct PendingCopy {
  char* to;
  const char* from;
  int bytes;         // 4 or 16
  int source_bytes;  // the rest is zero
  int group;
  const void* pc;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

struct Thread {
  int linear;  // in its block, x fastest
  uint3 index;
  State state;
  Fiber fiber;
  // Vector clock over the lanes of its warp: what lane l did before its clock was seen[l] precedes what comes next
  // here.
  uint32_t clock;
  std::array<uint32_t, kWarp> seen;
  std::vector<PendingCopy> copies;
  int open_group;                     // of cp.async, the one that the next commit closes
  std::vector<uint32_t> occurrences;  // of each site since the lanes last met: which of the warp's requests is next

  int lane() const { return linear % kWarp; }
  int warp() const { return linear / kWarp; }
};

enum class Collective { kShuffle, kBallot, kSync, kMma, kMatrixLoad };

// Lanes on their way to one collective. Disjoint masks of a warp have one each.
struct Rendezvous {
  Collective kind;
  unsigned mask;
  unsigned arrived;
  std::array<void*, kWarp> requests;  // on the stacks of the arrived lanes
  Where where;
  const void* pc;
};

// Runs when all lanes have arrived, for all of them.
using Complete = void (*)(Rendezvous& all, Thread* lanes);

struct Engine {
  Options options;
  std::vector<Report> reports;
  std::mt19937_64 random;
  Stacks stacks;
  // the launch
  dim3 grid, block;
  void (*body)(void*);
  void* closure;
  bool aborted;
  int64_t until_preemption;
  // the block
  uint3 block_index;
  std::vector<Thread> threads;
  std::vector<std::vector<Rendezvous>> warps;  // open ones of each warp
  std::vector<int> ready;
  int live, at_barrier;
  Where barrier;  // line of the first that waits
  Thread* current;
  Fiber scheduler;

  Report& report() { return reports.back(); }
};

extern Engine engine;
extern std::mutex engine_mutex;  // held by a launch to its end, and by changes of device memory
// Whether this OS thread is inside a kernel: the hooks of instrumented code look at nothing else, so that host code
// (of any OS thread) and the engine itself may be instrumented too.
extern thread_local bool in_kernel;

// Around everything that a kernel calls.
class EngineScope {
 public:
  EngineScope() { in_kernel = false; }
  ~EngineScope() { in_kernel = true; }
};

// ---- engine.cpp
void add_error(ErrorKind kind, const std::string& message, const void* pc = nullptr, Where where = {nullptr, 0});
void pause();                      // until the scheduler chooses this thread again
[[noreturn]] void abort_launch();  // from a thread: what follows would be undefined
void make_ready(Thread& thread);

// ---- warp.cpp
// Returns after complete has run. A partial warp's mask may name lanes that do not exist.
void meet(Collective kind, unsigned mask, void* request, Where where, const void* pc, Complete complete);
unsigned existing_lanes(int warp);
void report_stuck_lanes();

// ---- memory.cpp
void start_launch_memory(size_t dynamic_shared_bytes);
void start_block_memory();
void advance_phase();  // a block barrier: all before it precedes all after it
// Checks an access of the current thread and counts it.
void access(uintptr_t address, size_t bytes, Op op, const void* pc, bool aligned);
// Counts, and checks all but what other threads do.
void count_access(uintptr_t address, size_t bytes, Op op, const void* pc);
// Checks without counting.
void check(const Thread& thread, uintptr_t address, size_t bytes, Op op, const void* pc);
// A write that cp.async will do: checked now, forbidden to all from now on, and done at the time of the second call.
void start_copy_write(const Thread& thread, uintptr_t address, size_t bytes, const void* pc);
void finish_copy_write(const Thread& thread, uintptr_t address, size_t bytes);
bool is_shared(uintptr_t address);
const std::string& buffer_name(int buffer);

// ---- counters.cpp
void count(Thread& thread, uintptr_t address, size_t bytes, Space space, Op op, const void* pc, int buffer);
void flush_counters(int warp);  // its lanes have met, or ended
void finish_counters();         // into the report

}  // namespace simt
