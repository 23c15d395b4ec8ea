// Threads of a block as fibers: each has a stack, and control passes between them only where the engine says so.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Makes to's first switch call entry, which must never return, on the given stack.
void prepare(Fiber& to, char* stack, size_t bytes, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);

// A stack for each thread of a block, with an inaccessible page below each.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 << 10;

  void reserve(int count);
  char* stack(int i) const { return base_ + size_t(i) * kBytes; }
  // The thread whose stack holds address, or -1.
  int owner(uintptr_t address) const {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(base_);
    return offset < size_t(count_) * kBytes ? int(offset / kBytes) : -1;
  }

 private:
  char* base_ = nullptr;
  int count_ = 0;
};

}  // namespace simt
