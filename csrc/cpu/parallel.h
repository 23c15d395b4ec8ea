// The threads of the CPU kernels. The bindings install the thread pool of torch, tests may install another, and without
// one everything runs on the calling thread.
#pragma once

#include <cstdint>
#include <functional>

namespace align::cpu {

using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// Runs body over disjoint ranges, none of them empty, that cover [begin, end), each of at least grain elements (but for
// the last).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, const RangeBody& body);

void set_parallel_for(ParallelFor implementation);

// Kernels must give the same bits for every way of cutting the range.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const RangeBody& body);

}  // namespace align::cpu
