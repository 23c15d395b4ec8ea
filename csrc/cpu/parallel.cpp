#include "cpu/parallel.h"

namespace align::cpu {
namespace {

void run_serially(int64_t begin, int64_t end, int64_t, const RangeBody& body) { body(begin, end); }

ParallelFor installed = run_serially;

}  // namespace

void set_parallel_for(ParallelFor implementation) { installed = implementation ? implementation : run_serially; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, const RangeBody& body) {
  if (begin < end) installed(begin, end, grain, body);
}

}  // namespace align::cpu
