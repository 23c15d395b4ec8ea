// The checks of all bindings. An error is one line that names the argument, its value and the values that are allowed;
// torch makes it a RuntimeError.
#pragma once

#include <cctype>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "ops/sizes.h"

namespace align {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that a message is made only if it is needed.
#define ALIGN_CHECK(condition, ...) \
  do {                              \
    if (!(condition)) [[unlikely]]  \
      ::align::refuse(__VA_ARGS__); \
  } while (false)

inline std::string text_of(Sizes sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) { return text_of(tensor.sizes()); }

// The name of a dtype in Python.
inline std::string name_of(ScalarType dtype) {
  // clang-format off
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Byte, "uint8"}, {ScalarType::Char, "int8"}, {ScalarType::Short, "int16"}, {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"}, {ScalarType::Half, "float16"}, {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"}, {ScalarType::ComplexHalf, "complex32"}, {ScalarType::ComplexFloat, "complex64"},
      {ScalarType::ComplexDouble, "complex128"}};
  // clang-format on
  for (const auto& [type, name] : kNames) {
    if (type == dtype) return name;
  }
  std::string name = torch::headeronly::toString(dtype);  // the others have their Python names in capitals
  for (char& letter : name) letter = char(std::tolower(static_cast<unsigned char>(letter)));
  return name;
}

inline void check_shape(const Tensor& tensor, Sizes expected, const char* name) {
  ALIGN_CHECK(tensor.sizes().equals(expected), name, " must have shape ", text_of(expected), ", got ",
              shape_of(tensor));
}

// Whether there are kernels for a dtype.
inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline void check_floating(const Tensor& tensor, const char* name) {
  ALIGN_CHECK(is_floating(tensor.scalar_type()), name, " must be float32, bfloat16, float16 or float64, got ",
              name_of(tensor.scalar_type()));
}
inline void check_floating(const OptionalTensor& tensor, const char* name) {
  if (tensor) check_floating(*tensor, name);
}

inline void check_dtype(const Tensor& tensor, ScalarType expected, const char* name, const char* what) {
  ALIGN_CHECK(tensor.scalar_type() == expected, name, " must be ", what, ", got ", name_of(tensor.scalar_type()));
}
inline void check_dtype(const OptionalTensor& tensor, ScalarType expected, const char* name, const char* what) {
  if (tensor) check_dtype(*tensor, expected, name, what);
}

// The tensor must have the type in which kernels accumulate, given another tensor that they compute with.
inline void check_accumulated(const Tensor& tensor, const Tensor& beside, const char* name) {
  const bool is_double = beside.scalar_type() == ScalarType::Double;
  check_dtype(tensor, is_double ? ScalarType::Double : ScalarType::Float, name, "float32 (float64 for float64)");
}
inline void check_accumulated(const OptionalTensor& tensor, const Tensor& beside, const char* name) {
  if (tensor) check_accumulated(*tensor, beside, name);
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  ALIGN_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), name,
              " must be on the device of the other tensors");
}
inline void check_device(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (tensor) check_device(*tensor, like, name);
}

inline void check_size(int64_t size, int64_t most, const char* name) {
  ALIGN_CHECK(size <= most, name, " must be at most ", most, ", got ", size);
}

// A count, which is at least 1.
inline void check_count(int64_t count, const char* name) {
  ALIGN_CHECK(count >= 1 && count <= kMaxCount, name, " must be in 1 .. ", kMaxCount, ", got ", count);
}

}  // namespace align
