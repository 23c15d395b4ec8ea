// Collectives of a warp: lanes wait until all that their mask names have called with the same mask. Several may be
// open at once in a warp. None but __syncwarp orders memory.
#include <algorithm>
#include <cstdio>

#include "engine.h"

namespace simt {
namespace {

const char* name(Collective kind) {
  switch (kind) {
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kBallot:
      return "vote";
    case Collective::kSync:
      return "__syncwarp";
    case Collective::kMma:
      return "mma";
    case Collective::kMatrixLoad:
      return "ldmatrix";
  }
  return "";
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// The open rendezvous that the current thread's call belongs to, or null.
Rendezvous* find_open(std::vector<Rendezvous>& open, Collective kind, unsigned mask, Where where, const void* pc) {
  for (Rendezvous& each : open) {
    if (each.mask != mask) continue;
    if (each.kind == kind) return &each;
    add_error(ErrorKind::kDivergentWarp,
              std::string("lanes of mask ") + hex(mask) + " meet at a " + name(kind) + " and a " + name(each.kind), pc,
              where);
    abort_launch();
  }
  return nullptr;
}

struct ShuffleRequest {
  uint64_t value;
  int source;
  uint64_t result;
};

struct BallotRequest {
  bool predicate;
  unsigned result;
};

void complete_shuffle(Rendezvous& all, Thread*) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(all.arrived >> lane & 1)) continue;
    auto* request = static_cast<ShuffleRequest*>(all.requests[lane]);
    if (!(all.arrived >> request->source & 1)) {
      add_error(ErrorKind::kBadMask,
                "lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(request->source) +
                    ", which is not in mask " + hex(all.mask),
                all.pc, all.where);
      request->result = ~request->value;  // undefined, so at least not what was hoped for
      continue;
    }
    request->result = static_cast<const ShuffleRequest*>(all.requests[request->source])->value;
  }
}

void complete_ballot(Rendezvous& all, Thread*) {
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (all.arrived >> lane & 1) votes |= unsigned(static_cast<BallotRequest*>(all.requests[lane])->predicate) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (all.arrived >> lane & 1) static_cast<BallotRequest*>(all.requests[lane])->result = votes;
  }
}

// All that the lanes did, or knew to precede them, precedes all that each of them does next.
void complete_sync(Rendezvous& all, Thread* lanes) {
  std::array<uint32_t, kWarp> merged = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(all.arrived >> lane & 1)) continue;
    for (int l = 0; l < kWarp; ++l) merged[l] = std::max(merged[l], lanes[lane].seen[l]);
    merged[lane] = std::max(merged[lane], ++lanes[lane].clock);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (all.arrived >> lane & 1) lanes[lane].seen = merged;
  }
}

// Lanes beyond the ends of a segment keep their own value.
int shuffle_source(Shuffle mode, int lane, int argument, int width) {
  const int segment = lane & ~(width - 1);
  int source = lane;
  switch (mode) {
    case Shuffle::kIndex:
      return segment | (argument & (width - 1));
    case Shuffle::kUp:
      source = lane - argument;
      return source < segment ? lane : source;
    case Shuffle::kDown:
      source = lane + argument;
      return source >= segment + width ? lane : source;
    case Shuffle::kXor:
      source = lane ^ argument;
      return source >= segment + width ? lane : source;
  }
  return lane;
}

}  // namespace

unsigned existing_lanes(int warp) {
  const int lanes = std::min(int(engine.threads.size()) - warp * kWarp, kWarp);
  return lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
}

void meet(Collective kind, unsigned mask, void* request, Where where, const void* pc, Complete complete) {
  Thread& me = *engine.current;
  if (!(mask >> me.lane() & 1)) {
    add_error(ErrorKind::kBadMask, std::string("lane calls a ") + name(kind) + " whose mask " + hex(mask) + " omits it",
              pc, where);
    abort_launch();
  }
  std::vector<Rendezvous>& open = engine.warps[me.warp()];
  Rendezvous* mine = find_open(open, kind, mask, where, pc);
  if (mine == nullptr) mine = &open.emplace_back(Rendezvous{kind, mask, 0, {}, where, pc});
  mine->arrived |= 1u << me.lane();
  mine->requests[me.lane()] = request;
  const unsigned existing = existing_lanes(me.warp());
  if (mine->arrived != (mask & existing)) {
    me.state = State::kAtCollective;
    return pause();
  }
  Rendezvous all = *mine;
  open.erase(open.begin() + (mine - open.data()));
  if (all.arrived == existing) flush_counters(me.warp());
  Thread* lanes = &engine.threads[me.warp() * kWarp];
  complete(all, lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((all.arrived >> lane & 1) && lane != me.lane()) make_ready(lanes[lane]);
  }
}

void report_stuck_lanes() {
  for (size_t warp = 0; warp < engine.warps.size(); ++warp) {
    for (const Rendezvous& each : engine.warps[warp]) {
      const unsigned missing = each.mask & existing_lanes(int(warp)) & ~each.arrived;
      add_error(ErrorKind::kBadMask,
                "lanes " + hex(each.arrived) + " of warp " + std::to_string(warp) + " wait at a " + name(each.kind) +
                    " for lanes " + hex(missing) + ", which do not come",
                each.pc, each.where);
    }
  }
}

void sync_warp(unsigned mask, Where where) {
  EngineScope scope;
  meet(Collective::kSync, mask, nullptr, where, nullptr, complete_sync);
}

uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int argument, int width, Where where) {
  EngineScope scope;
  ShuffleRequest request{value, shuffle_source(mode, engine.current->lane(), argument, width), 0};
  meet(Collective::kShuffle, mask, &request, where, nullptr, complete_shuffle);
  return request.result;
}

unsigned ballot(unsigned mask, bool predicate, Where where) {
  EngineScope scope;
  BallotRequest request{predicate, 0};
  meet(Collective::kBallot, mask, &request, where, nullptr, complete_ballot);
  return request.result;
}

}  // namespace simt
