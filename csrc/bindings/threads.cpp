// The CPU kernels run on torch's threads (torch.set_num_threads).
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace align {
namespace {

void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, const cpu::RangeBody& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}

[[maybe_unused]] const bool kInstalled = (cpu::set_parallel_for(torch_parallel_for), true);

}  // namespace
}  // namespace align
