#include "fiber.h"

#include <new>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
// Saves what a callee must keep on the old stack, and takes it back from the new one.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {

#if defined(__x86_64__)

void prepare(Fiber& to, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSaved = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // entry's return address: entry finds the stack 8 below a multiple of 16, as after a call
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) top[-2 - i] = nullptr;
  to.stack_pointer = top - 1 - kSaved;
}

void switch_fiber(Fiber& from, Fiber& to) { simt_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Fiber& to, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&to.context);
  to.context.uc_stack.ss_sp = stack;
  to.context.uc_stack.ss_size = bytes;
  to.context.uc_link = nullptr;
  makecontext(&to.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (base_ != nullptr) munmap(base_, size_t(count_) * kBytes);
  void* memory =
      mmap(nullptr, size_t(count) * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(stack(i), size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
}

}  // namespace simt
