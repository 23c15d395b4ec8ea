// Launches, the scheduler and the block barrier. Blocks run one after the other in a random order; the threads of a
// block are fibers, of which a random one that can go on is chosen whenever one waits or is preempted.
#include "engine.h"

#include <algorithm>
#include <numeric>

namespace simt {

Engine engine;
std::mutex engine_mutex;
thread_local bool in_kernel = false;

namespace {

constexpr size_t kMaxErrors = 64;
constexpr int64_t kMaxThreads = 1024, kMaxGridYz = 65535;
constexpr size_t kMaxShared = 227 << 10;

uint3 coordinates(unsigned linear, dim3 size) {
  return {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
}

void thread_main() {
  in_kernel = true;
  engine.body(engine.closure);
  in_kernel = false;
  Thread& me = *engine.current;
  if (!me.copies.empty()) {
    add_error(ErrorKind::kAsyncHazard, "thread ends with a cp.async that it never waited for", me.copies[0].pc);
  }
  me.state = State::kDone;
  --engine.live;
  for (;;) switch_fiber(me.fiber, engine.scheduler);
}

void start_thread(int i) {
  Thread& thread = engine.threads[i];
  thread.linear = i;
  thread.index = coordinates(unsigned(i), engine.block);
  thread.clock = 1;
  thread.seen.fill(0);
  thread.copies.clear();
  thread.open_group = 0;
  thread.occurrences.clear();
  const size_t stagger = size_t(i % 32) * 128;  // else all stacks compete for the same lines of the cache
  prepare(thread.fiber, engine.stacks.stack(i), Stacks::kBytes - stagger, thread_main);
  make_ready(thread);
}

void start_block(unsigned linear) {
  engine.block_index = coordinates(linear, engine.grid);
  engine.live = int(engine.threads.size());
  engine.at_barrier = 0;
  engine.ready.clear();
  for (auto& open : engine.warps) open.clear();
  start_block_memory();
  for (int i = 0; i < engine.live; ++i) start_thread(i);
}

// A random one of the threads that can go on.
void step() {
  const size_t choice = engine.random() % engine.ready.size();
  Thread& next = engine.threads[engine.ready[choice]];
  engine.ready[choice] = engine.ready.back();
  engine.ready.pop_back();
  engine.current = &next;
  ++engine.report().switches;
  switch_fiber(engine.scheduler, next.fiber);
}

// Nobody can go on: either all wait at the barrier, which opens, or they are stuck.
bool open_barrier() {
  if (engine.at_barrier == 0 || engine.at_barrier < engine.live) return false;
  const int ended = int(engine.threads.size()) - engine.live;
  if (ended > 0) {
    add_error(ErrorKind::kDivergentBarrier, std::to_string(ended) + " threads ended without this __syncthreads",
              nullptr, engine.barrier);
  }
  advance_phase();
  for (size_t warp = 0; warp < engine.warps.size(); ++warp) flush_counters(int(warp));
  engine.at_barrier = 0;
  for (Thread& thread : engine.threads) {
    if (thread.state == State::kAtBarrier) make_ready(thread);
  }
  return true;
}

void report_deadlock() {
  engine.current = nullptr;
  report_stuck_lanes();
  add_error(ErrorKind::kDeadlock, std::to_string(engine.at_barrier) + " threads wait at a __syncthreads, " +
                                      std::to_string(engine.live - engine.at_barrier) + " for lanes of their warp");
  engine.aborted = true;
}

void run_block(unsigned linear) {
  start_block(linear);
  while (!engine.aborted && engine.live > 0) {
    if (!engine.ready.empty()) {
      step();
    } else if (!open_barrier()) {
      report_deadlock();
    }
  }
  for (size_t warp = 0; warp < engine.warps.size(); ++warp) flush_counters(int(warp));
  engine.current = nullptr;
}

bool valid(dim3 grid, dim3 block, size_t shared_bytes) {
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < (1u << 31) && grid.y <= kMaxGridYz &&
         grid.z <= kMaxGridYz && threads > 0 && threads <= kMaxThreads && block.z <= 64 && shared_bytes <= kMaxShared;
}

}  // namespace

void add_error(ErrorKind kind, const std::string& message, const void* pc, Where where) {
  std::vector<Error>& errors = engine.report().errors;
  const std::string source = where.file ? std::string(where.file) + ":" + std::to_string(where.line) : "";
  for (Error& error : errors) {
    if (error.kind == kind && error.pc == pc && error.source == source) {
      ++error.count;
      return;
    }
  }
  if (errors.size() == kMaxErrors) return;
  const int thread = engine.current ? engine.current->linear : -1;
  errors.push_back({kind, message, engine.block_index, thread, pc, source, 1});
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  engine.ready.push_back(thread.linear);
}

void pause() { switch_fiber(engine.current->fiber, engine.scheduler); }

void abort_launch() {
  engine.aborted = true;
  for (;;) pause();
}

void sync_block(Where where) {
  EngineScope scope;
  if (engine.at_barrier == 0) engine.barrier = where;
  if (engine.barrier.line != where.line) {
    add_error(ErrorKind::kDivergentBarrier, "others wait at line " + std::to_string(engine.barrier.line), nullptr,
              where);
  }
  ++engine.at_barrier;
  engine.current->state = State::kAtBarrier;
  pause();
}

void require(bool condition) {
  if (condition) return;
  EngineScope scope;
  add_error(ErrorKind::kTrap, "a require() does not hold", __builtin_return_address(0));
  abort_launch();
}

uint3 thread_index() { return engine.current->index; }
uint3 block_index() { return engine.block_index; }
dim3 block_dim() { return engine.block; }
dim3 grid_dim() { return engine.grid; }

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* closure) {
  const std::lock_guard<std::mutex> lock(engine_mutex);
  engine.reports.emplace_back();
  Report& report = engine.report();
  report.grid = grid, report.block = block, report.shared_bytes = shared_bytes;
  engine.grid = grid, engine.block = block, engine.body = body, engine.closure = closure;
  engine.aborted = false, engine.current = nullptr, engine.block_index = {0, 0, 0};
  if (!valid(grid, block, shared_bytes)) {
    add_error(ErrorKind::kBadLaunch, "a grid or block that is empty or too large, or too much shared memory");
    return;
  }
  const int threads = int(block.x * block.y * block.z);
  engine.random.seed(engine.options.seed);
  engine.until_preemption = engine.options.preempt_every;
  engine.threads.resize(threads);
  engine.warps.resize((threads + kWarp - 1) / kWarp);
  engine.stacks.reserve(threads);
  start_launch_memory(shared_bytes);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), engine.random);
  for (size_t i = 0; i < order.size() && !engine.aborted; ++i) run_block(order[i]);
  finish_counters();
}

Options& options() { return engine.options; }
std::vector<Report>& reports() { return engine.reports; }

}  // namespace simt
