// The host twins of mma, ldmatrix and cp.async against plain loops over the matrices.
#include <cstdint>
#include <vector>

#include "check.h"
#include "ops/convert.h"
#include "simt_support.h"
#include "support.h"

using namespace align;
using simt::Buffer;
using simt::ErrorKind;
using simt::Op;
using test::caught;
using test::clean;
using test::for_each_order;

namespace {

constexpr int kM = 16, kN = 8, kK = 16, kWarps = 3, kPitch = kK + 8;  // the pad spreads rows over the banks

template <typename T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    simt::mma_m16n8k16_bf16(d, a, b);
  } else {
    simt::mma_m16n8k16_f16(d, a, b);
  }
}

// A warp multiplies its own A [16, 16] and B, given as [8, 16] (plain ldmatrix) or as [16, 8] (transposing), through
// cp.async and shared memory, twice onto C.
template <typename T, bool kTransposeB>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T a_tile[kWarps][kM][kPitch];
  __shared__ __align__(16) T b_tile[kWarps][kK][kPitch];  // the larger of both shapes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = kTransposeB ? kN : kK;
  simt::cp_async16(&a_tile[warp][lane / 2][lane % 2 * 8], a + warp * kM * kK + lane * 8);
  if (lane < 16) {
    const int element = lane * 8;
    simt::cp_async16(&b_tile[warp][element / columns][element % columns], b + warp * kN * kK + element);
  }
  simt::cp_async_commit();
  simt::cp_async_wait(0);
  __syncwarp();  // the copies of all lanes are in place
  uint32_t a_fragment[4], b_fragment[2];
  simt::ldmatrix_x4(a_fragment, &a_tile[warp][lane % 16][lane / 16 * 8]);
  if (kTransposeB) {
    simt::ldmatrix_x2_trans(b_fragment, &b_tile[warp][lane % 16][0]);
  } else {
    simt::ldmatrix_x2(b_fragment, &b_tile[warp][lane % 8][lane / 8 % 2 * 8]);
  }
  float d[4] = {};
  multiply<T>(d, a_fragment, b_fragment);
  multiply<T>(d, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) c[(warp * kM + lane / 4 + i / 2 * 8) * kN + lane % 4 * 2 + i % 2] = d[i];
}

template <typename T, bool kTransposeB>
void check_product() {
  const auto a = test::random_values<T>(kWarps * kM * kK, 1), b = test::random_values<T>(kWarps * kN * kK, 2);
  std::vector<double> want(kWarps * kM * kN);
  for (int i = 0; i < kWarps * kM * kN; ++i) {
    const int warp = i / (kM * kN), m = i / kN % kM, n = i % kN;
    for (int k = 0; k < kK; ++k) {
      const int b_index = warp * kN * kK + (kTransposeB ? k * kN + n : n * kK + k);
      want[i] += 2.0 * widen(a[(warp * kM + m) * kK + k]) * widen(b[b_index]);
    }
  }
  for_each_order([&] {
    Buffer<T> a_buffer("a", a), b_buffer("b", b);
    Buffer<float> c("c", want.size());
    simt::launch(product_kernel<T, kTransposeB>, dim3(1), dim3(32 * kWarps), nullptr,
                 static_cast<const T*>(a_buffer.data()), static_cast<const T*>(b_buffer.data()), c.data());
    CHECK(clean());
    CHECK_CLOSE(c.host(), want, 1e-5);
    const simt::Report& report = simt::reports().back();
    CHECK(report.global(Op::kLoad, "a").bytes == kWarps * kM * kK * 2);
    CHECK(report.global(Op::kLoad, "a").sectors == kWarps * kM * kK * 2 / 32);
    // Four matrices of A and two of B, each in one pass over the banks: 8 rows, 48 bytes apart.
    CHECK(report.shared(Op::kLoad).wavefronts == kWarps * 6 && report.shared(Op::kLoad).conflicts == 0);
    CHECK(report.shared(Op::kStore).requests == kWarps * 2);
  });
}

