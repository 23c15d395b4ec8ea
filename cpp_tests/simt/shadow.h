// The state of every byte of shared and device memory, and the rule when two accesses to it are in conflict.
//
// Time is a phase, which advances at every block barrier and every start of a block, so that it also tells blocks and
// launches apart; within a phase, accesses of one warp are ordered by the vector clocks that __syncwarp joins
// (Thread::seen), and those of two warps are not ordered at all.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine.h"

namespace simt {

enum class Conflict { kNone, kInBlock, kAcrossBlocks };

// The accesses of one sort (reads, or writes and atomics) to one cell that can still matter: the last one, and what
// became of those that it does not follow.
struct Marks {
  enum Flag : uint16_t {
    kManyWarps = 1,    // several warps in this phase
    kOtherBlocks = 2,  // another block than that of the last one, in this launch
    kAtomic = 4,       // the last one was atomic
    kInFlight = 8,     // the last one is a cp.async that was not waited for
  };

  uint32_t phase;   // of the last one; 0: never
  uint32_t clock;   // of its lane
  uint32_t lanes;   // 0, or 1 + the index in Phases::lane_clocks, where several lanes of its warp are unordered
  uint16_t thread;  // linear in its block
  uint16_t flags;   // no padding: cells are compared as bytes
};

// Of bytes that every access so far touched together.
struct Cell {
  Marks reads, writes;
};

struct Phases {
  uint32_t now = 0;
  uint32_t block = 0;   // the block's first
  uint32_t launch = 0;  // the launch's first
  // Clocks of a warp's lanes (0: none) that touched a cell in this phase.
  std::vector<std::array<uint32_t, kWarp>> lane_clocks;

  void start_launch() { launch = now + 1; }
  void start_block() {
    advance();
    block = now;
  }
  void advance() {
    ++now;
    lane_clocks.clear();
  }
  // The first phase that can matter to memory of this kind: shared memory begins anew with each block.
  uint32_t first(Space space) const { return space == Space::kShared ? block : launch; }

  Conflict conflict(const Marks& marks, const Thread& me, uint32_t first_phase) const;
  void record(Marks& marks, const Thread& me, uint32_t first_phase);
  Marks copy(Marks marks);  // for another cell
};

}  // namespace simt
