// The functions that `g++ -fsanitize=thread` calls before every load and store of the code that it compiles, and those
// that -fsanitize=bounds calls when an index is outside of its array. The program is linked without the sanitizers'
// libraries: these are the only definitions.
#include <cstdlib>

#include "engine.h"

namespace {

inline void seen(void* address, size_t bytes, simt::Op op, const void* pc, bool aligned) {
  if (!simt::in_kernel) return;
  simt::EngineScope scope;
  simt::access(reinterpret_cast<uintptr_t>(address), bytes, op, pc, aligned);
}

}  // namespace

#define HOOK(name, bytes, op, aligned) \
  void name(void* address) { seen(address, bytes, simt::Op::op, __builtin_return_address(0), aligned); }
#define HOOKS(bytes)                                      \
  HOOK(__tsan_read##bytes, bytes, kLoad, true)            \
  HOOK(__tsan_write##bytes, bytes, kStore, true)          \
  HOOK(__tsan_volatile_read##bytes, bytes, kLoad, true)   \
  HOOK(__tsan_volatile_write##bytes, bytes, kStore, true) \
  HOOK(__tsan_unaligned_read##bytes, bytes, kLoad, false) \
  HOOK(__tsan_unaligned_write##bytes, bytes, kStore, false)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  seen(address, bytes, simt::Op::kLoad, __builtin_return_address(0), false);
}
void __tsan_write_range(void* address, size_t bytes) {
  seen(address, bytes, simt::Op::kStore, __builtin_return_address(0), false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

void __ubsan_handle_out_of_bounds(void*, void*) {
  if (!simt::in_kernel) std::abort();
  simt::EngineScope scope;
  simt::add_error(simt::ErrorKind::kOutOfBounds, "index beyond its array", __builtin_return_address(0));
  simt::abort_launch();
}
}
