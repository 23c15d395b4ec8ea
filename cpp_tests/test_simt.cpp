// The SIMT engine must catch each faulty access to memory, in blocks of several warps and every thread order, and must
// not complain about the same kernel without the fault.
#include <cstdint>
#include <vector>

#include "check.h"
#include "simt_support.h"

using namespace align;
using simt::Buffer;
using simt::ErrorKind;
using test::caught;
using test::check_fault;
using test::for_each_order;
using test::run;

namespace {

constexpr int kThreads = test::kFaultThreads;

// ---- Missing barriers

template <bool kFault>
__global__ void reverse_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!kFault) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The second barrier, which protects what was read from the next round's writes.
template <bool kFault>
__global__ void rounds_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    sum += tile[(threadIdx.x + 32) % kThreads];
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Threads use only what their own warp has written: a __syncwarp is enough, and it is needed.
template <bool kFault>
__global__ void warp_sum_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned lane = threadIdx.x % 32;
  float* mine = tile + threadIdx.x - lane;
  mine[lane] = x[threadIdx.x];
  __syncwarp();
  for (unsigned offset = 16; offset > 0; offset /= 2) {
    float other = 0;
    if (lane < offset) other = mine[lane + offset];
    if (lane < offset) mine[lane] += other;
    if (!kFault) __syncwarp();
  }
  out[threadIdx.x] = mine[0];
}

// Halves of a warp exchange among themselves, each under its own mask, both at a time.
template <bool kFault>
__global__ void half_warps_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned half = threadIdx.x / 16 % 2, mask = half ? 0xffff0000u : 0x0000ffffu;
  float value = x[threadIdx.x];
  for (int offset = 8; offset > 0; offset /= 2) {
    if (half == 0) {
      value += __shfl_xor_sync(mask, value, offset);
    } else {
      value = fmaxf(value, __shfl_xor_sync(mask, value, offset));
    }
  }
  tile[threadIdx.x] = value;
  __syncwarp(kFault ? 1u << threadIdx.x % 32 : mask);
  out[threadIdx.x] = tile[threadIdx.x ^ 5];
}

// A lane that met another is not yet ordered with that one's former companions, unless they met before.
template <bool kFault>
__global__ void chain_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x - lane;
  if (lane < 2) {
    if (lane == 0) tile[warp] = x[threadIdx.x];
    if (!kFault) __syncwarp(0x3u);
  }
  if (lane == 1 || lane == 2) __syncwarp(0x6u);
  out[threadIdx.x] = lane == 2 ? tile[warp] : 0;
}

// Two threads read a number, then one of them, perhaps the last that read, writes it.
template <bool kFault>
__global__ void write_after_reads_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float value = 0;
  if (threadIdx.x == 40 || threadIdx.x == 5) value = tile[0];
  if (!kFault) __syncthreads();
  if (threadIdx.x == 5) tile[0] = value + 1;
  out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void write_after_lanes_read_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x - lane;
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float value = 0;
  if (lane == 2 || lane == 3) value = tile[warp];
  if (!kFault) __syncwarp();
  if (lane == 3) tile[warp] = value + 1;
  out[threadIdx.x] = value;
}

// Each byte of a word has its own history: lane 4 is ordered after the reads of lanes 0 and 1, but not after lane 2.
template <bool kFault>
__global__ void bytes_kernel(const float* x, float* out) {
  __shared__ unsigned words[kThreads / 32];
  const unsigned lane = threadIdx.x % 32;
  unsigned& word = words[threadIdx.x / 32];
  uint8_t* bytes = reinterpret_cast<uint8_t*>(&word);
  if (lane == 7) word = unsigned(x[0]);
  __syncthreads();
  unsigned value = 0;
  if (lane < 2) value = word;
  if (lane < 3) value += __shfl_sync(0x07u, 0u, 0);  // lane 2 comes last; a shuffle orders no memory
  if (lane == 2) value = bytes[0];
  if (lane < 2 || lane == 4) __syncwarp(0x13u);
  if (lane == 4) bytes[kFault ? 0 : 1] = 7;
  out[threadIdx.x] = float(value);
}

// What was done to a word was done to each of its bytes.
template <bool kFault>
__global__ void byte_of_word_kernel(const float* x, float* out) {
  __shared__ unsigned word;
  if (threadIdx.x == 7) word = unsigned(x[0]);
  __syncthreads();
  unsigned value = 0;
  if (threadIdx.x < 32) {
    if (threadIdx.x < 2) value = word;
    value += __shfl_sync(~0u, 0u, 0);
    if (!kFault) __syncwarp();
    if (threadIdx.x == 1) reinterpret_cast<uint8_t*>(&word)[3] = 7;
  }
  out[threadIdx.x] = float(value);
}

// ---- Global memory

template <bool kFault>
__global__ void global_exchange_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x];
  if (!kFault) __syncthreads();
  const float other = out[(threadIdx.x + 40) % kThreads];
  __syncthreads();
  out[threadIdx.x] = other;
}

template <bool kFault>
__global__ void count_blocks_kernel(const float*, float* out) {
  if (threadIdx.x != 0) return;
  if (kFault) {
    out[0] += 1.f;
  } else {
    atomicAdd(out, 1.f);
  }
}

