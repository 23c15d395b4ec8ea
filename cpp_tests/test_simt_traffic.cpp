// The SIMT engine's counters, against numbers worked out by hand.
#include <cstdint>
#include <vector>

#include "check.h"
#include "simt_support.h"

using namespace align;
using simt::Buffer;
using simt::Op;
using simt::Traffic;
using test::clean;
using test::for_each_order;

namespace {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kFloats = 33 * kThreads;

// Runs kernel(x, out, args...) on two blocks; returns the report.
template <typename... Params, typename... Args>
simt::Report run(void (*kernel)(const float*, float*, Params...), size_t shared_bytes, Args... args) {
  Buffer<float> x("x", std::vector<float>(2 * kFloats)), out("out", std::vector<float>(2 * kFloats));
  simt::reports().clear();
  simt::launch_shared(kernel, dim3(2), dim3(kThreads), shared_bytes, static_cast<const float*>(x.data()), out.data(),
                      args...);
  CHECK(clean());
  return simt::reports().back();
}

bool is(const Traffic& traffic, int64_t accesses, int64_t requests, int64_t bytes, int64_t sectors) {
  const bool same = traffic.accesses == accesses && traffic.requests == requests && traffic.bytes == bytes &&
                    traffic.sectors == sectors;
  if (!same) {
    std::printf("  %ld accesses, %ld requests, %ld bytes, %ld sectors\n", long(traffic.accesses),
                long(traffic.requests), long(traffic.bytes), long(traffic.sectors));
  }
  return same;
}

__global__ void copy_kernel(const float* x, float* out, int stride, int offset) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  out[thread] = x[thread * stride + offset];
}

template <typename Vector>
__global__ void copy_vectors_kernel(const float* x, float* out) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  reinterpret_cast<Vector*>(out)[thread] = reinterpret_cast<const Vector*>(x)[thread];
}

// Lane l reads l % 4 + 1 floats; odd lanes alone write.
__global__ void divergent_kernel(const float* x, float* out) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = 0;
  for (unsigned i = 0; i <= threadIdx.x % 4; ++i) sum += x[i * 2 * kThreads + thread];
  if (threadIdx.x % 2) out[thread] = sum;
}

// The lanes of a warp take four sectors by turns.
__global__ void permuted_kernel(const float* x, float* out) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread % 32;
  out[thread] = x[thread - lane + lane % 4 * 8 + lane / 4];
}

// In round 0 lane l reads l % 4 + 1 floats, in round 1 one; then all meet.
template <bool kBlock>
__global__ void meeting_kernel(const float* x, float* out, int rounds) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i <= (round == 0 ? thread % 4 : 0); ++i) sum += x[(4 * round + i) * 2 * kThreads + thread];
    if (kBlock) {
      __syncthreads();
    } else {
      sum = __shfl_xor_sync(0xffffffffu, sum, 1);
    }
  }
  out[thread] = sum;
}

__global__ void atomic_kernel(const float* x, float* out) {
  atomicAdd(out, 1.f);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<int*>(out) + 64 + threadIdx.x, int(x[0]));
}

__global__ void bank_kernel(const float*, float* out, int stride) {
  float* tile = static_cast<float*>(simt::dynamic_shared());
  for (int i = threadIdx.x; i < 33 * 32; i += kThreads) tile[i] = float(i);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x % 32 * stride];
}

template <typename Vector>
__global__ void shared_vectors_kernel(const float* x, float* out, int stride) {
  __shared__ Vector tile[kThreads * 2];
  const int thread = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x * stride] = reinterpret_cast<const Vector*>(x)[thread];
  reinterpret_cast<Vector*>(out)[thread] = tile[threadIdx.x * stride];
}

__global__ void half_kernel(const float*, float* out) {
  __shared__ uint16_t tile[kThreads];
  tile[threadIdx.x] = uint16_t(threadIdx.x);
  out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
}

constexpr int kAll = 2 * kThreads, kAllWarps = 2 * kWarps;

}  // namespace

TEST(coalesced_and_strided_loads_cost_their_sectors) {
  for_each_order([] {
    for (int stride : {0, 1, 2, 4, 8, 16}) {
      const simt::Report report = run(copy_kernel, 0, stride, 0);
      const int sectors = stride == 0 ? 1 : std::min(4 * stride, 32);
      CHECK(is(report.global(Op::kLoad, "x"), kAll, kAllWarps, 4 * kAll, kAllWarps * sectors));
      CHECK(is(report.global(Op::kStore, "out"), kAll, kAllWarps, 4 * kAll, kAllWarps * 4));
      CHECK(is(report.global(Op::kLoad, "out"), 0, 0, 0, 0) && is(report.global(Op::kStore, "x"), 0, 0, 0, 0));
      CHECK(report.accesses == 2 * kAll);
    }
    CHECK(is(run(permuted_kernel, 0).global(Op::kLoad), kAll, kAllWarps, 4 * kAll, kAllWarps * 4));
    CHECK(run(copy_kernel, 0, 1, 1).global(Op::kLoad).sectors == kAllWarps * 5);  // one float off a sector's start
  });
}