// Every lane stores the numbers of the two elements that each register received.
template <bool kTranspose>
__global__ void load_matrices_kernel(const uint16_t* x, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[4 * 64];
  for (int i = threadIdx.x; i < 4 * 64; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t registers[4];
  if (kTranspose) {
    simt::ldmatrix_x4_trans(registers, tile + threadIdx.x * 8);
  } else {
    simt::ldmatrix_x4(registers, tile + threadIdx.x * 8);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = registers[i];
}

template <bool kTranspose>
void check_load_matrices() {
  std::vector<uint16_t> numbers(4 * 64);
  for (int i = 0; i < 4 * 64; ++i) numbers[i] = uint16_t(i);
  for_each_order([&] {
    Buffer<uint16_t> x("x", numbers);
    Buffer<uint32_t> out("out", 128);
    simt::launch(load_matrices_kernel<kTranspose>, dim3(1), dim3(32), nullptr, static_cast<const uint16_t*>(x.data()),
                 out.data());
    CHECK(clean());
    const auto registers = out.host();
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int half = 0; half < 2; ++half) {
          const int row = kTranspose ? lane % 4 * 2 + half : lane / 4;
          const int column = kTranspose ? lane / 4 : lane % 4 * 2 + half;
          const unsigned got = registers[lane * 4 + matrix] >> (16 * half) & 0xffffu;
          CHECK(int(got) == matrix * 64 + row * 8 + column);
        }
      }
    }
  });
}

// ldmatrix gives a lane what another lane has written: a barrier is needed, although each lane gives its own row.
template <bool kBarrier>
__global__ void own_rows_kernel(uint32_t* out) {
  __shared__ __align__(16) uint4 tile[64];
  tile[threadIdx.x] = make_uint4(threadIdx.x, 1, 2, 3);
  if (kBarrier) __syncwarp();
  uint32_t registers[4];
  simt::ldmatrix_x4(registers, &tile[threadIdx.x]);
  out[threadIdx.x] = registers[0];
}

__global__ void partial_warp_kernel(uint32_t* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x % 32 < 16) simt::mma_m16n8k16_bf16(d, a, b);
  out[threadIdx.x] = uint32_t(d[0]);
}

__global__ void misaligned_row_kernel(uint32_t* out) {
  __shared__ __align__(16) uint32_t tile[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) tile[i] = 1;
  __syncthreads();
  uint32_t registers[2];
  simt::ldmatrix_x2(registers, tile + threadIdx.x % 32 * 5);
  out[threadIdx.x] = registers[0];
}

// ---- cp.async

constexpr int kAsyncThreads = 128;

template <bool kWait, bool kBarrier>
__global__ void async_kernel(const float* x, float* out) {
  __shared__ __align__(16) float tile[2][4 * kAsyncThreads];
  for (int stage = 0; stage < 2; ++stage) {
    simt::cp_async16(&tile[stage][4 * threadIdx.x], x + 4 * threadIdx.x);
    simt::cp_async_commit();
  }
  simt::cp_async_wait(kWait ? 0 : 1);  // the second stage is still on its way if one group may be left
  if (kBarrier) __syncthreads();
  const float first = tile[0][(4 * threadIdx.x + 4) % (4 * kAsyncThreads)];
  out[threadIdx.x] = first + tile[1][(4 * threadIdx.x + 4) % (4 * kAsyncThreads)];
  simt::cp_async_wait(0);
}

template <bool kFault>
__global__ void async_exit_kernel(const float* x, float* out) {
  __shared__ __align__(16) float tile[4 * kAsyncThreads];
  tile[4 * threadIdx.x + 1] = 9;
  simt::cp_async16(&tile[4 * threadIdx.x], x + 4 * threadIdx.x, 4);
  simt::cp_async_commit();
  if (!kFault) simt::cp_async_wait(0);
  out[threadIdx.x] = kFault ? 0 : tile[4 * threadIdx.x] + tile[4 * threadIdx.x + 1];  // x and a zero
}

// Where a copy reads nothing, its source may be anywhere, also in shared memory.
template <int kBytes>
__global__ void from_shared_kernel(float* out) {
  __shared__ __align__(16) float tile[2][4];
  simt::cp_async16(&tile[0][0], &tile[1][0], kBytes);
  simt::cp_async_commit();
  simt::cp_async_wait(0);
  out[0] = tile[0][0];
}

// A ring of three stages, filled kAhead rounds ahead. Two are right: the stage filled in a round is the one that was
// read before the round's barrier.
template <int kAhead, int kGroupsLeft>
__global__ void ring_kernel(const float* x, float* out, int rounds) {
  constexpr int kStages = 3, kThreads = 64;
  __shared__ __align__(16) float ring[kStages][4 * kThreads];
  const auto fetch = [&](int round) {
    if (round < rounds) {
      simt::cp_async16(&ring[round % kStages][4 * threadIdx.x], x + (round * kThreads + threadIdx.x) * 4);
    }
    simt::cp_async_commit();
  };
  float sum = 0;
  for (int round = 0; round < kAhead; ++round) fetch(round);
  for (int round = 0; round < rounds; ++round) {
    simt::cp_async_wait(kGroupsLeft);
    __syncthreads();  // the stage of this round is complete, that of the last one has been read
    for (int i = 0; i < 4; ++i) sum += ring[round % kStages][(4 * threadIdx.x + 16 + i) % (4 * kThreads)];
    fetch(round + kAhead);
  }
  simt::cp_async_wait_all();
  out[threadIdx.x] = sum;
}

}  // namespace