// Every block reads, one of them writes what it read: no two writes meet, and the writer is the last that read.
template <bool kFault>
__global__ void read_then_write_kernel(const float* x, float* out) {
  if (threadIdx.x != 0) return;
  const float first = out[0] + x[0];
  out[kFault && blockIdx.x == 1 ? 0 : 1 + blockIdx.x] = first;
}

template <bool kFault>
__global__ void mixed_atomic_kernel(const float*, float* out) {
  if (threadIdx.x == 5 && kFault) out[0] = 1;
  if (threadIdx.x == 40 || threadIdx.x == 41) atomicAdd(out, 1.f);
}

// ---- Single accesses

template <bool kFault>
__global__ void bounds_kernel(const float* x, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = x[i + kFault];
}

template <bool kFault>
__global__ void array_bounds_kernel(const float* x, float* out) {
  __shared__ float first[kThreads], second[kThreads];
  first[threadIdx.x] = second[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = first[threadIdx.x] + second[(threadIdx.x + kFault) % (kThreads + kFault)];
}

template <bool kFault>
__global__ void uninitialised_kernel(const float* x, float* out) {
  __shared__ float tile[kThreads];
  if (threadIdx.x < kThreads - (kFault && blockIdx.x == 0)) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kFault>
__global__ void misaligned_kernel(const float* x, float* out) {
  const unsigned i = threadIdx.x * 4;
  if (i + 4 < kThreads) *reinterpret_cast<float4*>(out + i) = *reinterpret_cast<const float4*>(x + i + kFault);
}

template <bool kFault>
__global__ void local_memory_kernel(const float* x, float* out) {
  __shared__ float* pointer;
  volatile float local = x[threadIdx.x];
  if (threadIdx.x == 0) pointer = const_cast<float*>(&local);
  __syncthreads();
  out[threadIdx.x] = kFault ? *pointer : local;
}

}  // namespace

TEST(a_missing_block_barrier_is_caught) {
  check_fault(reverse_kernel<true>, reverse_kernel<false>, ErrorKind::kSharedRace, ErrorKind::kUninitialised);
  check_fault(write_after_reads_kernel<true>, write_after_reads_kernel<false>, ErrorKind::kSharedRace);
  check_fault(rounds_kernel<true>, rounds_kernel<false>, ErrorKind::kSharedRace);
}

TEST(a_missing_warp_barrier_is_caught) {
  check_fault(warp_sum_kernel<true>, warp_sum_kernel<false>, ErrorKind::kSharedRace);
  check_fault(half_warps_kernel<true>, half_warps_kernel<false>, ErrorKind::kSharedRace, ErrorKind::kUninitialised);
  check_fault(write_after_lanes_read_kernel<true>, write_after_lanes_read_kernel<false>, ErrorKind::kSharedRace);
  check_fault(bytes_kernel<true>, bytes_kernel<false>, ErrorKind::kSharedRace);
  check_fault(byte_of_word_kernel<true>, byte_of_word_kernel<false>, ErrorKind::kSharedRace);
  check_fault(chain_kernel<true>, chain_kernel<false>, ErrorKind::kSharedRace, ErrorKind::kUninitialised);
}

TEST(collectives_of_both_halves_of_a_warp_give_their_numbers) {
  for_each_order([] {
    const std::vector<float> out = run(half_warps_kernel<false>);
    for (int i = 0; i < kThreads; ++i) {
      const int first = i / 16 * 16;
      CHECK(out[i] == (i / 16 % 2 ? float(first + 15) : 16.f * float(first) + 120.f));
    }
  });
}

TEST(races_in_global_memory_are_caught) {
  check_fault(global_exchange_kernel<true>, global_exchange_kernel<false>, ErrorKind::kGlobalRace);
  check_fault(mixed_atomic_kernel<true>, mixed_atomic_kernel<false>, ErrorKind::kGlobalRace);
}

TEST(conflicts_of_blocks_are_caught) {
  check_fault(count_blocks_kernel<true>, count_blocks_kernel<false>, ErrorKind::kBlockConflict, 3);
  check_fault(read_then_write_kernel<true>, read_then_write_kernel<false>, ErrorKind::kBlockConflict, 2);
  for_each_order([] { CHECK(run(count_blocks_kernel<false>, 5)[0] == 5); });
}

TEST(accesses_out_of_bounds_are_caught) {
  check_fault(bounds_kernel<true>, bounds_kernel<false>, ErrorKind::kOutOfBounds, 2);
  check_fault(array_bounds_kernel<true>, array_bounds_kernel<false>, ErrorKind::kOutOfBounds);
  check_fault(local_memory_kernel<true>, local_memory_kernel<false>, ErrorKind::kOutOfBounds);
}

TEST(uninitialised_memory_is_caught) {
  // Two blocks: what one leaves behind must not count as written by the other.
  check_fault(uninitialised_kernel<true>, uninitialised_kernel<false>, ErrorKind::kUninitialised, 2);
  Buffer<float> x("x", kThreads), out("out", kThreads);
  simt::launch(bounds_kernel<false>, dim3(1), dim3(kThreads), nullptr, static_cast<const float*>(x.data()), out.data());
  CHECK(caught(ErrorKind::kUninitialised));
}

TEST(misaligned_accesses_are_caught) {
  check_fault(misaligned_kernel<true>, misaligned_kernel<false>, ErrorKind::kMisaligned);
}

int main() { return check::run_tests(); }
