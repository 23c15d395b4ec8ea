// Running kernels under the SIMT engine in tests: several thread orders, and what their reports say.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "simt.h"

namespace align::test {

// Runs body once for each of several orders of blocks and threads, with and without preemption. How many can be set in
// the environment, by ALIGN_SIMT_ORDERS.
template <typename Body>
void for_each_order(const Body& body, int orders = 3) {
  if (const char* asked = std::getenv("ALIGN_SIMT_ORDERS")) orders = std::atoi(asked);
  for (int seed = 1; seed <= orders; ++seed) {
    simt::options() = {};
    simt::options().seed = uint64_t(seed);
    simt::options().preempt_every = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 100 : 3;
    simt::reports().clear();
    body();
  }
  simt::options() = {};
}

// Whether all launches since reports() was last cleared were faultless; prints what was not.
inline bool clean() {
  bool none = !simt::reports().empty();
  for (const simt::Report& report : simt::reports()) {
    none = none && report.errors.empty();
    std::fputs(simt::describe(report).c_str(), stdout);
  }
  return none;
}

// Whether the last launch shows an error of this kind, and of no other than the two.
inline bool caught(simt::ErrorKind kind, simt::ErrorKind also) {
  const simt::Report& report = simt::reports().back();
  bool only = report.has(kind);
  for (const simt::Error& error : report.errors) only = only && (error.kind == kind || error.kind == also);
  if (!only) std::fputs(simt::describe(report).c_str(), stdout);
  return only;
}
inline bool caught(simt::ErrorKind kind) { return caught(kind, kind); }

// ---- Kernels that come with a fault and without

constexpr int kFaultThreads = 128;
using FaultKernel = void (*)(const float* x, float* out);

// Runs kernel on x = 0, 1, ... and an out, of kFaultThreads floats for each block; returns out.
inline std::vector<float> run(FaultKernel kernel, int blocks = 1) {
  std::vector<float> ramp(blocks * kFaultThreads);
  for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = float(i);
  simt::Buffer<float> x("x", ramp), out("out", std::vector<float>(ramp.size()));
  simt::launch(kernel, dim3(unsigned(blocks)), dim3(kFaultThreads), nullptr, static_cast<const float*>(x.data()),
               out.data());
  return out.host();
}

inline void check_fault(FaultKernel faulty, FaultKernel sound, simt::ErrorKind kind, simt::ErrorKind also,
                        int blocks = 1) {
  for_each_order([&] {
    run(faulty, blocks);
    CHECK(caught(kind, also));
    simt::reports().clear();
    run(sound, blocks);
    CHECK(clean());
  });
}
inline void check_fault(FaultKernel faulty, FaultKernel sound, simt::ErrorKind kind, int blocks = 1) {
  check_fault(faulty, sound, kind, kind, blocks);
}

}  // namespace align::test
