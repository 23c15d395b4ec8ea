// Shared by the tests of the projection kernels: sums with their rounding errors, and how close is close.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "check.h"
#include "support.h"

namespace align::test {

// The same values in another type.
template <typename To, typename From>
std::vector<To> cast(const std::vector<From>& values) {
  std::vector<To> result;
  for (const From& value : values) result.push_back(narrow<To>(Acc<To>(widen(value))));
  return result;
}

// Storage for count elements that starts out as NaN, so that whatever is not assigned shows.
template <typename T>
std::vector<T> unassigned(int64_t count) {
  return std::vector<T>(count, narrow<T>(Acc<T>(NAN)));
}

// A sum of products and the sum of their magnitudes, which bounds its rounding error.
struct Sum {
  double value = 0, magnitude = 0;
  // factor: how many times its own rounding error the term stands on.
  void add(double term, double factor = 1) {
    value += term;
    magnitude += factor * std::fabs(term);
  }
};

// Whether the kernels round latent rows to T.
template <typename T>
bool rounds_latents() {
  return cpu::unit_for<T>() != cpu::Bf16Unit::kNone;
}

// Rounding: each tensor's largest sum of magnitudes, in eps of the accumulator, times the depth of the sums it stands
// on; one rounding to the storage type; and in eps of T if latent rows are rounded to T before they are multiplied. A
// lost row, rank or column is orders of magnitude more.
template <typename S, typename T>
void check_tensor(const std::vector<S>& got, const std::vector<Sum>& want, const char* name,
                  bool rounds_latent = false) {
  std::vector<double> value;
  double magnitude = 0, largest = 0;
  for (const Sum& sum : want) {
    value.push_back(sum.value);
    magnitude = std::max(magnitude, sum.magnitude);
    largest = std::max(largest, std::fabs(sum.value));
  }
  const double latent = rounds_latent && !std::is_same_v<T, Acc<T>> ? 0.51 * kEpsilon<T> : 0;
  const double tolerance = (12 * kEpsilon<Acc<T>> + latent) * magnitude + 0.51 * kEpsilon<S> * largest;
  if (!CHECK_CLOSE(to_double(got), value, tolerance)) std::printf("    in %s\n", name);
}

}  // namespace align::test
