// The SIMT engine must catch threads that part where they must meet, in blocks of several warps and every thread order,
// and must not complain about the same kernel without the fault.
#include <utility>

#include "check.h"
#include "simt_support.h"

using namespace align;
using simt::ErrorKind;
using test::caught;
using test::check_fault;
using test::clean;
using test::for_each_order;
using test::run;

namespace {

constexpr int kThreads = test::kFaultThreads;
constexpr unsigned kAll = 0xffffffffu;

__global__ void copy_beyond_kernel(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

template <bool kFault>
__global__ void divergent_barrier_kernel(const float* x, float* out) {
  if (kFault && threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
  } else {
    out[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
  }
}

template <bool kFault>
__global__ void early_exit_kernel(const float* x, float* out) {
  if (kFault && threadIdx.x >= 100) return;
  __syncthreads();
  if (!kFault && threadIdx.x >= 100) return;
  out[threadIdx.x] = x[threadIdx.x];
}

template <bool kFault>
__global__ void deadlock_kernel(const float* x, float* out) {
  if (kFault && threadIdx.x == 70) {
    __syncwarp();
    __syncthreads();
  } else {
    __syncthreads();
    __syncwarp();
  }
  out[threadIdx.x] = x[threadIdx.x];
}

template <bool kFault>
__global__ void absent_lane_kernel(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kFault ? kAll : 0xffffu, value, 1);
  out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void source_lane_kernel(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffffu, value, kFault ? 16 : 1);
  out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void omitted_caller_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x] + float(__ballot_sync(kFault ? 0x7fffffffu : kAll, threadIdx.x % 2));
}

template <bool kFault>
__global__ void divergent_warp_kernel(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (kFault && threadIdx.x % 2) {
    __syncwarp();
  } else {
    value = __shfl_xor_sync(kAll, value, 1);
  }
  out[threadIdx.x] = value;
}

// The last thread waits for what the first one sets.
template <bool kFault>
__global__ void spin_kernel(const float*, float* out) {
  if (threadIdx.x == 0 && !kFault) atomicAdd(out, 1.f);
  if (threadIdx.x == kThreads - 1) {
    while (atomicAdd(out, 0.f) == 0) {
    }
  }
}

// Every lane sends its number in segments of 8, as a double with digits in both halves; four results a thread.
__global__ void shuffle_kernel(const float*, float* out) {
  const double sent = threadIdx.x % 32 + 0x1p-40;
  const double received[4] = {__shfl_sync(kAll, sent, 13, 8), __shfl_up_sync(kAll, sent, 3, 8),
                              __shfl_down_sync(kAll, sent, 3, 8), __shfl_xor_sync(kAll, sent, 5, 8)};
  const int argument[4] = {13 % 8, 3, 3, 5}, lane = threadIdx.x % 8, first = threadIdx.x % 32 - lane;
  const int source[4] = {argument[0], lane < 3 ? lane : lane - 3, lane > 4 ? lane : lane + 3, lane ^ 5};
  int right = 0;
  for (int i = 0; i < 4; ++i) right += received[i] == first + source[i] + 0x1p-40;
  const bool votes = __ballot_sync(kAll, lane == 2) == 0x04040404u && __any_sync(kAll, lane == 2) &&
                     !__all_sync(kAll, lane == 2) && __all_sync(kAll, lane >= 0);
  out[threadIdx.x] = float(right + votes);
}

// Each thread counts at its own index in a grid and block of three dimensions.
__global__ void coordinates_kernel(int* count) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++count[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

}  // namespace

TEST(threads_and_blocks_have_three_coordinates) {
  for_each_order([] {
    const dim3 grid(2, 3, 4), block(5, 3, 7);
    simt::Buffer<int> count("count", std::vector<int>(24 * 105));
    simt::launch(coordinates_kernel, grid, block, nullptr, count.data());
    CHECK(clean());
    CHECK(count.host() == std::vector<int>(24 * 105, 1));
  });
}

TEST(shuffles_and_votes_give_their_numbers) {
  for_each_order([] {
    CHECK(run(shuffle_kernel) == std::vector<float>(kThreads, 5));
    CHECK(clean());
  });
}

TEST(divergent_barriers_and_deadlocks_are_caught) {
  check_fault(divergent_barrier_kernel<true>, divergent_barrier_kernel<false>, ErrorKind::kDivergentBarrier);
  check_fault(early_exit_kernel<true>, early_exit_kernel<false>, ErrorKind::kDivergentBarrier);
  check_fault(deadlock_kernel<true>, deadlock_kernel<false>, ErrorKind::kDeadlock, ErrorKind::kBadMask);
}

TEST(bad_masks_are_caught) {
  check_fault(absent_lane_kernel<true>, absent_lane_kernel<false>, ErrorKind::kBadMask, ErrorKind::kDeadlock);
  check_fault(source_lane_kernel<true>, source_lane_kernel<false>, ErrorKind::kBadMask);
  check_fault(omitted_caller_kernel<true>, omitted_caller_kernel<false>, ErrorKind::kBadMask);
  check_fault(divergent_warp_kernel<true>, divergent_warp_kernel<false>, ErrorKind::kDivergentWarp);
}

TEST(a_loop_that_waits_ends_if_it_can) {
  for_each_order([] {
    simt::options().access_limit = 20000;
    simt::options().preempt_every = 10;
    run(spin_kernel<true>);
    CHECK(caught(ErrorKind::kDeadlock));
    simt::reports().clear();
    run(spin_kernel<false>);
    CHECK(clean());
  });
}

TEST(launches_that_cuda_refuses_are_caught) {
  for (const auto& [grid, block] : {std::pair(dim3(0), dim3(32)), std::pair(dim3(1), dim3(1025)),
                                    std::pair(dim3(1, 65536), dim3(32)), std::pair(dim3(1), dim3(8, 0))}) {
    simt::launch(early_exit_kernel<false>, grid, block, nullptr, static_cast<const float*>(nullptr),
                 static_cast<float*>(nullptr));
    CHECK(caught(ErrorKind::kBadLaunch));
  }
}

TEST(an_error_says_what_and_where) {
  simt::options().seed = 1;
  run(divergent_barrier_kernel<true>);
  const simt::Error barrier = simt::reports().back().errors.at(0);
  CHECK(barrier.source.find("test_simt_control_flow.cpp:") != std::string::npos && barrier.thread >= 0);
  run(copy_beyond_kernel);
  const simt::Error bounds = simt::reports().back().errors.at(0);
  CHECK(bounds.thread == kThreads - 1 && bounds.message.find("end of x") != std::string::npos);
}

int main() { return check::run_tests(); }
