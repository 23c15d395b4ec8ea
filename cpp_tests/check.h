// A minimal test harness: TEST registers a case, CHECK and CHECK_CLOSE count failures and go on, and the main
// function at the end of every test file is run_tests().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

inline int64_t& failures() {
  static int64_t count = 0;
  return count;
}

constexpr int64_t kPrintedFailures = 10;  // of one case

inline bool report(bool ok, const char* file, int line, const char* what) {
  if (!ok && ++failures() <= kPrintedFailures) std::printf("  %s:%d: %s\n", file, line, what);
  return ok;
}

// The largest |got - want| must not exceed tolerance; NaN fails.
template <typename Got, typename Want>
bool report_close(const Got& got, const Want& want, double tolerance, const char* file, int line, const char* what) {
  if (got.size() != want.size()) return report(false, file, line, "sizes differ");
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(double(got[i]) - double(want[i]));
    if (!(error <= worst)) {
      worst = error;
      where = i;
    }
    if (std::isnan(error)) break;
  }
  if (worst <= tolerance) return true;
  char text[256];
  std::snprintf(text, sizeof text, "%s: element %zu is %.9g, not %.9g (error %.3g > %.3g)", what, where,
                double(got[where]), double(want[where]), worst, tolerance);
  return report(false, file, line, text);
}

// Bytes, so that signed zeros and NaNs count.
template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Prints "N passed, N failed" and returns main's exit status. A case in which nothing failed passed.
inline int run_tests() {
  int passed = 0, failed = 0;
  for (const Case& test : cases()) {
    failures() = 0;
    try {
      test.body();
    } catch (const std::exception& error) {
      report(false, test.name, 0, error.what());
    }
    if (failures() > 0) std::printf("FAILED %s (%lld checks)\n", test.name, static_cast<long long>(failures()));
    ++(failures() > 0 ? failed : passed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 || passed == 0 ? 1 : 0;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) check::report(bool(condition), __FILE__, __LINE__, #condition)

// Two containers of numbers, element by element.
#define CHECK_CLOSE(got, want, tolerance) \
  check::report_close(got, want, tolerance, __FILE__, __LINE__, #got " against " #want)
