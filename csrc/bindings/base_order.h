// Whether the frozen product or the low-rank term is computed first; the other one is added to it.
//
// The kernels can add the term to the product, or write the term (with the bias), in which the product is then
// accumulated (beta = 1). The second order neither writes y, and dx, a second time nor has the kernels read them.
#pragma once

#include <atomic>

namespace align {

// Of kernels on CUDA. `make gpu-check` measures both orders.
inline std::atomic<bool> low_rank_first_on_cuda{true};

// On a CPU a block of rows of the product is still in cache when the kernels add to it.
template <class Device>
bool low_rank_first() {
  return Device::kCuda && low_rank_first_on_cuda;
}

}  // namespace align
