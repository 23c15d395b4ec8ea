// CUDA's small built-in types. Those of 8 and 16 bytes copy themselves with one wide access, so that the engine sees
// the single load or store that a GPU issues. Their default is a constant, since shared memory must not be constructed.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {
template <int kBytes>
struct Wide {
  typedef char Type __attribute__((vector_size(kBytes), may_alias));
  __attribute__((always_inline)) static void copy(void* to, const void* from) {
    *static_cast<Type*>(to) = *static_cast<const Type*>(from);
  }
};
}  // namespace simt

#define SIMT_VECTOR_COPY(Name)                                                                     \
  __attribute__((always_inline)) Name(const Name& o) { simt::Wide<sizeof(Name)>::copy(this, &o); } \
  __attribute__((always_inline)) Name& operator=(const Name& o) {                                  \
    simt::Wide<sizeof(Name)>::copy(this, &o);                                                      \
    return *this;                                                                                  \
  }

#define SIMT_VECTOR2(Name, T)          \
  struct alignas(2 * sizeof(T)) Name { \
    T x, y;                            \
    SIMT_VECTOR_COPY(Name)             \
    constexpr Name() : x(), y() {}     \
    Name(T x_, T y_) : x(x_), y(y_) {} \
  };                                   \
  inline Name make_##Name(T x, T y) { return {x, y}; }

#define SIMT_VECTOR4(Name, T)                                    \
  struct alignas(4 * sizeof(T)) Name {                           \
    T x, y, z, w;                                                \
    SIMT_VECTOR_COPY(Name)                                       \
    constexpr Name() : x(), y(), z(), w() {}                     \
    Name(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {} \
  };                                                             \
  inline Name make_##Name(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR2(float2, float)
SIMT_VECTOR2(int2, int)
SIMT_VECTOR2(uint2, unsigned)
SIMT_VECTOR2(double2, double)
SIMT_VECTOR4(float4, float)
SIMT_VECTOR4(int4, int)
SIMT_VECTOR4(uint4, unsigned)

#undef SIMT_VECTOR4
#undef SIMT_VECTOR2
#undef SIMT_VECTOR_COPY
