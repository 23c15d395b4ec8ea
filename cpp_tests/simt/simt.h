// CUDA C++ as kernels see it when a host compiler compiles them for the SIMT engine (README.md). The names are
// CUDA's; what they do is in the engine.
#pragma once

#include <algorithm>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "report.h"
#include "vector_types.h"

typedef struct CUstream_st* cudaStream_t;

#define __global__ __attribute__((noinline))  // called through a pointer, as one function
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so a block's shared memory is the module's thread-local segment, whose bounds are known.
#define __shared__ static thread_local

#define SIMT_UNSEEN __attribute__((noinline, no_sanitize_thread))  // its own accesses are not the kernel's

namespace simt {

// ---- Identity. Constant for a thread, so that compilers may keep the result.

uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_dim() __attribute__((const));
dim3 grid_dim() __attribute__((const));

// ---- Synchronisation and exchange. Where: the line of the source, which optimisation cannot duplicate.

struct Where {
  const char* file;
  int line;
};

enum class Shuffle { kIndex, kUp, kDown, kXor };

void sync_block(Where where);
void sync_warp(unsigned mask, Where where);
uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int argument, int width, Where where);
unsigned ballot(unsigned mask, bool predicate, Where where);
void atomic_access(const void* address, unsigned bytes, const void* pc);
void* dynamic_shared();        // 128-byte aligned
void require(bool condition);  // else the launch ends with an error

template <typename T>
T shuffle_as(Shuffle mode, unsigned mask, T value, int argument, int width, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mode, mask, bits, argument, width, where);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- Host twins of PTX instructions, for a header that wraps the asm.

// d += a b, fragments as in the PTX ISA, fp32 accumulation.
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// Matrix i takes its eight 16-byte rows from lanes 8 i .. 8 i + 7.
void ldmatrix_x2(uint32_t (&result)[2], const void* row);
void ldmatrix_x4(uint32_t (&result)[4], const void* row);
void ldmatrix_x2_trans(uint32_t (&result)[2], const void* row);
void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row);
// Copies source_bytes (0 .. 16) and zeros to 16 bytes of shared memory, when the thread waits for it.
void cp_async16(void* shared, const void* global, int source_bytes = 16);
void cp_async4(void* shared, const void* global, int source_bytes = 4);
void cp_async_commit();
void cp_async_wait(int groups_left);  // all but the latest committed groups
void cp_async_wait_all();             // committed or not

// ---- Launch

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* closure);

template <typename Body>
SIMT_UNSEEN void call(void* body) {
  (*static_cast<const Body*>(body))();
}

// Runs the kernel to its end and appends a Report to reports().
template <typename... Params, typename... Args>
void launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  auto body = [=]() __attribute__((no_sanitize_thread)) { kernel(args...); };
  run(grid, block, shared_bytes, call<decltype(body)>, &body);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t, Args... args) {
  launch_shared(kernel, grid, block, 0, args...);
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())
constexpr int warpSize = 32;

#define SIMT_WHERE simt::Where where = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(SIMT_WHERE) { simt::sync_block(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_WHERE) { simt::sync_warp(mask, where); }
inline void __threadfence() {}  // one block runs at a time, in program order
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_WHERE) {
  return simt::shuffle_as(simt::Shuffle::kIndex, mask, value, lane, width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle_as(simt::Shuffle::kUp, mask, value, int(delta), width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  return simt::shuffle_as(simt::Shuffle::kDown, mask, value, int(delta), width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_WHERE) {
  return simt::shuffle_as(simt::Shuffle::kXor, mask, value, lane_mask, width, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate == 0, where) == 0;
}

#undef SIMT_WHERE

// ---- Atomics

namespace simt {
template <typename T, typename Update>
__attribute__((always_inline, no_sanitize_thread)) inline T atomic(T* address, const void* pc, const Update& update) {
  atomic_access(address, sizeof(T), pc);
  const T old = *address;
  *address = update(old);
  return old;
}
}  // namespace simt

template <typename T>
SIMT_UNSEEN T atomicAdd(T* address, T value) {
  return simt::atomic(address, __builtin_return_address(0), [=](T old) { return T(old + value); });
}
template <typename T>
SIMT_UNSEEN T atomicMax(T* address, T value) {
  return simt::atomic(address, __builtin_return_address(0), [=](T old) { return old < value ? value : old; });
}
template <typename T>
SIMT_UNSEEN T atomicExch(T* address, T value) {
  return simt::atomic(address, __builtin_return_address(0), [=](T) { return value; });
}
template <typename T>
SIMT_UNSEEN T atomicCAS(T* address, T compare, T value) {
  return simt::atomic(address, __builtin_return_address(0), [=](T old) { return old == compare ? value : old; });
}

// ---- Arithmetic. Approximations of the device are the exact functions here.

using std::max;
using std::min;

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
