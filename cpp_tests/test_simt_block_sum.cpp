// block_sum of csrc/cuda/launch.cuh, called repeatedly by one kernel as its contract allows.
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "simt_support.h"

using namespace align;
using simt::Buffer;

namespace {

// Sums x, then x^2, and lets every thread write what it received.
template <typename A>
__global__ void two_sums_kernel(const A* x, A* sums) {
  const A value = x[threadIdx.x];
  const A first = cuda::block_sum(value);
  const A second = cuda::block_sum(value * value);
  sums[2 * threadIdx.x] = first;
  sums[2 * threadIdx.x + 1] = second;
}

template <typename A>
void check_two_sums(int threads) {
  std::vector<A> values(threads), want;
  A sum = 0, squares = 0;
  for (int i = 0; i < threads; ++i) {
    values[i] = A(i % 37 - 11);
    sum += values[i];
    squares += values[i] * values[i];
  }
  for (int i = 0; i < threads; ++i) want.insert(want.end(), {sum, squares});  // integers: exact in any order
  test::for_each_order([&] {
    Buffer<A> x("x", values), sums("sums", 2 * values.size());
    cuda::launch(two_sums_kernel<A>, 1, dim3(unsigned(threads)), 0, nullptr, static_cast<const A*>(x.data()),
                 sums.data());
    CHECK(test::clean());
    CHECK(sums.host() == want);
  });
}

}  // namespace

TEST(block_sum_may_be_called_again_at_once) {
  for (int threads : {32, 96, 256, 1024}) {
    check_two_sums<float>(threads);
    check_two_sums<double>(threads);
  }
}

int main() { return check::run_tests(); }
