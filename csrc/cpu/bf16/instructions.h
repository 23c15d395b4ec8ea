// The instructions of AMX and AVX512_BF16, only for functions with BF16_TARGET, and which of them the processor has.
// Tests have a file of this name that computes the same on any processor.
#pragma once

#include "cpu/bf16/units.h"

#ifdef ALIGN_BF16_UNITS

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/simd.h"

// An inlined function must be compiled for the same instructions as its caller. The compiler need not know AMX: only
// the assembler below uses it.
#define BF16_LEVEL "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,bmi2,fma"
#define BF16_TARGET __attribute__((target(BF16_LEVEL)))
#define BF16_INLINE inline __attribute__((always_inline, target(BF16_LEVEL)))
#define BF16_LAMBDA __attribute__((always_inline, target(BF16_LEVEL)))

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics

namespace align::cpu {

inline Bf16Unit find_bf16_unit() {
  const std::string& limit = isa_limit();
  const bool no_dots = native_vector_bytes() < 64 || limit == "AVX512_CORE" || limit == "AVX512_CORE_VNNI";
  const bool no_amx = starts_with(limit, "AVX") && limit.find("AMX") == std::string::npos;
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTiles = 1u << 24, kAvx512Bf16 = 1u << 5;
  if (no_dots || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return Bf16Unit::kNone;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTiles);
  if (!amx || no_amx || syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return Bf16Unit::kDots;
  return Bf16Unit::kAmx;
}

// The sums plus the products of both neighbours in each lane.
BF16_INLINE __m512 dot_add(__m512 sums, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
}

// ---- AMX: the tiles are named by numbers

template <int tile>
BF16_INLINE void load_tile(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
template <int tile>
BF16_INLINE void store_tile(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
// sum = 0, or the sums in memory
template <int sum>
BF16_INLINE void begin_sum(const float* rows, int64_t stride_bytes, bool zero) {
  if (zero) {
    asm volatile("tilezero %%tmm%c0" : : "i"(sum));
  } else {
    load_tile<sum>(rows, stride_bytes);
  }
}
// sum += left right
template <int sum, int left, int right>
BF16_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
}

// Configures the tiles of this thread until the end of the scope. Tiles have 16 rows; those from kShort on have the
// rows of the last ranks % 16 ranks.
constexpr int kShort = 5;
class Tiles {
 public:
  BF16_INLINE explicit Tiles(int64_t ranks = kTileRows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      const bool is_short = ranks % kTileRows != 0 && tile >= kShort;
      config.rows[tile] = uint8_t(is_short ? ranks % kTileRows : kTileRows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  BF16_INLINE ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

}  // namespace align::cpu

#endif
