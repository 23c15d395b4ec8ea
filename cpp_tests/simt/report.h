// The report of the engine to a test: the errors and the memory traffic of each launch; and the memory that it checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "vector_types.h"

namespace simt {

enum class ErrorKind {
  kSharedRace,        // two threads of a block, no barrier between them
  kGlobalRace,        // the same in global memory
  kBlockConflict,     // two blocks of a launch touch one byte, not both reading, not both atomically
  kOutOfBounds,       // or a pointer that is no device memory
  kMisaligned,        // address no multiple of the access's size
  kUninitialised,     // read before any write
  kDivergentBarrier,  // __syncthreads not reached by all threads, or at different lines
  kDivergentWarp,     // lanes of one mask meet at different collectives
  kBadMask,           // caller, source lane or awaited lane does not take part
  kDeadlock,
  kAsyncHazard,  // a cp.async that nobody waited for
  kTrap,         // a require() that does not hold
  kBadLaunch,    // a grid, block or amount of shared memory that CUDA refuses
};

const char* name(ErrorKind kind);

// Errors of one kind at one place are one record.
struct Error {
  ErrorKind kind;
  std::string message;
  uint3 block;
  int thread;  // linear in its block, -1 for the launch as a whole
  const void* pc;
  std::string source;  // file:line; empty where only pc is known
  int64_t count;
};

enum class Space : uint8_t { kGlobal, kShared };
enum class Op : uint8_t { kLoad, kStore, kAtomic };

struct Traffic {
  int64_t accesses = 0;    // one a thread
  int64_t requests = 0;    // one a warp
  int64_t bytes = 0;       // asked for by threads
  int64_t sectors = 0;     // 32-byte pieces moved for them; global memory
  int64_t wavefronts = 0;  // passes over the 32 banks; shared memory
  int64_t conflicts = 0;   // wavefronts beyond those that conflict-free lanes need

  Traffic& operator+=(const Traffic& other);
};

// The traffic of one access in the source with one buffer.
struct Site {
  const void* pc;
  Space space;
  Op op;
  std::string buffer;  // empty in shared memory
  Traffic traffic;
};

struct Report {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  std::vector<Error> errors;
  std::vector<Site> sites;
  int64_t accesses = 0;
  int64_t switches = 0;

  bool has(ErrorKind kind) const;
  Traffic global(Op op, const std::string& buffer = "") const;  // no name: all buffers
  Traffic shared(Op op) const;
};

struct Options {
  uint64_t seed = 1;                        // of the order of blocks and threads
  int preempt_every = 100;                  // accesses between forced switches, on average; 0: never
  int64_t access_limit = int64_t(1) << 31;  // of a launch; beyond it threads count as stuck
  int multiprocessors = 2;                  // of the device that launchers plan for
  int major = 9;                            // of its compute capability
  int shared_bytes = 227 << 10;             // of shared memory that a block may have
  bool traffic = true;                      // whether it is counted
};

Options& options();
std::vector<Report>& reports();              // of all launches since it was last cleared
std::string source_line(const void* pc);     // file:line by addr2line, for messages
std::string describe(const Report& report);  // its errors, one a line

// Device memory. All of it is known to the engine; a red zone lies around each allocation.
void* device_alloc(size_t bytes, const std::string& name, bool initialised);
void device_free(void* memory);
// Memory of someone else, for the time in between. It must not overlap other memory that is known.
void device_register(void* memory, size_t bytes, const std::string& name, bool initialised = true);
void device_unregister(void* memory);

template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer(const std::string& name, size_t count)  // uninitialised
      : count_(count), data_(static_cast<T*>(device_alloc(count * sizeof(T), name, false))) {}
  Buffer(const std::string& name, const std::vector<T>& values)
      : count_(values.size()), data_(static_cast<T*>(device_alloc(count_ * sizeof(T), name, true))) {
    if (count_ > 0) std::memcpy(static_cast<void*>(data_), values.data(), count_ * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { device_free(data_); }

  T* data() const { return data_; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + count_); }

 private:
  size_t count_;
  T* data_;
};

}  // namespace simt