TEST(wide_accesses_are_one_request) {
  for_each_order([] {
    for (Op op : {Op::kLoad, Op::kStore}) {
      CHECK(is(run(copy_vectors_kernel<float4>, 0).global(op), kAll, kAllWarps, 16 * kAll, 16 * kAllWarps));
      CHECK(is(run(copy_vectors_kernel<uint2>, 0).global(op), kAll, kAllWarps, 8 * kAll, 8 * kAllWarps));
      CHECK(is(run(copy_vectors_kernel<uint8_t>, 0).global(op), kAll, kAllWarps, kAll, kAllWarps));
    }
  });
}

TEST(lanes_that_go_different_ways_share_requests) {
  for_each_order([] {
    const simt::Report report = run(divergent_kernel, 0);
    // Iteration i has the lanes with l % 4 >= i: 32, 24, 16, 8 of them, in all four sectors.
    CHECK(is(report.global(Op::kLoad), kAll / 4 * 10, 4 * kAllWarps, kAll * 10, 16 * kAllWarps));
    CHECK(is(report.global(Op::kStore), kAll / 2, kAllWarps, 2 * kAll, 4 * kAllWarps));
  });
}

TEST(requests_are_matched_anew_where_lanes_meet) {
  for_each_order([] {
    for (const simt::Report& report : {run(meeting_kernel<true>, 0, 2), run(meeting_kernel<false>, 0, 2)}) {
      CHECK(is(report.global(Op::kLoad), kAll / 4 * 14, 5 * kAllWarps, kAll * 14, 20 * kAllWarps));
    }
  });
}

TEST(atomics_are_counted_apart) {
  for_each_order([] {
    const simt::Report report = run(atomic_kernel, 0);
    CHECK(
        is(report.global(Op::kAtomic, "out"), kAll + kAllWarps, 2 * kAllWarps, 4 * (kAll + kAllWarps), 2 * kAllWarps));
    CHECK(report.global(Op::kStore).requests == 0 && report.global(Op::kLoad).requests == kAllWarps);
  });
}

TEST(bank_conflicts_are_the_distinct_words_of_the_busiest_bank) {
  for_each_order([] {
    const std::vector<std::pair<int, int>> ways = {{0, 1}, {1, 1}, {2, 2}, {3, 1}, {4, 4}, {8, 8}, {32, 32}, {33, 1}};
    for (const auto& [stride, conflict_ways] : ways) {
      const simt::Report report = run(bank_kernel, 33 * 32 * sizeof(float), stride);
      const Traffic load = report.shared(Op::kLoad), store = report.shared(Op::kStore);
      CHECK(load.requests == kAllWarps && load.wavefronts == kAllWarps * conflict_ways);
      CHECK(load.conflicts == kAllWarps * (conflict_ways - 1) && load.bytes == 4 * kAll);
      CHECK(store.requests == 2 * 33 && store.wavefronts == 2 * 33 && store.conflicts == 0);
    }
  });
}

TEST(wide_shared_accesses_go_in_halves_and_quarters_of_a_warp) {
  for_each_order([] {
    for (Op op : {Op::kLoad, Op::kStore}) {
      const Traffic four = run(shared_vectors_kernel<float4>, 0, 1).shared(op);
      CHECK(four.wavefronts == 4 * kAllWarps && four.conflicts == 0);
      const Traffic apart = run(shared_vectors_kernel<float4>, 0, 2).shared(op);
      CHECK(apart.wavefronts == 8 * kAllWarps && apart.conflicts == 4 * kAllWarps);
      const Traffic two = run(shared_vectors_kernel<float2>, 0, 1).shared(op);
      CHECK(two.wavefronts == 2 * kAllWarps && two.conflicts == 0);
      const Traffic half = run(half_kernel, 0).shared(op);  // two lanes share a word
      CHECK(half.wavefronts == kAllWarps && half.conflicts == 0);
    }
  });
}

TEST(each_access_of_the_source_has_its_own_counts) {
  const simt::Report report = run(divergent_kernel, 0);
  CHECK(report.sites.size() == 2);
  for (const simt::Site& site : report.sites) {
    CHECK(simt::source_line(site.pc).find("test_simt_traffic.cpp:") != std::string::npos);
  }
}

int main() { return check::run_tests(); }
