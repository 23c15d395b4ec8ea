#include "shadow.h"

namespace simt {

Conflict Phases::conflict(const Marks& marks, const Thread& me, uint32_t first_phase) const {
  if (marks.phase < first_phase) return Conflict::kNone;
  if (marks.phase < block || (marks.flags & Marks::kOtherBlocks)) return Conflict::kAcrossBlocks;
  if (marks.phase < now) return Conflict::kNone;
  if ((marks.flags & Marks::kManyWarps) || marks.thread / kWarp != me.warp()) return Conflict::kInBlock;
  if (marks.lanes == 0) {
    const bool ordered = marks.thread == me.linear || marks.clock < me.seen[marks.thread % kWarp];
    return ordered ? Conflict::kNone : Conflict::kInBlock;
  }
  const auto& clocks = lane_clocks[marks.lanes - 1];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lane != me.lane() && clocks[lane] > 0 && clocks[lane] >= me.seen[lane]) return Conflict::kInBlock;
  }
  return Conflict::kNone;
}

// Forgets what every later access follows anyway.
void Phases::record(Marks& marks, const Thread& me, uint32_t first_phase) {
  if (marks.phase < first_phase) {
    marks.flags = 0;
    marks.lanes = 0;
  } else if (marks.phase < block) {
    marks.flags = Marks::kOtherBlocks;
    marks.lanes = 0;
  } else if (marks.phase < now) {
    marks.flags &= Marks::kOtherBlocks;
    marks.lanes = 0;
  } else {
    marks.flags &= Marks::kOtherBlocks | Marks::kManyWarps;
    if (marks.thread / kWarp != me.warp()) {
      marks.flags |= Marks::kManyWarps;
      marks.lanes = 0;
    } else if (marks.lanes == 0 && marks.thread != me.linear && marks.clock >= me.seen[marks.thread % kWarp]) {
      lane_clocks.push_back({});
      lane_clocks.back()[marks.thread % kWarp] = marks.clock;
      marks.lanes = uint32_t(lane_clocks.size());
    }
    if (marks.lanes > 0) lane_clocks[marks.lanes - 1][me.lane()] = me.clock;
  }
  marks.phase = now;
  marks.clock = me.clock;
  marks.thread = uint16_t(me.linear);
}

Marks Phases::copy(Marks marks) {
  if (marks.phase == now && marks.lanes > 0) {
    const auto clocks = lane_clocks[marks.lanes - 1];
    lane_clocks.push_back(clocks);
    marks.lanes = uint32_t(lane_clocks.size());
  }
  return marks;
}

}  // namespace simt
