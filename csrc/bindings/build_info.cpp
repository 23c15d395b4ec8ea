// The Python module align_ext._C: build information only. The operators register themselves when it is loaded.
#include <array>
#include <pybind11/pybind11.h>

#include "bindings/base_order.h"
#include "bindings/torch_cuda.h"
#include "cpu/bf16/units.h"
#include "cpu/simd.h"
#ifdef ALIGN_SIMT
#include "report.h"
#endif

PYBIND11_MODULE(_C, m) {
#ifdef ALIGN_WITH_CUDA
  m.attr("cuda_archs") = ALIGN_CUDA_ARCHS;
  m.attr("cuda_toolkit") = ALIGN_CUDA_TOOLKIT;
#else
  m.attr("cuda_archs") = "";
  m.attr("cuda_toolkit") = "";
#endif
  m.attr("built_with_torch") = ALIGN_BUILT_WITH_TORCH;
  m.attr("compiler") = __VERSION__;
  m.def("vector_bytes", align::cpu::native_vector_bytes, "How wide the vectors of the CPU's kernels are.");
  m.def(
      "bfloat16_unit", [] { return std::array{"", "AVX512_BF16", "AMX"}[int(align::cpu::native_bf16_unit())]; },
      "What multiplies bfloat16 on the CPU; empty: vectors of float32.");
  m.def(
      "finds_cuda_stream", [] { return align::find_in_torch_cuda(align::kCurrentStream) != nullptr; },
      "Whether the CUDA kernels would find torch's current stream.");
  m.def(
      "low_rank_first", [](bool first) { return align::low_rank_first_on_cuda.exchange(first); },
      pybind11::arg("first"),
      "On CUDA: whether the low-rank terms are written before the frozen products, which are added to them. Returns "
      "what "
      "held before.");
#ifdef ALIGN_SIMT
  m.def("launches", [] { return simt::reports().size(); }, "Kernels that the SIMT engine has run in this process.");
#endif
}