TEST(tensor_core_products_agree_with_plain_loops) {
  check_product<bfloat16, false>();
  check_product<bfloat16, true>();
  check_product<float16, false>();
  check_product<float16, true>();
}

TEST(ldmatrix_hands_out_rows_and_columns) {
  check_load_matrices<false>();
  check_load_matrices<true>();
}

TEST(misuse_of_ldmatrix_and_mma_is_caught) {
  for_each_order([] {
    const auto run = [](void (*kernel)(uint32_t*)) {
      Buffer<uint32_t> out("out", 64);
      simt::launch(kernel, dim3(1), dim3(64), nullptr, out.data());
    };
    run(own_rows_kernel<true>);
    CHECK(clean());
    run(own_rows_kernel<false>);
    CHECK(caught(ErrorKind::kSharedRace));
    run(partial_warp_kernel);
    CHECK(caught(ErrorKind::kBadMask, ErrorKind::kDeadlock));
    run(misaligned_row_kernel);
    CHECK(caught(ErrorKind::kMisaligned));
  });
}

TEST(copies_that_nobody_waited_for_are_caught) {
  std::vector<float> ramp(4 * kAsyncThreads);
  for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = float(i);
  const auto run_async = [&](void (*kernel)(const float*, float*)) {
    Buffer<float> x("x", ramp), out("out", kAsyncThreads);
    simt::launch(kernel, dim3(1), dim3(kAsyncThreads), nullptr, static_cast<const float*>(x.data()), out.data());
    return out.host();
  };
  for_each_order([&] {
    run_async(async_kernel<false, true>);
    CHECK(caught(ErrorKind::kAsyncHazard, ErrorKind::kSharedRace));  // a race where the last wait came first
    // A wait without a barrier: the copies of others may be under way, or done and not yet visible.
    run_async(async_kernel<true, false>);
    CHECK(!simt::reports().back().errors.empty());
    run_async(async_exit_kernel<true>);
    CHECK(caught(ErrorKind::kAsyncHazard));
    simt::reports().clear();
    CHECK(run_async(async_kernel<true, true>)[3] == 32);
    CHECK(run_async(async_exit_kernel<false>)[3] == 12);
    CHECK(clean());
  });
}

TEST(the_source_of_a_copy_is_not_in_shared_memory_unless_nothing_is_read) {
  const auto run = [](void (*kernel)(float*)) {
    Buffer<float> out("out", 1);
    simt::launch(kernel, dim3(1), dim3(1), nullptr, out.data());
    return out.host();
  };
  run(from_shared_kernel<16>);
  CHECK(caught(ErrorKind::kOutOfBounds));
  simt::reports().clear();
  CHECK(run(from_shared_kernel<0>)[0] == 0);
  CHECK(clean());
}

TEST(a_ring_of_stages_is_checked_for_early_reads_and_early_refills) {
  constexpr int kRounds = 7;
  const auto values = test::random_values<float>(kRounds * 64 * 4, 5);
  const auto run = [&](void (*kernel)(const float*, float*, int)) {
    Buffer<float> x("x", values), out("out", 64);
    simt::launch(kernel, dim3(1), dim3(64), nullptr, static_cast<const float*>(x.data()), out.data(), kRounds);
    return out.host();
  };
  std::vector<double> want(64);
  for (int i = 0; i < kRounds * 64 * 4; ++i) want[(i / 4 + 60) % 64] += values[i];
  for_each_order([&] {
    CHECK_CLOSE(run(ring_kernel<2, 1>), want, 1e-5);
    CHECK(clean());
    run(ring_kernel<2, 2>);
    CHECK(caught(ErrorKind::kAsyncHazard, ErrorKind::kSharedRace));
    simt::reports().clear();
    run(ring_kernel<3, 2>);
    CHECK(caught(ErrorKind::kSharedRace, ErrorKind::kAsyncHazard));
  });
}

int main() { return check::run_tests(); }
