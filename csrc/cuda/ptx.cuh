// All inline assembly: tensor-core products, the loads of their operands, asynchronous copies and conversions. The SIMT
// engine or plain C++ has an equivalent of each instruction. Most need sm_80; older architectures do without them.
#pragma once

#include "cuda/launch.cuh"
#include "ops/convert.h"

namespace align::cuda {

#ifdef ALIGN_ON_SIMT
#define ALIGN_HAS_SM80 1
using simt::cp_async_commit;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;

using SharedAddress = char*;
inline SharedAddress shared_address(void* pointer) { return static_cast<char*>(pointer); }
inline void cp_async16(SharedAddress to, const void* from, int bytes) { simt::cp_async16(to, from, bytes); }
template <int kGroupsLeft>
void cp_async_wait() {
  simt::cp_async_wait(kGroupsLeft);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16_bf16(d, a, b);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) {
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16_f16(d, a, b);
}

// threadIdx.x, read where it stands: what is computed from it does not stay in registers from one turn of a loop to the
// next one.
inline int thread_again() { return int(threadIdx.x); }
// The value, of which the compiler does not know that it is always the same.
inline uint64_t opaque(uint64_t value) { return value; }

// Bits 31 and 15 in all bits of the upper and the lower half.
inline uint32_t spread_signs(uint32_t word) { return (word >> 15 & 0x10001u) * 0xFFFFu; }

template <typename T>
uint32_t pack(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}
template <typename T>
T round_to(float value) {
  return narrow<T>(value);
}
template <typename T>
float low_half(uint32_t pair, T) {
  return widen(T{uint16_t(pair)});
}
template <typename T>
float high_half(uint32_t pair, T) {
  return widen(T{uint16_t(pair >> 16)});
}
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define ALIGN_HAS_SM80 1
#else
#define ALIGN_HAS_SM80 0
#endif

using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ inline int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline uint64_t opaque(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// Bits 31 and 15 in all bits of the upper and the lower half.
__device__ inline uint32_t spread_signs(uint32_t word) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(spread) : "r"(word));
  return spread;
}

// Copies source_bytes (0 .. 16) to shared memory and fills up to 16 bytes with zeros. The copy is complete after the
// thread has waited; before sm_80 at once. Both addresses are multiples of 16; with 0 bytes the source is not read.
__device__ inline void cp_async16(SharedAddress shared, const void* global, int source_bytes) {
#if ALIGN_HAS_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
               : "memory");
#else
  *static_cast<uint4*>(__cvta_shared_to_generic(shared)) =
      source_bytes == 16 ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ inline void cp_async_commit() {
#if ALIGN_HAS_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroupsLeft groups of copies of this thread are not complete.
template <int kGroupsLeft>
__device__ inline void cp_async_wait() {
#if ALIGN_HAS_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

#if ALIGN_HAS_SM80
// Loads four 8 x 8 matrices of 16-bit elements. Lanes 8 i .. 8 i + 7 give the addresses of the 16-byte rows of matrix
// i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16 x 16 (row), b 16 x 8 (col) and d 16 x 8, accumulated in float.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two floats to nearest even, the first one to the low half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#else
template <typename T>
__device__ uint32_t pack(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}
#endif

// Rounds one float to nearest even.
template <typename T>
__device__ inline T round_to(float value) {
  return {uint16_t(pack<T>(value, 0.f))};
}

// The halves of 32 bits as floats.
__device__ inline float low_half(uint32_t pair, bfloat16) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair, bfloat16) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ inline float low_half(uint32_t pair, float16) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
  return value;
}
__device__ inline float high_half(uint32_t pair, float16) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(pair));
  return value;
}
#endif

}  // namespace align::cuda
