// Random data, plain conversions, simple thread pools and workspaces for the kernel tests.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/bf16/units.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/dtype.h"

namespace align::test {

// Machine epsilon of the storage type.
template <typename T>
constexpr double kEpsilon = 0x1p-23;
template <>
inline constexpr double kEpsilon<double> = 0x1p-52;
template <>
inline constexpr double kEpsilon<bfloat16> = 0x1p-7;
template <>
inline constexpr double kEpsilon<float16> = 0x1p-10;

template <typename T>
std::vector<T> random_values(int64_t count, uint64_t seed, double low = -1, double high = 1) {
  std::mt19937_64 generator(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<T> values(count);
  for (T& value : values) value = narrow<T>(Acc<T>(uniform(generator)));
  return values;
}

template <typename T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> wide(values.size());
  for (size_t i = 0; i < values.size(); ++i) wide[i] = widen(values[i]);
  return wide;
}

// Four threads, or as many as there are pieces, that begin at once; each takes every fourth piece of grain elements.
inline void thread_pieces(int64_t begin, int64_t end, int64_t grain, const cpu::RangeBody& body) {
  constexpr int64_t kThreads = 4;
  const int64_t workers = std::min(kThreads, (end - begin + grain - 1) / grain);
  std::barrier start(workers);
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < workers; ++worker) {
    threads.emplace_back([=, &body, &start] {
      start.arrive_and_wait();
      for (int64_t b = begin + worker * grain; b < end; b += kThreads * grain) body(b, std::min(b + grain, end));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// One element at a time, last first: the finest cut in the least expected order.
inline void backwards_one_by_one(int64_t begin, int64_t end, int64_t, const cpu::RangeBody& body) {
  for (int64_t b = end; b > begin; --b) body(b - 1, b);
}

// Runs body under each way of cutting ranges; serial first.
template <typename Body>
void for_each_parallel_for(const Body& body) {
  for (cpu::ParallelFor implementation : {cpu::ParallelFor(nullptr), thread_pieces, backwards_one_by_one}) {
    cpu::set_parallel_for(implementation);
    body();
  }
  cpu::set_parallel_for(nullptr);
}

// Runs body with each vector width this processor has, and with each unit for bfloat16 that it has; with ALIGN_EMULATED
// in the environment with the units alone, which must be all there are.
template <typename Body>
void for_each_vector_width(const Body& body) {
  const bool emulated = std::getenv("ALIGN_EMULATED") != nullptr;
  CHECK(!emulated || cpu::native_bf16_unit() == cpu::Bf16Unit::kAmx);
  for (cpu::Bf16Unit unit : {cpu::Bf16Unit::kAmx, cpu::Bf16Unit::kDots}) {
    cpu::bf16_unit_limit = unit;
    if (cpu::native_bf16_unit() >= unit) body();
  }
  cpu::bf16_unit_limit = cpu::Bf16Unit::kNone;
  for (int bytes : {16, 32, 64}) {
    cpu::vector_bytes_limit = bytes;
    if (!emulated) body();
  }
  cpu::vector_bytes_limit = 64;
  cpu::bf16_unit_limit = cpu::Bf16Unit::kAmx;
}

constexpr char kCanary = char(0xFF);  // NaN in every type: what was never written shows

// Calls kernel with a workspace of so many bytes, beyond which it must not write.
template <typename Args, typename Kernel>
void run_in_workspace(Args args, int64_t bytes, const Kernel& kernel) {
  std::vector<char> workspace(bytes + 64, kCanary);
  args.workspace = workspace.data();
  kernel(args);
  CHECK(std::all_of(workspace.begin() + bytes, workspace.end(), [](char c) { return c == kCanary; }));
}

}  // namespace align::test
